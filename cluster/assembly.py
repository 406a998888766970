"""How a ring comes about: windows are placed on the nodes that are there and opened, without those that are lost."""

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass

from ..quant.gguf import ModelFile
from ..runtime.room import padded
from .background import Background
from .codec import MICRO_BATCH, ROW_TYPES
from .errors import ClusterError, NodeBusy, NodeLost, PlanImpossible
from .formation import HEAD, Formation, Placement
from .link import LinkBook
from .member import Dialer
from .roster import Roster
from .store import Store
from .window import WindowOptions

_BUSY_SECONDS = 20.0
"""How long nodes are waited for that another head has, or that a machine that slept does not reach at once."""
_AGAIN_SECONDS = 1.0
_RETURN_SECONDS = 30.0
"""How long a lost node is waited for without which the model does not fit."""
Placer = Callable[[list[str]], Placement]
"""From the names of the nodes that are there to the windows. Raises PlanImpossible."""


@dataclass(frozen=True, slots=True)
class RingOptions:
    """How the windows are opened. `n_batch` is the size of a micro-batch: prompts pass the ring in such pieces."""

    n_context: int
    n_sequences: int = 8
    n_batch: int = MICRO_BATCH
    n_threads: int = 1
    cache_type: str = "f16"
    row_type: str = "f32"
    name: str = "head"
    is_guessing: bool = True
    """Whether nodes that would wait for a lone answer's next token begin with what it may be."""


class Assembly:
    """Forms the rings of one head for one model, one after the other."""

    def __init__(
        self,
        file: ModelFile,
        roster: Roster,
        background: Background,
        dialer: Dialer,
        store: Store,
        place: Placer,
        options: RingOptions,
        tell: Callable[[str], None],
        links: LinkBook | None,
    ) -> None:
        self._file, self._roster, self._background = file, roster, background
        self._dialer, self._store, self._place = dialer, store, place
        self._options, self._tell, self._links = options, tell, links

    def form(self, is_first: bool, is_woken: bool) -> Formation:
        """Place the windows on the nodes that are there and open them, again without those that are lost meanwhile;
        with `is_woken` nodes may take a while to be reached.

        Raises NodeBusy where another head has a node at first, later that node counts as lost; PlanImpossible,
        ClusterError, ModelError, OutOfMemory."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            self._store.forget_used()
            try:
                placement = self._place(self._roster.present)
            except PlanImpossible:
                # A network that was gone for a moment, or a machine that is started again, need not cost the answer.
                if not self._roster.await_return(_RETURN_SECONDS):
                    raise
                continue
            formation = self._make(placement)
            try:
                self._open(formation)
                return formation
            except (NodeLost, NodeBusy) as error:
                # Also this head may have a node still, which ends the step that it was at in the ring that broke.
                lost = formation.lost
                is_asleep = is_woken or (lost is not None and lost.member == HEAD)
                is_awaited = (isinstance(error, NodeBusy) or is_asleep) and time.monotonic() < deadline
                self.end(formation)
                if is_awaited:
                    self._tell(f"{error}; waiting")
                    if is_asleep:  # a busy node has waited itself
                        time.sleep(_AGAIN_SECONDS)
                elif lost is None or lost.member == HEAD or (is_first and isinstance(error, NodeBusy)):
                    raise
                else:
                    self._roster.lose(lost.member, str(error))
            except BaseException:
                self.end(formation)
                raise

    def _make(self, placement: Placement) -> Formation:
        options = self._options
        window = WindowOptions(padded(options.n_context), options.n_sequences, options.n_batch, options.cache_type)
        return Formation(self._file, placement, window, ROW_TYPES[options.row_type])

    def _open(self, formation: Formation) -> None:
        opening = self._background.start(
            formation.open(self._roster.addresses, self._dialer, self._store, self._options.name)
        )
        try:
            formation.load_own(self._store, self._options.n_threads)
            opening.result()
        finally:
            opening.cancel()
        if self._links is not None:
            self._links.note(formation.links)
        windows = formation.placement.windows
        shares = ", ".join(f"{w.member or self._options.name} {w.first}-{w.end - 1}" for w in windows)
        self._tell(f"layers: {shares}")

    def end(self, formation: Formation) -> None:
        """Leave its nodes idle and free its windows."""
        # What a lost node does not answer must not keep the others.
        with contextlib.suppress(ClusterError):
            self._background.run(formation.close(), 10)
        formation.free()
