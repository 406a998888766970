"""The models behind the chat: what can be chosen, fetched with its progress, opened, closed."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ..quant.choose import find_scheme
from ..runtime.controls import PRESETS, combine
from ..runtime.errors import EngineError, ModelError, ModelNotFound
from ..runtime.model import Model, Recipe
from ..runtime.room import available_bytes
from ..tui.backend import Opened
from ..tui.delta import StreamEvent
from ..tui.starter import Offer, Suggestion, count_parameters, suggest
from ..tui.stream import Streamer
from ..tui.widgets.nodes import NodeState
from . import build, store
from .config import Config

if TYPE_CHECKING:
    from .ring_states import RingStates

_PERIOD_SECONDS = 0.3
_CLOSE_SECONDS = 60.0
Progress = Callable[[str, int, int], object]


class ChatBackend:
    """One model open at a time. `open` and `close` are called from one thread after the other."""

    def __init__(self, config: Config, recipe: Recipe, wiring: build.Wiring) -> None:
        self._config = config
        self._recipe = recipe
        self._wiring = wiring
        self._stack = contextlib.ExitStack()
        self._streamer: Streamer | None = None
        self._states: RingStates | None = None

    def suggestions(self) -> list[Suggestion]:
        """The demo, the catalogue and what is stored, judged by the memory that is free now."""
        offers = []
        with contextlib.suppress(ModelNotFound):
            demo = store.demo()
            offers.append(_offer(store.DEMO, demo.stem, demo.stat().st_size, "it only demonstrates"))
        folder = self._config.store
        stored = {item.name: item for item in store.list_stored(folder)} if folder.is_dir() else {}
        for entry in store.CATALOGUE.values():
            here = stored.pop(entry.name, None)
            n_bytes = here.n_bytes if here else entry.n_bytes
            scheme = entry.reference.partition(":")[2]
            offers.append(Offer(entry.name, n_bytes, scheme=scheme, summary=entry.summary, is_here=here is not None))
        offers += [_offer(item.name, item.path.stem, item.n_bytes, "") for item in stored.values()]
        return suggest(offers, available_bytes())

    def open(self, name: str, on_event: Callable[[StreamEvent], object], on_progress: Progress) -> Opened:
        """Raises LocalReasonError."""
        self.close()
        path = store.find(name, self._config.store)
        if path is None:
            with self._watched(name, on_progress):
                path = store.pull(name, self._config.store, self._wiring.hub())
        on_progress(f"loading {path.stem}", 0, 0)
        options = build.make_options(self._config, self._recipe, 1, [])
        # Room for any preset that the user may turn to; the cells are shared.
        n_most = max(Recipe(combine(preset, ())).n_sequences() for preset in PRESETS)
        options = replace(options, n_sequences=max(options.n_sequences, n_most))
        opened = self._wiring.open_model(path, options, self._config)
        model = cast(Model, self._stack.enter_context(opened))
        if self._config.settings.cluster:
            from .ring_states import watch

            self._states = watch(model.engine, self._config)
        self._streamer = streamer = Streamer(model, on_event)
        shown = name if name == store.DEMO or name in store.CATALOGUE else path.stem
        return Opened(shown, streamer, self._advice(path))

    def nodes(self) -> tuple[NodeState, ...]:
        return self._states.now() if self._states is not None else ()

    def is_placing(self) -> bool:
        return self._states is not None and self._states.is_placing

    def close(self) -> None:
        """Close the open model, if there is one, once its decode has ended, and not under it. Raises EngineError where
        it goes on."""
        if self._streamer is not None and not self._streamer.close(_CLOSE_SECONDS):
            raise EngineError(
                f"the model is still busy after {_CLOSE_SECONDS:.0f} s; end the chat with Ctrl+Q and start it again"
            )
        self._streamer = self._states = None
        self._stack.close()

    def _advice(self, path: Path) -> str:
        """What is known to hurt in these weights or this cache."""
        from ..quant.inspect import inspect
        from ..runtime.parts import read_local

        with contextlib.suppress(ModelError):
            report = inspect(read_local(path))
            return "; ".join(report.advice(self._config.settings.cache_type or "f16"))
        return ""

    @contextlib.contextmanager
    def _watched(self, name: str, on_progress: Progress) -> Iterator[None]:
        """Tell how many bytes have arrived, which the Hub's library does not."""
        incoming = self._config.store / ".incoming"
        n_total = store.CATALOGUE[name].n_bytes if name in store.CATALOGUE else 0
        is_done = threading.Event()

        def tell() -> None:
            while True:
                n_done = _n_bytes(incoming)
                on_progress(f"fetching {name}", min(n_done, n_total) if n_total else n_done, n_total)
                if is_done.wait(_PERIOD_SECONDS):
                    return

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            is_done.set()
            teller.join()


def _offer(name: str, stem: str, n_bytes: int, summary: str) -> Offer:
    """A file that is here, with what its own name says of it."""
    scheme = find_scheme(stem)
    return Offer(name, n_bytes, count_parameters(stem), scheme[0] if scheme else "", summary, is_here=True)


def _n_bytes(folder: Path) -> int:
    """Bytes of all files in a folder, some of which may go away meanwhile."""
    total = 0
    for path in folder.rglob("*") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total
