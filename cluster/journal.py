"""What the caches of a ring hold: known to the head alone, so that the ring can be rebuilt without a node.

The head sends batches and memory operations ahead of their results. `front` is the state after all of them, `base` the
state before the oldest one whose result has not come back; what lies between is `pending`. A new ring is brought to
`base` by evaluating its tokens, then gets the pending entries again.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from ..runtime.engine import Batch, Span
from ..runtime.errors import DecodeFailed


@dataclass(frozen=True, slots=True)
class Memory:
    """A memory operation: `n_tokens` of `source` stay, or are shared with `target`."""

    source: int
    n_tokens: int
    target: int | None = None


Entry = Batch | Memory


class Holdings:
    """Tokens of all sequences and the cells that they take; a shared prefix takes its cells once."""

    def __init__(self, n_sequences: int) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(n_sequences)]
        self._cells: list[list[int]] = [[] for _ in range(n_sequences)]
        self._n_users: dict[int, int] = {}
        self._next = 0

    @property
    def n_used(self) -> int:
        """Cells that are taken."""
        return len(self._n_users)

    def apply(self, entry: Entry) -> None:
        if not isinstance(entry, Memory):
            for span in entry:
                self.tokens[span.sequence_id] += span.tokens
                new = range(self._next, self._next + len(span.tokens))
                self._cells[span.sequence_id] += new
                self._n_users |= dict.fromkeys(new, 1)
                self._next += len(span.tokens)
        elif entry.target is None:
            for cell in self._cells[entry.source][entry.n_tokens :]:
                self._n_users[cell] -= 1
                if not self._n_users[cell]:
                    del self._n_users[cell]
            del self.tokens[entry.source][entry.n_tokens :], self._cells[entry.source][entry.n_tokens :]
        else:
            shared = self._cells[entry.source][: entry.n_tokens]
            for cell in shared:
                self._n_users[cell] += 1
            self.tokens[entry.target] = self.tokens[entry.source][: entry.n_tokens]
            self._cells[entry.target] = shared

    def check_batch(self, batch: Batch, n_batch: int, n_vocab: int) -> int:
        """The batch's number of tokens if it continues what is held; llama.cpp would end the process on some that do
        not. Raises DecodeFailed."""
        n = sum(len(span.tokens) for span in batch)
        if not 1 <= n <= n_batch or len({span.sequence_id for span in batch}) < len(batch):
            raise DecodeFailed(f"a batch of {n} tokens was to be decoded; it holds 1 to {n_batch}, a span a sequence")
        for span in batch:
            held = self._held(span.sequence_id)
            if span.position != held or not 0 <= span.n_logits <= len(span.tokens) or not span.tokens:
                raise DecodeFailed(
                    f"{len(span.tokens)} tokens at {span.position} do not continue the {held} of sequence "
                    f"{span.sequence_id}"
                )
            if not 0 <= min(span.tokens) <= max(span.tokens) < n_vocab:
                raise DecodeFailed(f"token ids up to {max(span.tokens)} are not within the vocabulary of {n_vocab}")
        return n

    def check_fork(self, source: int, target: int, n_tokens: int) -> None:
        """Raises DecodeFailed where an empty sequence cannot share so many tokens of another."""
        held, taken = self._held(source), self._held(target)
        if source == target or taken or not 0 <= n_tokens <= held:
            raise DecodeFailed(f"sequence {target} of {taken} tokens cannot share {n_tokens} of {held} of {source}")

    def check_rewind(self, sequence_id: int, n_tokens: int) -> int:
        """The number of tokens held. Raises DecodeFailed where a sequence cannot keep `n_tokens`."""
        held = self._held(sequence_id)
        if not 0 <= n_tokens <= held:
            raise DecodeFailed(f"sequence {sequence_id} holds {held} tokens and cannot keep {n_tokens}")
        return held

    def _held(self, sequence_id: int) -> int:
        if not 0 <= sequence_id < len(self.tokens):
            raise DecodeFailed(f"there is no sequence {sequence_id}; the cache has 0 to {len(self.tokens) - 1}")
        return len(self.tokens[sequence_id])

    def rebuild(self, n_batch: int) -> Iterator[Entry]:
        """What brings empty caches to this state, shared prefixes evaluated once."""
        done: list[int] = []
        for sequence, tokens in enumerate(self.tokens):
            if not tokens:
                continue
            best = max(done, key=lambda other: self._n_shared(other, sequence), default=None)
            start = self._n_shared(best, sequence) if best is not None else 0
            if best is not None and start:
                yield Memory(best, start, sequence)
            for first in range(start, len(tokens), n_batch):
                yield [Span(sequence, first, tokens[first : first + n_batch], 0)]
            done.append(sequence)

    def _n_shared(self, one: int, other: int) -> int:
        pairs = zip(self._cells[one], self._cells[other], strict=False)
        return next(
            (i for i, (a, b) in enumerate(pairs) if a != b), min(map(len, (self._cells[one], self._cells[other])))
        )


@dataclass(slots=True)
class Journal:
    """The two states and what lies between them."""

    n_sequences: int
    front: Holdings = field(init=False)
    base: Holdings = field(init=False)
    pending: deque[Entry] = field(default_factory=deque)
    n_unwanted: int = 0
    """Batches of `pending`, the oldest, whose rows nobody waits for."""

    def __post_init__(self) -> None:
        self.front, self.base = Holdings(self.n_sequences), Holdings(self.n_sequences)

    def add(self, entry: Entry) -> None:
        """A batch is on its way, or a memory operation is due before the next one."""
        self.front.apply(entry)
        self.pending.append(entry)

    def settle(self) -> bool:
        """The oldest batch has come back: it and what was due before it are part of the base. True where its rows are
        wanted."""
        while self.pending:
            entry = self.pending.popleft()
            self.base.apply(entry)
            if not isinstance(entry, Memory):
                break
        is_wanted = not self.n_unwanted
        self.n_unwanted = max(0, self.n_unwanted - 1)
        return is_wanted

    @property
    def is_unwanted(self) -> bool:
        """True where nobody waits for any rows of what is on its way."""
        return self.n_unwanted == sum(not isinstance(entry, Memory) for entry in self.pending)

    def absorb(self) -> None:
        """Nothing is under way that somebody waits for: all of it is part of the base."""
        while self.pending:
            self.base.apply(self.pending.popleft())
        self.n_unwanted = 0

    def discard(self) -> None:
        """Nobody waits for the rows of what is on its way."""
        self.n_unwanted = sum(not isinstance(entry, Memory) for entry in self.pending)
