"""What a decode yields. Every event names its sequence, so that many can be told apart in one stream."""

from collections.abc import Mapping
from dataclasses import dataclass

from .sequence import Origin, Phase, Sequence


@dataclass(frozen=True, slots=True)
class Prefilled:
    """A part of a long prompt was evaluated; between two of these a decode can be closed."""

    sequence: Sequence
    n_done: int
    n_total: int


@dataclass(frozen=True, slots=True)
class Token:
    """One token joined the context (or, for a probe, a side sequence).

    `text` is what became readable with it: empty while a character or a possible tag is incomplete, and always
    empty for hints and probes, which no reader sees. `phase` is the phase of `text`.
    """

    sequence: Sequence
    id: int
    text: str
    phase: Phase
    origin: Origin
    is_continued: bool = False
    """True for more text of a token that was reported before: it ended one phase and began the next, or the
    reply ended with its text held back. Not another token."""


@dataclass(frozen=True, slots=True)
class Noted:
    """A control did something that a reader may want to know."""

    sequence: Sequence
    control: str
    text: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A sequence ended: `end` (the model's own), `length`, `context`, `lost` (another sample won), or for the reason
    that `Sequence.cancel` was given. `counters` maps each control's name to its counters."""

    sequence: Sequence
    reason: str
    counters: Mapping[str, Mapping[str, int | float]]


Event = Prefilled | Token | Noted | Finished
