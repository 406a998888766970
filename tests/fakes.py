"""An engine that follows a script and a tokenizer of bytes: whole decodes without weights, checked at each call."""

from collections import deque
from collections.abc import Callable

import numpy as np

from localreason.runtime.engine import Batch, Logits
from localreason.runtime.errors import ContextFull

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Next = Callable[[list[int]], int | dict[int, float]]
"""From the tokens of a sequence to the token that follows, or to logits by id (the rest at -20)."""


class ByteTokenizer:
    """Ids 0..255 are bytes; then come control tokens, then whole words, longest match first."""

    END = 256

    def __init__(self, words: list[str] | None = None, marks: list[str] | None = None) -> None:
        self.marks = ["<|end|>", "<think>", "</think>", *(marks or [])]
        self._pieces = [bytes([i]) for i in range(256)] + [m.encode() for m in self.marks]
        self._words = {}
        for word in words or []:
            self._words[word.encode()] = len(self._pieces)
            self._pieces.append(word.encode())
        self.n_vocab = len(self._pieces)

    def encode(self, text: str, special: bool = False, is_first: bool = False) -> list[int]:
        return self.encode_bytes(text.encode(), special)

    def encode_bytes(self, data: bytes, special: bool) -> list[int]:
        ids: list[int] = []
        known = dict(self._words)
        if special:
            known |= {mark.encode(): 256 + i for i, mark in enumerate(self.marks)}
        while data:
            best = max((word for word in known if data.startswith(word)), key=len, default=None)
            ids.append(known[best] if best else data[0])
            data = data[len(best) if best else 1 :]
        return ids

    def piece(self, token: int) -> bytes:
        return self._pieces[token]

    def is_end(self, token: int) -> bool:
        return token == self.END

    def text(self, tokens: list[int]) -> str:
        return b"".join(map(self.piece, tokens)).decode("utf-8", "replace")


class ScriptedEngine:
    """Gives the logits that `next_token` says, and fails on any call that a real cache could not serve."""

    def __init__(
        self,
        next_token: Next,
        n_vocab: int,
        n_context: int = 100_000,
        n_sequences: int = 8,
        n_batch: int = 128,
        can_rewind: bool = True,
        is_forgetful: bool = False,
        n_in_flight: int = 1,
        n_spread: int | None = None,
    ) -> None:
        self.next_token = next_token
        self.n_vocab = n_vocab
        self.n_context = n_context
        self.n_context_sequence = n_context
        self.n_sequences = n_sequences
        self.n_batch = n_batch
        self.notes = ()
        self.can_rewind = can_rewind
        self.is_forgetful = is_forgetful or not can_rewind
        """What a sequence held before it became longer is gone."""
        self.n_in_flight, self.n_spread = n_in_flight, n_spread or n_in_flight
        self.results: deque[Logits] = deque()
        self.n_requests = 0
        self.held: list[list[int]] = [[] for _ in range(n_sequences)]
        self.shared = [0] * n_sequences
        self.batches: list[Batch] = []
        self.calls: list[tuple] = []

    @property
    def n_used(self) -> int:
        return sum(len(tokens) - shared for tokens, shared in zip(self.held, self.shared, strict=True))

    def begin_request(self) -> None:
        self.n_requests += 1

    def submit(self, batch: Batch) -> None:
        assert len(self.results) < self.n_in_flight
        self.results.append(self._evaluate(batch))

    def collect(self) -> Logits:
        return self.results.popleft()

    def discard(self) -> None:
        self.results.clear()

    def _evaluate(self, batch: Batch) -> Logits:
        assert batch, "an empty batch aborts llama.cpp"
        assert sum(len(span.tokens) for span in batch) <= self.n_batch
        assert len({span.sequence_id for span in batch}) == len(batch)
        if self.n_used + sum(len(span.tokens) for span in batch) > self.n_context:
            raise ContextFull("full")
        rows = []
        for span in batch:
            tokens = self.held[span.sequence_id]
            assert span.position == len(tokens), "a hole or an overlap in the cache"
            assert span.tokens
            for i, token in enumerate(span.tokens):
                tokens.append(token)
                if i >= len(span.tokens) - span.n_logits:
                    rows.append(self._row(tokens))
        self.batches.append(batch)
        return np.array(rows, dtype=np.float32).reshape(-1, self.n_vocab)

    def _row(self, tokens: list[int]) -> np.ndarray:
        row = np.full(self.n_vocab, -20.0, dtype=np.float32)
        wanted = self.next_token(tokens)
        for token, value in (wanted if isinstance(wanted, dict) else {wanted: 20.0}).items():
            row[token] = value
        return row

    def fork(self, source: int, target: int, n_tokens: int) -> int:
        assert source != target
        assert not self.held[target]
        assert n_tokens <= len(self.held[source])
        assert self.can_rewind or n_tokens == len(self.held[source])
        if self.is_forgetful and n_tokens < len(self.held[source]):
            n_tokens = 0
        self.held[target] = self.held[source][:n_tokens]
        self.shared[target] = n_tokens
        self.calls.append(("fork", source, target, n_tokens))
        return n_tokens

    def rewind(self, sequence_id: int, n_tokens: int) -> int:
        assert n_tokens <= len(self.held[sequence_id])
        assert self.can_rewind or n_tokens in (0, len(self.held[sequence_id]))
        if self.is_forgetful and n_tokens < len(self.held[sequence_id]):
            n_tokens = 0
        del self.held[sequence_id][n_tokens:]
        self.shared[sequence_id] = min(self.shared[sequence_id], n_tokens)
        self.calls.append(("rewind", sequence_id, n_tokens))
        return n_tokens

    def close(self) -> None:
        pass


def script(tokenizer: ByteTokenizer, replies: dict[str, str], invisible: str = "\0") -> Next:
    """Follows the reply whose anchor stands last in the context, then ends.

    The anchor is any text, the prompt's or one that a control writes; what is written behind it must be a beginning
    of its reply, apart from `invisible` text, else the script has nothing to say and the test fails.
    """

    known = {anchor.encode(): reply.encode() for anchor, reply in replies.items()}
    hidden = invisible.encode()

    def next_token(tokens: list[int]) -> int:
        text = b"".join(map(tokenizer.piece, tokens)).replace(hidden, b"")
        end, anchor = max((text.rfind(anchor) + len(anchor), anchor) for anchor in known if anchor in text)
        written, reply = text[end:], known[anchor]
        assert reply.startswith(written), f"{written!r} is not a beginning of {reply!r}"
        return tokenizer.encode_bytes(reply[len(written) :], True)[0] if written != reply else tokenizer.END

    return next_token
