"""ConciseHint: a short request to be concise, put into the thinking at growing intervals.

Source: arXiv 2506.18810 and its repository (run_main.py, utils.py). Where we deviate: only while thinking; never
inside code, an open formula or a half-written tag; positions and lengths count this model's own tokens; the length that
sets the interval is the sampled thinking, hints excluded; user-turn marks are those of the model's family. On models
that cannot rewind the hint goes behind the first clause or line that ends after the interval.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ..markup import in_code_or_formula
from ..sequence import Origin, Sequence
from .control import Action, Control, Force, Note, Parameters, Rewrite, Setup, parameter

_N_BEFORE_CUT = 64
_SPAN = 1024
"""Chunk length over which the hint moves from the head of the chunk towards its tail (section 2.1)."""
_ADAPTIVE = "Let the length of your thinking follow the difficulty of the question: be short where it is easy."


@dataclass(frozen=True, slots=True)
class HintParameters(Parameters):
    control: ClassVar[str] = "hint"
    alpha: int = parameter(128, "tokens of the first interval", 1)
    beta: float = parameter(0.2, "growth of the interval per thinking token", 0.0, 10.0)
    interval: int = parameter(1024, "longest interval in tokens", 1)
    position: float = parameter(0.8, "largest fraction of the chunk that stands before the hint", 0.0, 1.0)
    text: str = parameter("make answer concise!", "the hint")
    prompt: bool = parameter(False, "also ask in the question for thinking as long as the question is hard (AdaP)")


class ConciseHint(Control):
    name = "hint"
    summary = "hints to be concise are put into the thinking; the reader does not see them"
    source = "ConciseHint, arXiv 2506.18810"
    Parameters = HintParameters
    parameters: HintParameters

    def __init__(self, parameters: HintParameters, setup: Setup) -> None:
        super().__init__(parameters, setup)
        self.counters = {"hints": 0, "recomputed": 0, "missed": 0}
        self._interval = min(parameters.alpha, parameters.interval)
        self._n_thinking = 0
        self._start: int | None = None
        self._block_at = 0
        self._n_blocks = 0
        self._hint = self._encode()

    @classmethod
    def instruct(cls, parameters: HintParameters) -> str:
        return _ADAPTIVE if parameters.prompt else ""

    def observe(self, sequence: Sequence, token: int) -> Iterable[Action]:
        if not sequence.is_thinking:
            return ()
        if self._start is None or sequence.n_blocks != self._n_blocks:
            self._n_blocks = sequence.n_blocks
            self._start = self._block_at = len(sequence.tokens) - 1
            self._n_thinking = sequence.counts.thinking - 1
        if sequence.counts.thinking - self._n_thinking < self._interval:
            return ()
        if sequence.forced or sequence.is_ending or sequence.origins[-1] is not Origin.SAMPLED:
            return ()  # never inside forced text: look again at the next token
        if sequence.is_in_tag or not (self.setup.can_rewind or self._is_place(sequence)):
            return ()
        if self._is_near_cut(sequence) or self._is_near_limit(sequence):
            return ()
        return self._splice(sequence)

    def _is_near_cut(self, sequence: Sequence) -> bool:
        return sequence.n_thinking_left is not None and sequence.n_thinking_left <= _N_BEFORE_CUT

    def _is_near_limit(self, sequence: Sequence) -> bool:
        return sequence.limit is not None and sequence.limit - sequence.n_reply <= len(self._hint)

    def _splice(self, sequence: Sequence) -> Iterable[Action]:
        assert self._start is not None
        start, chunk = self._start, self._interval
        place = self._place(sequence, start) if self.setup.can_rewind else len(sequence.tokens)
        self._n_thinking = sequence.counts.thinking
        self._interval = min(
            self.parameters.interval, int(self.parameters.alpha + self.parameters.beta * sequence.counts.thinking)
        )
        if place is None:
            self._start = len(sequence.tokens)
            self.counters["missed"] += 1
            return ()
        self._start = len(sequence.tokens) + len(self._hint)
        self.counters["hints"] += 1
        note = Note(f"hint put in after {sequence.counts.thinking} thinking tokens (chunk of {chunk})")
        if not self.setup.can_rewind:
            return (Force(self._hint, Origin.HINT), note)
        n_prompt = sequence.n_prompt
        tail = tuple(zip(sequence.tokens[place:], sequence.origins[place - n_prompt :], strict=True))
        self.counters["recomputed"] += len(tail)
        return (Rewrite(place, tuple((token, Origin.HINT) for token in self._hint) + tail), note)

    def _is_place(self, sequence: Sequence) -> bool:
        """Whether the end of the text is a place for a hint: behind a clause or a line, outside code and formulas."""
        is_end = sequence.thinking.endswith((".", ",", "\n")) and sequence.is_whole_text
        return is_end and not in_code_or_formula(sequence.thinking)

    def _place(self, sequence: Sequence, start: int) -> int | None:
        """Index of the token before which the hint goes: behind `.` or `,` that a space follows, from the chunk's
        fraction on; None if there is no such place outside code and formulas."""
        tokens, piece = sequence.tokens, self.setup.tokenizer.piece
        share = min(max(self._interval - 128, 0) / _SPAN, self.parameters.position)
        first = max(start, sequence.n_prompt) + int(share * (len(tokens) - start))
        text = b"".join(
            piece(token)
            for token, origin in zip(
                tokens[self._block_at : first], sequence.origins[self._block_at - sequence.n_prompt :], strict=False
            )
            if origin is not Origin.HINT
        )
        for index in range(first, len(tokens) - 1):
            here = piece(tokens[index])
            text += here
            if here.endswith((b".", b",")) and piece(tokens[index + 1]).startswith(b" "):
                is_sampled = sequence.origins[index - sequence.n_prompt] is Origin.SAMPLED
                if is_sampled and not in_code_or_formula(text.decode("utf-8", "replace")):
                    return index + 1
        return None

    def _encode(self) -> tuple[int, ...]:
        # The family's turn marks are ours and parsed as such; the hint itself may be a user's and is plain text.
        before, _, after = self.setup.format.user_hint.partition("{hint}")
        encode = self.setup.tokenizer.encode
        return (*encode(before, special=True), *encode(self.parameters.text), *encode(after, special=True))
