"""A batch on its way around the ring."""

import time
from dataclasses import dataclass, field
from enum import Enum, auto

from ..runtime.engine import Batch
from .wire import ring_pb2 as wire


class Purpose(Enum):
    """Why a batch is on its way."""

    ASKED = auto()
    REPLAY = auto()
    """It is evaluated again for a new ring, and in the journal's base already."""
    GUESS = auto()
    """It may be asked for next; the journal does not have it."""
    VOID = auto()
    """A guess that was wrong: the step behind it forgets it."""


@dataclass(slots=True, eq=False)
class Flight:
    """A batch, and what is done to the caches before it."""

    batch: Batch
    operations: list[wire.Operation]
    purpose: Purpose = Purpose.ASKED
    n_known_by: int = 0
    """Of a guess, the tokens before it that it is known by."""
    before: "Flight | None" = None
    """Of a guess, the step that it was sent right behind, while nothing else was under way."""
    is_alone: bool = False
    """True where nothing else was under way, before it or behind it."""
    sent: float = field(default_factory=time.perf_counter)
    came: float = 0.0
    """When it reached the head's last window."""
    taken: float = 0.0
    """When the head began with that."""
