"""The gRPC service of a node: describes itself, is held by one head at a time, passes activations on.

Everything that arrives is untrusted: who calls is checked first (`Gate`), sizes and order after that. A head that is
gone (stream ended, or silent for too long) leaves the node idle and ready.
"""

import asyncio
import contextlib
import hmac
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, Protocol

import grpc

from ..runtime.errors import LocalReasonError
from .codec import LONGEST_MESSAGE, PROTOCOL
from .errors import ClusterError, HeadLost, NextLost, NodeBusy, ProtocolError
from .identity import MOST_NAME, MOST_TEXT, shown
from .inlet import Inlet, read_options, read_recipe
from .link import answering, measured
from .session import Session, Terms
from .store import Recipe, Store
from .wire import ring_pb2 as wire
from .wire import ring_pb2_grpc as service

BEAT_SECONDS = 0.5
_STEP_SECONDS = 60.0
"""Longest wait for the next node or the head to take a step."""
_FREE_SECONDS = 3.0
"""How long a head waits for a node that another one has before it is told so."""
_MEASURE_SECONDS = 60.0
_MOST_ECHO = 4 << 20
_MOST_HOSTS = 16
_MISSED = {NextLost: wire.NEXT, HeadLost: wire.HEAD}
OPTIONS = [
    ("grpc.max_receive_message_length", LONGEST_MESSAGE),
    ("grpc.max_send_message_length", LONGEST_MESSAGE),
    ("grpc.enable_http_proxy", 0),
    # A node that comes back is reached at once: no back-off inherited from other channels to it.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
log = logging.getLogger("localreason.node")


class Gate(Protocol):
    """Who may speak to this node, and how it speaks to others."""

    def caller(self, context: Any) -> str | None:
        """The fingerprint of the certificate that a call came with if it is trusted or introduced, "" where the node
        runs in plain text, None for anybody else."""
        ...

    def is_paired(self, caller: str) -> bool:
        """True for a head, False for one that was only introduced."""
        ...

    def introduce(self, certificates: list[str]) -> frozenset[str]:
        """Trust these for Flow while a session lasts; their fingerprints."""
        ...

    def channel(self, host: str, port: int, certificate: str) -> grpc.aio.Channel:
        """A channel to another machine whose certificate is known."""
        ...


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """How a node presents itself and what it gives."""

    name: str
    n_threads: int
    profile: Callable[[list[str]], str] = lambda types: ""
    """Types of weights to the JSON of a Device; may take seconds."""


class Node(service.RingServicer):
    """The servicer; `show` gets a line for the person who looks on."""

    def __init__(self, options: NodeOptions, store: Store, gate: Gate, show: Callable[[str], None]) -> None:
        self._options = options
        self._store = store
        self._gate = gate
        self._show = show
        self._session: Session | None = None
        self._holder = ""
        self._profiling = asyncio.Lock()
        self._clearing: asyncio.Task[None] | None = None
        self._free = asyncio.Event()
        self._free.set()

    async def _admit(self, context: Any, is_head: bool = True) -> str:
        """The caller's fingerprint; anybody else gets nothing."""
        caller = self._gate.caller(context)
        if caller is None or (is_head and not self._gate.is_paired(caller)):
            log.warning("refused a call from %s: not paired", context.peer())
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "not paired")
        return caller or ""

    async def Describe(self, request: wire.DescribeRequest, context: Any) -> wire.DescribeReply:
        await self._admit(context)
        device = ""
        if request.types:
            # A measurement goes on when its caller is gone, and keeps others away until it is done.
            measuring = asyncio.create_task(self._profile(list(request.types)))
            measuring.add_done_callback(lambda task: task.cancelled() or task.exception())
            try:
                device = await asyncio.shield(measuring)
            except LocalReasonError as error:
                await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return wire.DescribeReply(
            protocol=PROTOCOL,
            name=self._options.name,
            version=version("localreason"),
            held_by=self._holder,
            device=device,
            unix_seconds=time.time(),
        )

    async def _profile(self, types: list[str]) -> str:
        """JSON of the Device; nothing while a head has the node, whose work and the measurement would disturb each
        other as two measurements would."""
        async with self._profiling:
            if self._holder:
                return ""
            return await asyncio.to_thread(self._options.profile, [name for name in types if len(name) < 16][:32])

    async def Echo(self, request: wire.EchoRequest, context: Any) -> wire.EchoReply:
        await self._admit(context, is_head=False)
        return wire.EchoReply(data=bytes(min(request.n_reply, _MOST_ECHO)))

    # Coroutines that write, not generators: gRPC drops a generator that it is not waiting for without closing it, and
    # the session would last until the garbage collector comes by.
    async def Hold(self, request_iterator: AsyncIterator[wire.ToNode], context: Any) -> None:
        caller = await self._admit(context)
        outgoing: asyncio.Queue[wire.FromNode | None] = asyncio.Queue(64)
        holding = asyncio.create_task(
            self._hold(Inlet(request_iterator, lambda: self._gate.is_paired(caller)), outgoing, caller)
        )
        beating = asyncio.create_task(self._beat(outgoing))
        try:
            while (message := await outgoing.get()) is not None:
                await context.write(message)
        finally:
            beating.cancel()
            holding.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await holding

    async def _beat(self, outgoing: "asyncio.Queue[wire.FromNode | None]") -> None:
        while True:
            busy = 0.0
            if self._session is not None:
                self._session.watch()
                busy = self._session.busy_seconds
            if not outgoing.full():
                outgoing.put_nowait(wire.FromNode(beat=wire.Beat(busy_seconds=busy)))
            await asyncio.sleep(BEAT_SECONDS)

    async def _hold(self, inlet: Inlet, outgoing: "asyncio.Queue[wire.FromNode | None]", caller: str) -> None:
        """One session from `Open` to its end; every failure is told to the head."""
        is_mine = False
        try:
            opening = await inlet.next("open")
            # A head that forms its ring anew may be back before its last session is cleared away.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._free.wait(), _FREE_SECONDS)
            if self._holder:
                raise NodeBusy(f"{self._options.name} is busy with {self._holder}; try again when that is done")
            self._holder, is_mine = shown(opening.open.head, MOST_NAME) or "a head", True
            self._free.clear()
            await outgoing.put(wire.FromNode(beat=wire.Beat(is_held=True)))
            # A measurement ends first, and no other begins any more; one that hangs keeps nobody for good.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_MEASURE_SECONDS), self._profiling:
                    pass
            await self._serve(opening.open, inlet, outgoing, caller)
        except LocalReasonError as error:
            text = shown(str(error), MOST_TEXT)
            self._show(f"{self._options.name}: {text}")
            log.warning("%s", text)
            missed = _MISSED.get(type(error), wire.NOBODY)
            failure = wire.Failure(text=text, is_busy=isinstance(error, NodeBusy), missed=missed)
            await outgoing.put(wire.FromNode(failure=failure))
        finally:
            if is_mine:
                # A task of its own: gRPC may cancel this one a second time while it waits.
                self._clearing = asyncio.create_task(self._clear())
            with contextlib.suppress(asyncio.QueueFull):
                outgoing.put_nowait(None)

    async def _clear(self) -> None:
        """Be free again once the running step is done."""
        session, self._session = self._session, None
        if session is not None:
            await asyncio.to_thread(session.close)
        self._gate.introduce([])
        holder, self._holder = self._holder, ""
        self._free.set()
        if session is not None:
            self._show(f"free again; {session.busy_seconds:.1f} s computed for {holder}")

    async def _serve(
        self, opening: wire.Open, inlet: Inlet, outgoing: "asyncio.Queue[wire.FromNode | None]", caller: str
    ) -> None:
        options = read_options(opening)
        known = self._gate.introduce(list(opening.neighbours)) | {caller}
        terms = Terms(opening.session, self._holder, options, opening.row_type, opening.is_disk_used, known)
        windows, n_received = {}, 0
        self._store.forget_used()
        for i, message in enumerate(opening.windows):
            path, n = await self._build(i, read_recipe(message), inlet, outgoing)
            windows[message.hop] = (path, message.n_gpu_layers)
            n_received += n
        if len(windows) != len(opening.windows):
            raise ProtocolError("two windows of one hop came")
        self._session = session = Session(terms, self._options.n_threads)
        await session.load(windows)
        self._show(f"serving {len(windows)} window(s) for {self._holder}; {n_received} bytes of weights were received")
        await outgoing.put(wire.FromNode(loaded=wire.Loaded(n_received_bytes=n_received)))
        # It comes when every node has loaded, however long that takes; a head that is gone sends no beats.
        connect = (await inlet.next("connect", math.inf)).connect
        async with contextlib.AsyncExitStack() as stack:
            tasks = [asyncio.create_task(inlet.drain())]
            if connect.host:
                hosts = dict.fromkeys([connect.host, *connect.other_hosts[:_MOST_HOSTS]])
                channels = [self._gate.channel(host, connect.port, connect.certificate) for host in hosts]
                try:
                    channel = await stack.enter_async_context(await answering(channels))
                except grpc.aio.AioRpcError as error:
                    raise NextLost(f"the next node of the ring does not answer at {', '.join(hosts)}") from error
                connected = await measured(service.RingStub(channel))
                tasks.append(asyncio.create_task(_pump(session, channel)))
            else:
                connected = wire.Connected()
            await outgoing.put(wire.FromNode(connected=connected))
            try:
                done, _ = await asyncio.wait([session.failure, *tasks], return_when=asyncio.FIRST_COMPLETED)
                if session.failure in done:
                    raise session.failure.result()
                for task in done:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()

    async def _build(
        self, index: int, recipe: Recipe, inlet: Inlet, outgoing: "asyncio.Queue[wire.FromNode | None]"
    ) -> tuple[Any, int]:
        """The window's file, its missing parts asked for; and the bytes that were received."""
        building = await asyncio.to_thread(self._store.build, recipe)
        if building is None:
            return self._store.path(recipe), 0
        n_received = 0
        try:
            while (missing := await asyncio.to_thread(building.missing)) is not None:
                part, offset = missing
                await outgoing.put(wire.FromNode(want=wire.Want(window=index, part=part, offset=offset)))
                is_whole = False
                while not is_whole:
                    chunk = (await inlet.next("chunk")).chunk
                    if chunk.window != index:
                        raise ProtocolError(f"bytes of window {chunk.window} came while {index} was asked for")
                    is_whole = await asyncio.to_thread(building.write, chunk.part, chunk.offset, chunk.data)
                    n_received += len(chunk.data)
            return await asyncio.to_thread(building.finish), n_received
        finally:
            building.close()

    async def Flow(self, request_iterator: AsyncIterator[wire.Step], context: Any) -> None:
        caller = await self._admit(context, is_head=False)
        session = self._session
        words = dict(context.invocation_metadata() or ())
        given = words.get("session-bin", b"")
        is_allowed = session is not None and caller in session.terms.neighbours
        if session is None or not is_allowed or not hmac.compare_digest(bytes(given), session.terms.id):
            log.warning("refused a flow from %s: no such session", context.peer())
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "no such session")
            return
        if words.get("role") == "out":
            while (step := await session.results.get()) is not None:
                try:
                    async with asyncio.timeout(_STEP_SECONDS):
                        await context.write(step)
                except TimeoutError:
                    session.fail(HeadLost(f"the head took no result for {_STEP_SECONDS:.0f} s; the session is over"))
                    return
            return
        try:
            async for step in request_iterator:
                session.take(step)
        except ProtocolError as error:
            log.warning("%s", error)
            session.fail(error)


