"""Who is in the engine: slots, prompts shared between sequences, and what goes into the next batch."""

from collections.abc import Callable
from dataclasses import dataclass, field

from .controls.control import Control, Probe
from .engine import Batch, Engine, Row, Span, piece_size
from .phase import PhaseTracker
from .sequence import Sequence
from .tokenizer import StreamDecoder

_SHORTEST_SHARED = 8
"""Prefixes shorter than this are evaluated again rather than forked."""
_PART_BESIDE = 4
"""While others decode, prompts get a fourth of a batch, 32 tokens on a CPU: the others' readers wait for the whole
batch, and each token of a prompt makes it longer."""
_TAIL = 32
"""Tokens at the end of a prompt that the next one may not have at that place: there stands what opens the reply."""
_MOST_KEPT = 4
"""Ended prompts that are kept: enough for clients that take turns, and few, for they hold cells of the cache."""


@dataclass(slots=True, eq=False)
class Request:
    """A sequence with all that acts on it. `sample` takes the row of logits to a token id."""

    sequence: Sequence
    tracker: PhaseTracker
    sample: Callable[[Row], int]
    controls: list[Control] = field(default_factory=list)
    is_continued: bool = False
    """True where the next prompt is likely to go on behind this reply, as a conversation's next turn does."""
    n_together: int = 1
    """This request and those behind it that have to begin in the same step; it waits until there is room for all."""


@dataclass(slots=True, eq=False)
class Resident:
    """One sequence in the engine: a request's own, or a probe beside it."""

    sequence: Sequence
    request: Request
    probe: Probe | None = None
    reader: Control | None = None
    texts: list[str] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    decoder: StreamDecoder = field(default_factory=StreamDecoder)
    leader: "Resident | None" = None
    """A row whose evaluated prompt this one will share as soon as it reaches `n_shared`."""
    n_shared: int = 0
    flight: "Flight | None" = None
    """The batch that brings this row's next logits."""
    adjusters: list[Control] = field(default_factory=list)
    observers: list[Control] = field(default_factory=list)

    @property
    def n_pending(self) -> int:
        return len(self.sequence.tokens) - self.sequence.n_evaluated


@dataclass(slots=True, eq=False)
class Flight:
    """A batch that was submitted, and whose spans are in it."""

    spans: Batch
    rows: list[Resident]


