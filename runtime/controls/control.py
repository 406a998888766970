"""What a control is, what it may ask of the decode loop, and how its parameters are described."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ..engine import Row
from ..errors import ControlError
from ..formats import ThinkingFormat
from ..sequence import Origin, Sequence
from ..tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Bias:
    """Added to the logits of some ids in this step only; `-inf` bans them. Never leaves a step without candidates."""

    ids: NDArray[np.intp]
    value: float = -np.inf


@dataclass(frozen=True, slots=True)
class Force:
    """The next tokens, whatever the model would sample. An urgent one discards what waits to be forced."""

    tokens: tuple[int, ...]
    origin: Origin = Origin.FORCED
    is_urgent: bool = False


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A new context from `position` on, as ids with their origins. Taking back a closing tag reopens the block.

    The reader has seen the text of what is kept, so nothing is sent again. New are only hints, which stay unseen, and
    other ids for text that stood there, such as what an id had before the tag that began in it.
    """

    position: int
    tokens: tuple[tuple[int, Origin], ...] = ()


@dataclass(frozen=True, slots=True)
class Probe:
    """Fork the sequence, append `tokens` there, and decode greedily until `is_done(text)`, a newline, an end of
    generation, `n_max` tokens or the end of the context; the control then reads what came, beside the running sequence
    or, without a free slot, nothing at once."""

    tokens: tuple[int, ...]
    n_max: int
    is_done: Callable[[str], bool]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a probe gave: its pieces of text and the entropy in nats of each row they were taken from."""

    texts: tuple[str, ...]
    entropies: tuple[float, ...]
    is_done: bool


@dataclass(frozen=True, slots=True)
class Stop:
    """The end of this sequence, or of another one."""

    reason: str
    sequence: Sequence | None = None


@dataclass(frozen=True, slots=True)
class Note:
    """Something a reader may want to know."""

    text: str


Action = Force | Rewrite | Probe | Stop | Note


@dataclass(frozen=True, slots=True)
class Parameters:
    """Parameters of one control; fields are made by `parameter`. Raises ControlError for a value out of range."""

    control: ClassVar[str]

    def __post_init__(self) -> None:
        for item in fields(self):
            value, low, high = getattr(self, item.name), item.metadata.get("min"), item.metadata.get("max")
            choices = item.metadata.get("choices")
            # Not `value < low`, which NaN would pass.
            if not ((low is None or value >= low) and (high is None or value <= high)):
                limit = f"from {low} to {high}" if high is not None else f"{low} or more"
                raise ControlError(f"{self.control}: {item.name} is {value}; give a value {limit}")
            if choices and value not in choices:
                raise ControlError(f"{self.control}: {item.name} is {value!r}; choose one of {', '.join(choices)}")


def parameter(
    default: Any, help: str, min: float | None = None, max: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """A field of a control's parameters, with what `localreason controls` shows and what is checked."""
    return field(default=default, metadata={"help": help, "min": min, "max": max, "choices": choices})


@dataclass(frozen=True, slots=True)
class Setup:
    """What a control may know when it is made for a sequence."""

    tokenizer: Tokenizer
    format: ThinkingFormat
    seed: int = 0
    can_rewind: bool = True
    is_thinking: bool = True
    """Whether the reply is to be thought about."""
    memo: dict[object, Any] = field(default_factory=dict)
    """Kept as long as the model: what a control derives from the vocabulary is derived once."""


class Control:
    """One instance per sequence, or one for all samples of a question where `is_shared`. All methods are optional.

    The loop calls `adjust` before a token is sampled, with the raw logits; `observe` after a token joined the
    sequence, sampled or forced; both only look, and return what the loop is to do.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    Parameters: ClassVar[type[Parameters]]
    is_shared: ClassVar[bool] = False

    def __init__(self, parameters: Any, setup: Setup) -> None:
        self.parameters = parameters
        self.setup = setup
        self.counters: dict[str, int | float] = {}

    @classmethod
    def instruct(cls, parameters: Any) -> str:
        """A sentence to add to the user's message, or nothing."""
        return ""

    def begin(self, sequence: Sequence) -> Iterable[Action]:
        """Before the prompt is evaluated."""
        return ()

    def adjust(self, sequence: Sequence, logits: Row) -> Bias | None:
        """Before sampling; `logits` are the model's own and must not be written to."""
        return None

    def observe(self, sequence: Sequence, token: int) -> Iterable[Action]:
        """After `token` joined the sequence."""
        return ()

    def read(self, sequence: Sequence, reading: Reading) -> Iterable[Action]:
        """A probe of this control has ended."""
        return ()

    def end(self, sequence: Sequence) -> Iterable[Action]:
        """The sequence has ended; `sequence.finish` tells why."""
        return ()