async def _pump(session: Session, channel: grpc.aio.Channel) -> None:
    """Send results to the next node for as long as it takes them."""
    call = service.RingStub(channel).Flow(metadata=(("session-bin", session.terms.id), ("role", "in")))
    try:
        while (step := await session.results.get()) is not None:
            async with asyncio.timeout(_STEP_SECONDS):  # wait_for would make a task for each step
                await call.write(step)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
        raise NextLost(f"the next node of the ring takes nothing any more: {type(error).__name__}") from error
    finally:
        call.cancel()


async def serve(
    node: Node, add_port: Callable[[grpc.aio.Server], int], ready: Callable[[int], Awaitable[None]]
) -> None:
    """Serve until cancelled; `ready` is called with the port. Raises ClusterError where the port is taken."""
    server = grpc.aio.server(options=[*OPTIONS, ("grpc.so_reuseport", 0)])
    service.add_RingServicer_to_server(node, server)
    try:
        port = add_port(server)
    except RuntimeError as error:
        why = str(error).partition(";")[0]  # of gRPC's own advice
        raise ClusterError(
            f"the port cannot be used ({why}): another node may run here; choose one by --port"
        ) from error
    await server.start()
    try:
        await ready(port)
        await server.wait_for_termination()
    finally:
        await server.stop(grace=1)
