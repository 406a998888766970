"""One head's hold on this node: its windows, the thread that runs them, and the way out.

Steps of one hop come in the order of their numbers and are computed in the order of arrival; a step that is out of
order, replayed or larger than agreed ends the session. The memory operations of a step are carried out in the window
of its hop just before its batch, so every window sees the same history.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..runtime.errors import LocalReasonError
from .codec import pack_rows, unpack_rows, unpack_spans
from .errors import ProtocolError
from .window import LayerWindow, WindowOptions
from .wire import ring_pb2 as wire

_MOST_WAITING = 64
"""Steps; a head has far fewer in flight."""


@dataclass(slots=True)
class _Hop:
    """A window and the number of the step that it has to see next."""

    window: LayerWindow
    next_number: int = 0


@dataclass(slots=True)
class Terms:
    """What a head and its nodes agree on for one session."""

    id: bytes
    head: str
    options: WindowOptions
    row_type: wire.RowType
    is_disk_used: bool
    neighbours: frozenset[str] = field(default_factory=frozenset)
    """Fingerprints of certificates that may write into Flow, the head's among them."""


class Session:
    """Runs steps on a thread of its own. `results` has what leaves, at the end None; `failure` says why it ended."""

    def __init__(self, terms: Terms, n_threads: int) -> None:
        self.terms = terms
        self.results: asyncio.Queue[wire.Step | None] = asyncio.Queue()
        self.failure: asyncio.Future[LocalReasonError] = asyncio.get_running_loop().create_future()
        self.busy_seconds = 0.0
        self._n_threads = n_threads
        self._hops: dict[int, _Hop] = {}
        self._order: list[int] = []
        self._inbox: queue.SimpleQueue[wire.Step | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="windows", daemon=True)

    def load(self, windows: dict[int, tuple[Path, int]]) -> None:
        """Open windows: path and GPU layers by hop. Blocks; raises ModelError, OutOfMemory."""
        for hop, (path, n_gpu_layers) in sorted(windows.items()):
            window = LayerWindow(path, self.terms.options, self._n_threads, n_gpu_layers, is_last=False)
            self._hops[hop] = _Hop(window)
            window.warm()
        self._order = sorted(self._hops)
        self._thread.start()

    def take(self, step: wire.Step) -> None:
        """Queue a step that came from the neighbour. Raises ProtocolError."""
        if step.hop not in self._hops:
            raise ProtocolError(f"a step for window {step.hop} came; this node has {self._order}")
        if self._inbox.qsize() >= _MOST_WAITING:
            raise ProtocolError(f"{_MOST_WAITING} steps wait already; a head sends fewer")
        self._inbox.put(step)

    def _work(self) -> None:
        while (step := self._inbox.get()) is not None:
            try:
                started = time.perf_counter()
                result = self._run(step)
                self.busy_seconds += time.perf_counter() - started
                self._call(self.results.put_nowait, result)
                if self.terms.is_disk_used:
                    later = [hop for hop in self._order if hop > step.hop] or self._order
                    self._hops[later[0]].window.prefetch()
            except LocalReasonError as error:
                self._call(self._fail, error)
                return

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def _fail(self, error: LocalReasonError) -> None:
        if not self.failure.done():
            self.failure.set_result(error)

    def _run(self, step: wire.Step) -> wire.Step:
        hop, options = self._hops[step.hop], self.terms.options
        if step.number != hop.next_number:
            raise ProtocolError(f"step {step.number} came to window {step.hop}, which awaits {hop.next_number}")
        spans = unpack_spans(step, options.n_sequences, options.n_batch)
        n_tokens = sum(len(span.tokens) for span in spans)
        rows = unpack_rows(step.rows, n_tokens, hop.window.n_embd)
        apply(hop.window, list(step.operations))
        hop.next_number += 1
        out = hop.window.run(spans, rows)
        return wire.Step(
            number=step.number,
            hop=step.hop + 1,
            operations=step.operations,
            spans=step.spans,
            rows=pack_rows(out, self.terms.row_type),
        )

    def close(self) -> None:
        """Free the windows once the running step is done. Blocks."""
        self._inbox.put(None)
        self._call(self.results.put_nowait, None)
        if self._thread.is_alive():
            self._thread.join()
        for hop in self._hops.values():
            hop.window.close()
        self._hops.clear()


def apply(window: LayerWindow, operations: list[wire.Operation]) -> None:
    """Carry out memory operations. Raises DecodeFailed for one that the window's cache cannot do."""
    for operation in operations:
        if operation.HasField("target"):
            window.fork(operation.source, operation.target, operation.n_tokens)
        else:
            window.rewind(operation.source, operation.n_tokens)
