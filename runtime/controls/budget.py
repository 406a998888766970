"""Budget forcing: thinking of at least, at most, or longer than the model wants.

Source: "s1: Simple test-time scaling" (arXiv 2501.19393), README rule: the remaining budget goes down over all rounds.
Where we deviate: `Wait` starts a line of its own when the text before it does not end in white space; a cut waits
for a whole character and prefers a line end shortly before the limit; a repeated 64-gram may count as the limit; an
end of generation inside the block closes the block and leads to the answer instead of losing it, and so does the limit
of the whole reply, or of the context, before it is reached.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..engine import Row
from ..errors import ControlError
from ..formats import ThinkingFormat
from ..sequence import Origin, Phase, Sequence
from ..tokenizer import Tokenizer
from .control import Action, Bias, Control, Force, Note, Parameters, Rewrite, Setup, parameter

_N_ANSWER = 128
"""Most tokens that are kept for the answer where the whole reply has a limit, and a quarter of that at most."""
_N_BROKEN = 8
"""Tokens past the limit that a character may stay incomplete before the cut is made all the same."""


@dataclass(frozen=True, slots=True)
class BudgetParameters(Parameters):
    control: ClassVar[str] = "budget"
    max: int = parameter(4096, "most sampled thinking tokens in one block; 0 answers at once", 0)
    total: int = parameter(0, "most sampled thinking tokens in the whole reply; 0 for the same as max", 0)
    min: int = parameter(0, "thinking tokens below which the end of thinking is replaced by the wait text", 0)
    ignore: int = parameter(0, "how many times the end of thinking is replaced by the wait text", 0, 100)
    wait: str = parameter("Wait", "text that replaces an ignored end; empty to only drop the end")
    lead: bool = parameter(True, "write the format's final-answer lead-in behind a close that the model did not write")
    slack: int = parameter(32, "cut at a line end this many tokens before the limit", 0)
    repeat: int = parameter(0, "cut when this many tokens stand twice in a block; 0 never looks", 0)

    def __post_init__(self) -> None:
        Parameters.__post_init__(self)
        if self.min > self.max or (self.total and self.min > self.total):
            limit = self.max if self.min > self.max else self.total
            raise ControlError(f"budget: min is {self.min}, above the most thinking of {limit}; lower min or raise max")


class BudgetForcing(Control):
    name = "budget"
    summary = "thinking is cut at a limit, or goes on past the end that the model wants"
    source = "s1, arXiv 2501.19393"
    Parameters = BudgetParameters
    parameters: BudgetParameters

    def __init__(self, parameters: BudgetParameters, setup: Setup) -> None:
        super().__init__(parameters, setup)
        self.counters = {"ignored": 0, "cuts": 0, "closed_at_end": 0}
        self._min, self._max = parameters.min, parameters.max
        self._total = parameters.total or parameters.max
        self._n_closing = len(self._closing())
        self._is_cutting = False
        self._is_ban_due = False
        self._seen: set[int] = set()
        self._n_blocks = 0

    def begin(self, sequence: Sequence) -> Iterable[Action]:
        return self._limit(sequence)

    def adjust(self, sequence: Sequence, logits: Row) -> Bias | None:
        if not self._is_ban_due:
            return None
        self._is_ban_due = False  # s1's min_tokens = 1: the end may not come straight back
        return Bias(self._stop_ids())

    def observe(self, sequence: Sequence, token: int) -> Iterable[Action]:
        if not sequence.is_thinking:
            is_own = sequence.is_closing and not self._is_cutting and sequence.origins[-1] is Origin.SAMPLED
            self._is_cutting = False
            return self._ignore(sequence, sequence.closed_at, sequence.closed_kept) if is_own else ()
        if self._is_cutting:
            return ()
        if sequence.is_ending:
            return self._ended(sequence)
        return self._limit(sequence)

    def remaining(self, sequence: Sequence) -> int:
        """Sampled thinking tokens until the limit, as it stands now. Where the limit of the whole reply is near, what
        is written at a cut and an answer have to have room."""
        own = min(self._max - sequence.n_block_thinking, self._total - sequence.counts.thinking)
        if sequence.limit is None or sequence.limit <= self._n_closing:  # no cut would fit
            return own
        return min(own, sequence.limit - min(_N_ANSWER, sequence.limit // 4) - self._n_closing - sequence.n_reply)

    def extend(self, sequence: Sequence, n_tokens: int) -> bool:
        """Let a running sequence think for about `n_tokens` more: an earlier end is ignored, limits that are nearer
        are raised, that of the reply by as much, so that the answer keeps its room. For any thread. False where it does
        not think any more, and nothing changes."""
        if self._is_cutting or sequence.finish or sequence.phase is Phase.ANSWER:
            return False
        sequence.is_hurried = False
        self._min = max(self._min, sequence.counts.thinking + n_tokens)
        n_missing = n_tokens - self.remaining(sequence)
        if n_missing > 0:
            self._max += n_missing
            self._total += n_missing
        if sequence.limit is not None:
            sequence.limit += n_tokens
            if sequence.room is not None:  # else the context would end the reply inside the thinking
                sequence.limit = min(sequence.limit, sequence.room)
        return True

    def _limit(self, sequence: Sequence) -> Iterable[Action]:
        """The cut, if it is due."""
        remaining = sequence.n_thinking_left = self.remaining(sequence)
        if not sequence.is_thinking:
            return ()
        if remaining <= 0 or sequence.is_hurried:
            is_due = sequence.is_whole_text or remaining <= -_N_BROKEN
            reason = "answer asked for" if sequence.is_hurried else "limit"
        else:
            longest = min(self._max, self._total, sequence.n_block_thinking + remaining)
            slack = min(self.parameters.slack, longest // 8)
            is_line_end = remaining <= slack and sequence.thinking.endswith("\n") and sequence.n_block_thinking > 0
            is_line_end &= sequence.counts.thinking >= self._min
            is_due, reason = (
                (True, "line end near the limit") if is_line_end else (self._repeats(sequence), "repetition")
            )
        return self._cut(sequence, reason) if is_due else ()

    def _cut(self, sequence: Sequence, reason: str) -> Iterable[Action]:
        self._is_cutting = True
        self.counters["cuts"] += 1
        return (
            Force(self._closing(sequence.thinking), is_urgent=True),
            Note(f"thinking cut after {sequence.counts.thinking} tokens: {reason}"),
        )

    def _closing(self, thinking: str = "") -> tuple[int, ...]:
        lead = self.setup.format.lead if self.parameters.lead else ""
        return closing(self.setup.format, self.setup.tokenizer, lead, thinking)

    def _ended(self, sequence: Sequence) -> Iterable[Action]:
        """The model ended its reply inside the block: ignore it, or close the block so that an answer follows."""
        position = len(sequence.tokens) - 1
        ignored = self._ignore(sequence, position, "")
        if ignored:
            return ignored
        self._is_cutting = True
        self.counters["closed_at_end"] += 1
        return (
            Rewrite(position),
            Force(self._closing(sequence.thinking), is_urgent=True),
            Note("the reply ended inside the thinking: block closed"),
        )

    def _ignore(self, sequence: Sequence, position: int | None, kept: str) -> tuple[Action, ...]:
        """Take an end of thinking back and write the wait text in its place, if that is due."""
        is_short = sequence.counts.thinking < self._min
        is_wanted = self.counters["ignored"] < self.parameters.ignore
        if position is None or not (is_short or is_wanted) or self.remaining(sequence) <= 0 or sequence.is_hurried:
            return ()
        self.counters["ignored"] += 1
        self._is_ban_due = True
        tokens = tuple((token, Origin.SAMPLED) for token in self.setup.tokenizer.encode(kept)) if kept else ()
        gap = "" if not sequence.thinking or sequence.thinking[-1].isspace() else "\n"
        wait = self.setup.tokenizer.encode(gap + self.parameters.wait) if self.parameters.wait else []
        return (
            Rewrite(position, tokens),
            Force(tuple(wait)),
            Note(f"end of thinking ignored ({self.counters['ignored']}) after {sequence.counts.thinking} tokens"),
        )

    def _stop_ids(self) -> NDArray[np.intp]:
        """First ids of the closing tags, and all ends of generation."""
        tokenizer, key = self.setup.tokenizer, ("budget", self.setup.format.name)
        if key not in self.setup.memo:
            ends = [token for token in range(tokenizer.n_vocab) if tokenizer.is_end(token)]
            tags = [tokenizer.encode(tag, special=True)[0] for tag in self.setup.format.closes]
            self.setup.memo[key] = np.unique(np.array(ends + tags, dtype=np.intp))
        return self.setup.memo[key]

    def _repeats(self, sequence: Sequence) -> bool:
        n = self.parameters.repeat
        if self._n_blocks != sequence.n_blocks:
            self._n_blocks = sequence.n_blocks
            self._seen.clear()
        if not n or sequence.n_block_thinking < n:
            return False
        key = hash(tuple(sequence.tokens[-n:]))
        if key in self._seen:
            return True
        self._seen.add(key)
        return False


def closing(format: ThinkingFormat, tokenizer: Tokenizer, lead: str, thinking: str = "") -> tuple[int, ...]:
    """The tokens that end a block of thinking, with the lead to the answer."""
    newline = "" if thinking.endswith("\n") else "\n"
    return tuple(tokenizer.encode(newline + format.close.lstrip("\n") + lead, special=True))
