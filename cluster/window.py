"""A contiguous run of a model's layers and its cache: activations in, activations or logits out."""

import contextlib
import mmap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..runtime.cache import Cache
from ..runtime.engine import Span
from ..runtime.native import Model, Tap
from ..runtime.room import available_bytes, cell_bytes, check_room


@dataclass(frozen=True, slots=True)
class WindowOptions:
    """How every window of a ring is opened: all must agree, for each repeats the others' memory operations."""

    n_context: int
    n_sequences: int
    n_batch: int
    cache_type: str = "f16"


class LayerWindow:
    """An opened window file. Freed by `close`."""

    def __init__(
        self,
        path: Path,
        options: WindowOptions,
        n_threads: int,
        n_gpu_layers: int,
        is_last: bool,
        is_disk_used: bool = False,
    ) -> None:
        """`is_disk_used` where weights do not fit into memory. Raises ModelError, OutOfMemory."""
        # What llama.cpp packs anew for the CPU is a copy in memory, which cannot be read from the file again.
        self._model = Model(path, n_gpu_layers, is_window=True, is_repacked=not is_disk_used)
        try:
            if not n_gpu_layers:
                check_room(options.n_context, cell_bytes(self._model.header, options.cache_type), available_bytes())
            n_layers = int(self._model.header[f"{self._model.header['general.architecture']}.block_count"])
            tap = None if is_last else Tap(n_layers, self._model.n_embd, options.n_batch)
            self._cache = Cache(
                self._model,
                options.n_context,
                options.n_sequences,
                options.n_batch,
                n_threads,
                options.cache_type,
                tap,
            )
        except BaseException:
            self._model.close()
            raise
        self.is_last = is_last
        self.n_embd = self._model.n_embd
        self.n_vocab = self._model.n_vocab
        self.n_context = self._cache.n_context

    def run(self, spans: list[Span], activations: NDArray[np.float32]) -> NDArray[np.float32]:
        """Evaluate rows in the order of the spans; every row's activations, or the logits that the spans want.

        Valid until the next call. Raises ContextFull, DecodeFailed.
        """
        if not self.is_last:
            spans = [Span(span.sequence_id, span.position, span.tokens, len(span.tokens)) for span in spans]
        return self._cache.decode(spans, activations)

    def rewind(self, sequence_id: int, n_tokens: int) -> None:
        """Forget all but the first tokens of a sequence."""
        self._cache.remove(sequence_id, n_tokens)

    def fork(self, source: int, target: int, n_tokens: int) -> None:
        """Let an empty sequence share the first tokens of another."""
        self._cache.copy(source, target, n_tokens)

    def prefetch(self) -> None:
        """Ask the system for the pages of the weights, for a window that is due soon and may not be in memory."""
        will_need = getattr(mmap, "MADV_WILLNEED", None)
        if will_need is None:
            return
        with (
            contextlib.suppress(OSError, ValueError),
            self._model.path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages,
        ):
            pages.madvise(will_need)

    def warm(self) -> None:
        """Evaluate one row for nothing, so that weights are read and threads started; the logits mean nothing."""
        self.run([Span(0, 0, [0])], np.zeros((1, self.n_embd), np.float32))
        self.rewind(0, 0)

    def close(self) -> None:
        """Free cache and weights; closing twice does nothing."""
        self._cache.close()
        self._model.close()
