"""Follows think and answer in decoded text, across token borders, and holds back what may be part of a tag."""

from collections import deque

from .formats import ThinkingFormat
from .markup import n_begun
from .sequence import Phase
from .tokenizer import StreamDecoder


class PhaseTracker:
    """Reads a reply piece by piece. `prompt_tail` is the generation prompt: a tag prefilled there counts, tags in
    earlier turns do not."""

    def __init__(self, format: ThinkingFormat, prompt_tail: str = "") -> None:
        self._format = format
        self._decoder = StreamDecoder()
        self._pending = ""
        self._places: deque[tuple[int, str, int]] = deque()
        """Token index, text of the token, and how many of its last characters are pending."""
        self._has_answer = False
        self.phase = Phase.ANSWER
        self.n_blocks = 0
        self.closed_at: int | None = None
        self.closed_kept = ""
        self._read(prompt_tail, -1, is_final=True)
        self._pending, self._has_answer = "", False
        self._places.clear()
        self.closed_at, self.closed_kept = None, ""

    @property
    def is_whole_text(self) -> bool:
        """True where no character is incomplete."""
        return self._decoder.is_whole

    @property
    def is_in_tag(self) -> bool:
        """True where something is held back that may begin a tag."""
        return bool(self._pending)

    def feed(self, piece: bytes, index: int) -> list[tuple[str, Phase]]:
        """The text that becomes visible with the token at `index`, with the phase of each part."""
        return self._read(self._decoder.feed(piece), index)

    def rest_of_tag(self, piece: bytes) -> str:
        """Where a piece would end the thinking and begin the answer at once: its text up to the end of the tag. Else
        an empty text."""
        if self.phase is Phase.THINK:
            text = self._pending + piece.decode("utf-8", "replace")
            for tag in self._format.closes:
                end = text.find(tag) + len(tag)
                if tag in text and text[end:].strip():
                    return text[len(self._pending) : end]
        return ""

    def flush(self) -> list[tuple[str, Phase]]:
        """What was held back, once the reply has ended."""
        parts = self._read(self._decoder.flush(), -1, is_final=True)
        self._emit(len(self._pending), parts)
        return parts

    def reopen(self) -> None:
        """Take the latest closing tag back: the block goes on."""
        self.phase = Phase.THINK
        self._decoder = StreamDecoder()  # half a character behind the tag is taken back with it
        self._pending = ""
        self._places.clear()
        self._has_answer = False
        self.closed_at, self.closed_kept = None, ""

    def _tags(self) -> tuple[str, ...]:
        if self.phase is Phase.THINK:
            return self._format.closes
        # Models repeat the closing tag after a forced close: at the start of an answer it is swallowed.
        return self._format.opens if self._has_answer else self._format.opens + self._format.closes

    def _read(self, text: str, index: int, is_final: bool = False) -> list[tuple[str, Phase]]:
        parts: list[tuple[str, Phase]] = []
        if text:
            self._pending += text
            self._places.append((index, text, len(text)))
        while self._pending:
            found = self._find()
            if found is None:
                self._emit(len(self._pending) - self._n_held(), parts)
                return parts
            start, tag = found
            self._emit(start, parts)
            if self._may_grow(tag) and not is_final:
                return parts
            self._turn(tag)
        return parts

    def _find(self) -> tuple[int, str] | None:
        """The earliest tag in what is pending, the longest of those that begin there."""
        found = [(self._pending.find(tag), tag) for tag in self._tags() if tag in self._pending]
        if self.phase is Phase.ANSWER:  # a closing tag behind text of the answer is text itself
            opens = self._format.opens
            found = [(start, tag) for start, tag in found if tag in opens or not self._pending[:start].strip()]
        return min(found, key=lambda item: (item[0], -len(item[1]))) if found else None

    def _may_grow(self, tag: str) -> bool:
        """True where more text could make a longer tag of the one at the head of what is pending."""
        rest = self._pending
        return any(len(other) > len(tag) and other.startswith(rest) and other != rest for other in self._tags())

    def _n_held(self) -> int:
        """Characters at the end of what is pending that may begin a tag."""
        return max((n_begun(self._pending, tag) for tag in self._tags()), default=0)

    def _emit(self, n: int, parts: list[tuple[str, Phase]]) -> None:
        if n > 0:
            text = self._pending[:n]
            parts.append((text, self.phase))
            self._drop(n)
            if self.phase is Phase.ANSWER and not text.isspace():
                self._has_answer = True

    def _drop(self, n: int) -> None:
        self._pending = self._pending[n:]
        while n > 0:
            index, text, n_left = self._places.popleft()
            if n_left > n:
                self._places.appendleft((index, text, n_left - n))
            n -= n_left

    def _turn(self, tag: str) -> None:
        """Take the tag at the head of what is pending."""
        if self.phase is Phase.THINK:
            self.closed_at, text, n_left = self._places[0]
            # A token may hold text before the tag; taking the tag back must keep that text.
            self.closed_kept = text[: len(text) - n_left]
            self.phase = Phase.ANSWER
            self._has_answer = False
        elif tag in self._format.opens:
            self.phase = Phase.THINK
            self.n_blocks += 1
        self._drop(len(tag))
