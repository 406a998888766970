"""One head's hold on this node: its windows, and the thread that opens them, runs them and frees them.

Nothing else touches the windows, so a head may go away at any moment, also while they are being opened. Steps of one
hop come in the order of their numbers and are computed in the order of arrival; a step that is out of order, replayed
or larger than agreed ends the session. The memory operations of a step are carried out in the window of its hop just
before its batch, so every window sees the same history.
"""

import asyncio
import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from ..runtime.errors import LocalReasonError
from .codec import pack_rows, unpack_rows, unpack_spans
from .errors import NodeLost, ProtocolError
from .window import LayerWindow, WindowOptions
from .wire import ring_pb2 as wire

if sys.platform != "win32":
    import resource

log = logging.getLogger("localreason.node")
_HANG_SECONDS, _HANG_FACTOR = 3.0, 10.0
"""A step hangs that takes both this long and so many times the slowest one for as many tokens."""
_N_FAULTS = 4
"""Page faults between two looks that tell a step that reads; each may bring megabytes."""
_MOST_WAITING = 64
"""Steps; a head has far fewer in flight."""
_BESIDE_BYTES = 1 << 20
"""Most bytes of a step besides its rows."""


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
        self._loop = asyncio.get_running_loop()
        self.failure: asyncio.Future[LocalReasonError] = self._loop.create_future()
        self._loaded: asyncio.Future[None] = self._loop.create_future()
        self.busy_seconds = 0.0
        self._n_threads = n_threads
        self._hops: dict[int, _Hop] = {}
        self._order: list[int] = []
        self._inbox: queue.SimpleQueue[wire.Step | None] = queue.SimpleQueue()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._running: tuple[float, int] | None = None
        """When the step under way began, and its tokens."""
        self._n_faults = 0
        """Those at the last look."""
        self._slowest = 0.0
        """Seconds a token of the slowest step so far."""

    async def load(self, windows: dict[int, tuple[Path, int]]) -> None:
        """Open windows: path and GPU layers by hop. Raises ModelError, OutOfMemory."""
        self._thread = threading.Thread(target=self._live, args=(windows,), name="windows", daemon=True)
        self._thread.start()
        await asyncio.wait([self._loaded, self.failure], return_when=asyncio.FIRST_COMPLETED)
        if self.failure.done():
            raise self.failure.result()

    def _live(self, windows: dict[int, tuple[Path, int]]) -> None:
        try:
            self._open(windows)
            self._work()
        except LocalReasonError as error:
            self._call(self.fail, error)
        except Exception as error:  # whatever it is, the head has to hear of it
            log.exception("the thread of the windows ended")
            self._call(self.fail, LocalReasonError(f"a fault in localreason: {type(error).__name__}: {error}"))
        finally:
            for hop in self._hops.values():
                hop.window.close()

    def _open(self, windows: dict[int, tuple[Path, int]]) -> None:
        for hop, (path, n_gpu_layers) in sorted(windows.items()):
            if self._is_over.is_set():
                return
            terms = self.terms
            window = LayerWindow(path, terms.options, self._n_threads, n_gpu_layers, False, terms.is_disk_used)
            self._hops[hop] = _Hop(window)
            window.warm()
        self._order = sorted(self._hops)
        self._call(self._loaded.set_result, None)

    def take(self, step: wire.Step) -> None:
        """Queue a step that came from the neighbour. Raises ProtocolError."""
        if step.hop not in self._hops:
            raise ProtocolError(f"a step for window {step.hop} came; this node has {self._order}")
        if self._inbox.qsize() + self.results.qsize() >= _MOST_WAITING:
            raise ProtocolError(f"{_MOST_WAITING} steps wait already; a head sends fewer")
        most = 4 * self.terms.options.n_batch * self._hops[step.hop].window.n_embd + _BESIDE_BYTES
        if (n_bytes := step.ByteSize()) > most:  # before it waits, for many of the longest messages would fill a memory
            raise ProtocolError(f"a step of {n_bytes} bytes came; {most} are the most")
        self._inbox.put(step)

    def _work(self) -> None:
        while (step := self._inbox.get()) is not None and not self._is_over.is_set():
            result = self._run(step)
            self._call(self.results.put_nowait, result)
            if self.terms.is_disk_used:
                later = [hop for hop in self._order if hop > step.hop] or self._order
                self._hops[later[0]].window.prefetch()

    def _note(self) -> None:
        """A step has been computed."""
        if self._running is not None:
            started, n_tokens = self._running
            self._running = None
            seconds = time.perf_counter() - started
            self.busy_seconds += seconds
            self._slowest = max(self._slowest, seconds / n_tokens)

    def watch(self) -> None:
        """End the session where a step takes far longer than any before it: a device or a disk that hangs. One that
        reads weights, which the system threw out of memory while nothing was asked, does not."""
        n_faults, running = page_faults(), self._running
        is_reading, self._n_faults = n_faults - self._n_faults >= _N_FAULTS, n_faults
        if running is None or not self._slowest or self.terms.is_disk_used or is_reading:
            return
        started, n_tokens = running
        seconds, limit = time.perf_counter() - started, max(_HANG_SECONDS, _HANG_FACTOR * self._slowest * n_tokens)
        if seconds > limit:
            self.fail(NodeLost(f"a step has taken {seconds:.0f} s, more than {limit:.0f} s: this machine hangs"))

    def _call(self, function: Callable[..., object], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def fail(self, error: LocalReasonError) -> None:
        """End the session for a reason; the first one counts."""
        if not self.failure.done():
            self.failure.set_result(error)

    def _run(self, step: wire.Step) -> wire.Step:
        hop, options = self._hops[step.hop], self.terms.options
        if step.number != hop.next_number:
            raise ProtocolError(f"step {step.number} came to window {step.hop}, which awaits {hop.next_number}")
        spans = unpack_spans(step, options.n_sequences, options.n_batch)
        n_tokens = sum(len(span.tokens) for span in spans)
        rows = unpack_rows(step.rows, n_tokens, hop.window.n_embd)
        self._running = (time.perf_counter(), n_tokens)
        apply(hop.window, list(step.operations))
        hop.next_number += 1
        out = hop.window.run(spans, rows)
        self._note()
        return wire.Step(
            number=step.number,
            hop=step.hop + 1,
            operations=step.operations,
            spans=step.spans,
            rows=pack_rows(out, self.terms.row_type),
        )

    def close(self) -> None:
        """End the thread once the running step is done, the windows freed. Blocks."""
        self._is_over.set()
        self._inbox.put(None)
        self._call(self.results.put_nowait, None)
        if self._thread is not None:
            self._thread.join()


def page_faults() -> int:
    """How often this process has waited for a page to be read; on Windows also for those that were in memory."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().num_page_faults
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def apply(window: LayerWindow, operations: list[wire.Operation]) -> None:
    """Carry out memory operations. Raises DecodeFailed for one that the window's cache cannot do."""
    for operation in operations:
        if operation.HasField("target"):
            window.fork(operation.source, operation.target, operation.n_tokens)
        else:
            window.rewind(operation.source, operation.n_tokens)
