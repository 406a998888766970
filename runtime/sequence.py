"""One request's whole state: its token ids, where it stands in its reply, and what has been counted.

Everything that outlives one step of the decode loop stands here, so a sequence can be evicted from the
engine, or move to another engine, and go on from its tokens alone.
"""

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum


class Phase(StrEnum):
    """Where in the reply a token belongs."""

    PROMPT = "prompt"
    THINK = "think"
    ANSWER = "answer"


class Origin(StrEnum):
    """Who chose a token: the model, or a control."""

    SAMPLED = "sampled"
    FORCED = "forced"
    HINT = "hint"
    PROBE = "probe"


@dataclass(slots=True)
class Counts:
    """Tokens by kind. Thinking and answer count sampled tokens only; tags count where they are written."""

    prompt: int = 0
    thinking: int = 0
    answer: int = 0
    forced: int = 0
    hint: int = 0
    probe: int = 0


@dataclass(slots=True, eq=False)
class Sequence:
    """The mutable state of one sample of one request.

    `tokens` is the context as the engine sees it or will see it: prompt, reply, and whatever controls put in.
    `origins[i]` belongs to `tokens[n_prompt + i]`. The first `n_evaluated` tokens are in the engine's cache,
    under `slot`; -1 while the sequence holds no slot.
    """

    tokens: list[int]
    id: str = ""
    sample: int = 0
    limit: int | None = None
    """Most tokens after the prompt, of every origin but probes; None for what the context holds, which is known once
    it is decoded."""
    room: int | None = None
    """Most tokens after the prompt that the context holds, once it is decoded."""
    n_thinking_left: int | None = None
    """Sampled thinking tokens until a budget cuts, so that nothing is put in right before; None without a budget."""

    n_prompt: int = 0
    origins: list[Origin] = field(default_factory=list)
    slot: int = -1
    n_evaluated: int = 0
    n_reused: int = 0
    """Tokens of the prompt that another sequence had evaluated when this one entered the engine."""
    forced: deque[tuple[int, Origin]] = field(default_factory=deque)

    phase: Phase = Phase.PROMPT
    n_blocks: int = 0
    """Thinking blocks opened so far in the reply."""
    n_block_thinking: int = 0
    """Sampled thinking tokens in the current block."""
    closed_at: int | None = None
    """Index into `tokens` of the first token of the latest closing tag; None while no block was closed."""
    closed_kept: str = ""
    """Text of that first token that stands before the tag."""
    is_closing: bool = False
    """True only while controls observe the token that completed a closing tag."""
    is_ending: bool = False
    """True only while controls observe an end-of-generation token."""
    is_whole_text: bool = True
    """False while the reply ends inside a multi-byte character."""
    is_in_tag: bool = False
    """True while the reply ends in what may be the beginning of a tag."""

    thinking: str = ""
    answer: str = ""
    counts: Counts = field(default_factory=Counts)
    is_cut: bool = False
    """True where a control, not the model, wrote the latest closing tag."""
    is_hurried: bool = False
    cancelled: str | None = None
    """The reason to end before the next step, once somebody asked for it."""
    finish: str | None = None

    def __post_init__(self) -> None:
        self.n_prompt = len(self.tokens)
        self.counts.prompt = self.n_prompt

    @property
    def n_reply(self) -> int:
        """Tokens after the prompt, of every origin."""
        return len(self.tokens) - self.n_prompt

    @property
    def is_full(self) -> bool:
        """True where the limit leaves no room for another token."""
        return self.limit is not None and self.n_reply >= self.limit

    @property
    def is_thinking(self) -> bool:
        return self.phase is Phase.THINK

    def hurry(self) -> None:
        """Ask for the answer now: a budget control closes the thinking at the next whole character."""
        self.is_hurried = True

    def cancel(self, reason: str = "cancelled") -> None:
        """Ask the loop to end this sequence before its next step and to free its cache."""
        self.cancelled = self.cancelled or reason