class Schedule:
    """The rows in the engine and the slots that they hold."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.rows: list[Resident] = []
        self.is_tight = False
        """True since a sequence had to be evicted, until one ends."""
        self._free = list(reversed(range(engine.n_sequences)))
        self._kept: dict[int, list[int]] = {}
        """Ended prompts by slot, perhaps with their replies, the one used longest ago first: others begin alike."""

    @property
    def n_room(self) -> int:
        """Slots that are free or can be freed."""
        return len(self._free) + len(self._kept)

    @property
    def has_kept(self) -> bool:
        return bool(self._kept)

    def take_slot(self) -> int | None:
        """A free slot, at a kept prompt's cost if need be."""
        if not self._free and self._kept:
            self.drop_kept()
        return self._free.pop() if self._free else None

    def drop_kept(self) -> None:
        """Give up the kept prompt that was used longest ago."""
        slot = next(iter(self._kept))
        del self._kept[slot]
        self._free_slot(slot)

    def _free_slot(self, slot: int) -> None:
        self.engine.rewind(slot, 0)
        self._free.append(slot)

    def enter(self, row: Resident) -> None:
        """Give the row a slot, and fork the longest prefix that a kept prompt or a running row has in common with it,
        or wait for that."""
        sequence = row.sequence
        donors = self._find_kept(sequence.tokens)
        slot = self.take_slot()
        assert slot is not None, "admit looks for a slot first"
        sequence.slot = slot
        for donor, n_shared in donors:
            if donor in self._kept and not sequence.n_evaluated:  # its own slot may have had to be taken
                sequence.n_evaluated = self.engine.fork(donor, slot, n_shared)
        sequence.n_reused = min(sequence.n_evaluated, sequence.n_prompt)
        self._follow(row)
        self.rows.append(row)

    def _find_kept(self, tokens: list[int]) -> list[tuple[int, int]]:
        """Slots to fork from, and how many tokens: the kept prompt that begins most alike, of which the engine may not
        hold that part any more, and the longest one that is a beginning as a whole. They are the last used from now
        on."""
        lengths = {slot: min(_common(kept, tokens), len(tokens) - 1) for slot, kept in self._kept.items()}
        parts = {slot: n for slot, n in lengths.items() if n >= _SHORTEST_SHARED}
        wholes = {slot: n for slot, n in parts.items() if n == len(self._kept[slot])}
        found = [max(some, key=some.__getitem__) for some in (wholes, parts if self.engine.can_rewind else {}) if some]
        for slot in found:
            self._kept[slot] = self._kept.pop(slot)
        return [(slot, lengths[slot]) for slot in reversed(found)]

    def _follow(self, row: Resident) -> None:
        """Let the row wait for a running one that has, or will have, evaluated more of its prompt."""
        sequence = row.sequence
        most = len(sequence.tokens) - 1
        for other in self.rows:
            if other.probe is None:
                n_shared = min(_common(other.sequence.tokens, sequence.tokens), other.sequence.n_prompt - 1, most)
                is_reachable = self.engine.can_rewind or other.sequence.n_evaluated <= n_shared
                if n_shared >= _SHORTEST_SHARED + max(sequence.n_evaluated, row.n_shared) and is_reachable:
                    row.leader, row.n_shared = other, n_shared

    def _join_leader(self, row: Resident) -> bool:
        """True once the row has nothing to wait for."""
        leader = row.leader
        if leader is None:
            return True
        if leader in self.rows and leader.sequence.n_evaluated < row.n_shared:
            return False
        row.leader = None
        if leader in self.rows and (self.engine.can_rewind or leader.sequence.n_evaluated == row.n_shared):
            self.engine.rewind(row.sequence.slot, 0)
            row.sequence.n_evaluated = self.engine.fork(leader.sequence.slot, row.sequence.slot, row.n_shared)
            row.sequence.n_reused = min(row.sequence.n_evaluated, row.sequence.n_prompt)
        return True

    def leave(self, row: Resident) -> None:
        """Free the row's cache, or keep its prompt, and where it is continued its reply, for the next request."""
        sequence, slot = row.sequence, row.sequence.slot
        if row in self.rows:
            self.rows.remove(row)
        if slot < 0:
            return
        sequence.slot = -1
        # Thinking is not sent back, so behind it nothing of the reply will be met again at its place.
        has_reply = row.request.is_continued and not sequence.n_blocks
        n_kept = sequence.n_evaluated if has_reply else sequence.n_prompt
        is_there = sequence.n_evaluated >= sequence.n_prompt
        is_donor = row.probe is None and is_there and (self.engine.can_rewind or n_kept == sequence.n_evaluated)
        if is_donor and not self.is_tight:
            if self.engine.rewind(slot, n_kept) == n_kept:
                self._keep(slot, sequence.tokens[:n_kept])
            else:
                self._free.append(slot)
        else:
            self._free_slot(slot)
        sequence.n_evaluated = 0

    def _keep(self, slot: int, tokens: list[int]) -> None:
        """Keep a slot's tokens in the place of what they begin with, unless only that can be gone back to, or of what
        was used longest ago."""
        for other, kept in list(self._kept.items()):
            if kept == tokens or (not self.engine.is_forgetful and kept == tokens[: len(kept)]):
                del self._kept[other]
                self._free_slot(other)
        if len(self._kept) == _MOST_KEPT:
            self.drop_kept()
        self._kept[slot] = tokens

    def _checkpoint_place(self, row: Resident) -> int:
        """Where a prompt is to be kept that may not be there any more once its reply is written; 0 for nowhere."""
        is_wanted = self.engine.is_forgetful and row.request.is_continued and row.probe is None
        return max(0, row.sequence.n_prompt - _TAIL) if is_wanted else 0

    def checkpoint(self, row: Resident) -> None:
        """Keep the row's prompt where it is due and a slot is to spare; to be called when tokens were submitted."""
        sequence, n = row.sequence, row.sequence.n_evaluated
        if n == self._checkpoint_place(row) >= _SHORTEST_SHARED and self._free and not self.is_tight:
            slot = self._free.pop()
            self.engine.fork(sequence.slot, slot, n)
            self._keep(slot, sequence.tokens[:n])

    def release(self) -> None:
        """Free everything."""
        self.is_tight = True
        for row in list(self.rows):
            self.leave(row)
        while self._kept:
            self.drop_kept()

    def _prompt_room(self, is_beside: bool) -> int:
        """Most tokens of prompts in a batch, beside decoding rows or alone."""
        n_batch = self.engine.n_batch
        prompts = (row.sequence for row in self.rows if row.leader is None)
        n_fresh = sum(one.n_prompt - one.n_reused for one in prompts if one.n_evaluated < one.n_prompt)
        n_piece = piece_size(n_fresh, n_batch, self.engine.n_in_flight)
        return min(n_piece, max(1, n_batch // _PART_BESIDE)) if is_beside else n_piece

    def next_flight(self) -> Flight | None:
        """What fits into a batch of what is pending: decoding rows first, then prompts, in order of admission,
        and beside decoding rows only a part of a batch.

        Rows that wait for logits have nothing pending. Where several batches are under way at once, the decoding rows
        are spread over some of them, and one that was late waits until it can join others.
        """
        room, n_spread = self.engine.n_batch, self.engine.n_spread
        n_decoding = sum(row.n_pending <= 1 for row in self.rows)
        n_under_way = len({id(row.flight) for row in self.rows if row.flight})
        n_share = -(-n_decoding // n_spread) if n_under_way < n_spread else 0
        flight = Flight([], [])
        for row in sorted(self.rows, key=lambda row: row.n_pending > 1) if len(self.rows) > 1 else self.rows:
            if room == 0 or not row.n_pending or not self._join_leader(row):
                continue
            sequence = row.sequence
            start = sequence.n_evaluated
            if row.n_pending == 1:
                if not n_share:
                    continue
                n_share -= 1
            else:
                room = min(room, self._prompt_room(n_decoding > 0))
            end = min(len(sequence.tokens), start + room)
            for other in self.rows:  # stop where a follower wants to fork
                if other.leader is row and start < other.n_shared < end:
                    end = other.n_shared
            if start < (place := self._checkpoint_place(row)) < end:
                end = place
            is_complete = end == len(sequence.tokens)
            flight.spans.append(Span(sequence.slot, start, sequence.tokens[start:end], int(is_complete)))
            flight.rows.append(row)
            room -= end - start
        return flight if flight.rows else None


def _common(one: list[int], other: list[int]) -> int:
    """Length of the longest common prefix."""
    n = min(len(one), len(other))
    if one[:n] == other[:n]:
        return n
    return next(i for i in range(n) if one[i] != other[i])
