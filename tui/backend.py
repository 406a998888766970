"""What the chat needs of whoever builds it: models to choose from, one of them opened, the machines of the ring."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from .delta import StreamEvent
from .starter import Suggestion
from .stream import Streamer
from .widgets.nodes import NodeState


@dataclass(frozen=True, slots=True)
class Opened:
    """A model ready to talk. `note` is what is to be known of its weights, one sentence or nothing."""

    name: str
    streamer: Streamer
    note: str = ""


class Backend(Protocol):
    """Blocking calls, made from a thread that is not the screen's, but `nodes` and `is_placing`, which are quick."""

    def suggestions(self) -> list[Suggestion]:
        """The models that are here or can be fetched, the best for this machine first."""
        ...

    def open(
        self,
        name: str,
        on_event: Callable[[StreamEvent], object],
        on_progress: Callable[[str, int, int], object],
    ) -> Opened:
        """Close what is open, fetch the model where it is not here, and open it. `on_progress` gets what goes on, and
        the bytes done and in all, both 0 where that is not known. Raises LocalReasonError."""
        ...

    def nodes(self) -> tuple[NodeState, ...]:
        """The machines of the ring in the order of their layers; empty without a ring."""
        ...

    def is_placing(self) -> bool:
        """Whether the layers were found to be placed anew by the latest `nodes`: no token comes until they are."""
        ...

    def close(self) -> None:
        """Close what is open."""
        ...
