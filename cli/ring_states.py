"""The machines of a ring as the chat shows them, from its placement as it changes."""

import contextlib
import time
from collections.abc import Callable, Mapping

from ..cluster.errors import ClusterError
from ..cluster.formation import HEAD, Placement
from ..cluster.node import BEAT_SECONDS
from ..cluster.placing import HEAD_NAME
from ..cluster.ring import RingEngine
from ..runtime.engine import Engine
from ..tui.widgets.nodes import NodeState, State
from .config import Config


class RingStates:
    """Follows one ring; `links` are seconds of one way by name."""

    def __init__(
        self, engine: RingEngine, links: Mapping[str, float], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engine = engine
        self._links = links
        self._lost: set[str] = set()
        self._back: set[str] = set()
        self._known: tuple[NodeState, ...] = ()
        self._placement: Placement | None = None
        self.is_placing = False
        """Whether the layers were being placed anew at the latest look, or have been since the one before it."""
        self._busy: dict[str, float] = {}
        self._clock, self._at = clock, clock()
        self._loads: dict[str, float] = {}

    def now(self) -> tuple[NodeState, ...]:
        """The machines in the order of their first windows, those that are lost at the end; as they were while the
        ring is formed anew."""
        try:
            placement = self._engine.placement
        except ClusterError:
            self.is_placing = True
            return self._known
        self.is_placing = self._placement not in (None, placement)
        self._placement = placement
        self._weigh(self._engine.busy_seconds, self._clock())
        self._known = self._read(placement)
        return self._known

    def _weigh(self, busy: dict[str, float], now: float) -> None:
        """The share of the time since the last look that each node computed; nodes tell it twice a second."""
        if now - self._at >= BEAT_SECONDS:
            passed = now - self._at
            self._loads = {
                name: min(1.0, max(0.0, seconds - self._busy.get(name, seconds)) / passed)
                for name, seconds in busy.items()
            }
            self._busy, self._at = busy, now

    def _read(self, placement: Placement) -> tuple[NodeState, ...]:
        layers: dict[str, tuple[tuple[int, int], ...]] = {}
        for window in placement.windows:
            layers[window.member] = (*layers.get(window.member, ()), (window.first, window.end))
        before = {node.name for node in self._known if node.state != "lost" and node.name != HEAD_NAME}
        self._back |= self._lost & layers.keys()
        self._lost = (self._lost | before) - layers.keys()
        self._back -= self._lost
        there = [self._state(name, windows) for name, windows in layers.items()]
        return (*there, *(NodeState(name, state="lost") for name in sorted(self._lost)))

    def _state(self, name: str, layers: tuple[tuple[int, int], ...]) -> NodeState:
        state: State = "recovered" if name in self._back else "there"
        return NodeState(
            HEAD_NAME if name == HEAD else name, layers, self._links.get(name), self._loads.get(name), state
        )


def watch(engine: Engine, config: Config) -> RingStates | None:
    """The states of an engine that is a ring, its links measured now; None for one machine."""
    if not isinstance(engine, RingEngine):
        return None
    import asyncio

    from .ring import LOOK_SECONDS, make_home, measure_links

    links: dict[str, float] = {}
    with contextlib.suppress(ClusterError):
        home = make_home(config)
        seen = asyncio.run(home.survey(LOOK_SECONDS, config.settings.peers))
        named = {window.member for window in engine.placement.windows}
        nodes = [one for one in seen if one.name in named]
        measured = asyncio.run(measure_links(home, nodes, lambda text: None))
        links = {name: link[0] for name in named if (link := measured.pairs.get((HEAD_NAME, name)))}
    return RingStates(engine, links)
