"""A node as the head sees it: asked who it is, held for a session, fed with weights, watched."""

import asyncio
import contextlib
import math
import time
from dataclasses import dataclass
from typing import Protocol

import grpc

from ..quant.gguf import ModelFile, Part, Window
from .codec import PROTOCOL
from .discovery import write_peer
from .errors import ClusterError, NodeBusy, NodeLost, ProtocolError
from .identity import MOST_TEXT, shown
from .link import Link, measure_link
from .node import BEAT_SECONDS
from .store import Recipe
from .wire import ring_pb2 as wire
from .wire import ring_pb2_grpc as service

SILENCE_SECONDS = 2.5
"""A node that sends no beat for so long is lost."""
_LOOK_SECONDS, _STILL_SECONDS = 0.2, 1.0
_SLEEP_SECONDS, _WAKING_SECONDS = 5.0, 10.0
"""What is lost within the second after this machine stood still for the first was lost by its sleep."""
_CALL_SECONDS = 5.0
_CHUNK_SECONDS = 60.0
_CONNECT_SECONDS = 15.0
_PROFILE_SECONDS = 60.0
_LOAD_SECONDS = 600.0
_MOST_WORDS = 8
"""That wait to be read; a node says one at a time."""
_OPEN_SECONDS = 2.0
UNTRUSTED = "does not trust this machine any more; pair again with `localreason cluster pair`"
STRANGER = "is another machine than the one that was paired; pair again with `localreason cluster pair`"
OTHER_PROTOCOL = "speaks protocol"
_NO_TLS = "answers without encryption: it runs with --plaintext, or is no node"
_ASLEEP = "did not answer in time; see whether it is awake"
_UNREACHABLE = "cannot be reached or ended the connection; see whether `localreason node` runs there"


class Dialer(Protocol):
    """Opens channels to machines whose certificate is known."""

    def channel(self, host: str, port: int, certificate: str) -> grpc.aio.Channel: ...


@dataclass(frozen=True, slots=True)
class Address:
    """Where a paired node listens, and its certificate (PEM; empty in plain text). Where else it announces itself may
    be how another machine reaches it."""

    name: str
    host: str
    port: int
    certificate: str = ""
    other_hosts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Load:
    """A window for a node: where in the order of hops it stands, what it is made of."""

    hop: int
    window: Window
    recipe: Recipe
    n_gpu_layers: int


class OnLoss(Protocol):
    """Called when a node is lost, or says that it missed another one."""

    def __call__(self, reason: str, missed: wire.Missed = wire.NOBODY) -> None: ...


class Member:
    """One node. All methods but the constructor run on the event loop."""

    def __init__(self, address: Address, dialer: Dialer) -> None:
        self.address = address
        self._dialer = dialer
        self._channel: grpc.aio.Channel | None = None
        self._outgoing: asyncio.Queue[wire.ToNode] = asyncio.Queue(8)
        self._incoming: asyncio.Queue[wire.FromNode] = asyncio.Queue(_MOST_WORDS)
        self._tasks: list[asyncio.Task[None]] = []
        self._call: grpc.aio.StreamStreamCall[wire.ToNode, wire.FromNode] | None = None
        self._heard = 0.0
        self._looked, self._woken = math.inf, -math.inf
        """When the clock on the wall was looked at last, which goes on while a machine sleeps, and when this machine
        was seen to have slept."""
        self.n_sent_bytes = 0
        self.busy_seconds = 0.0
        self._is_over = False
        """True where the node is lost or was released."""
        self.error: ClusterError | None = None
        self.ended = asyncio.Event()
        """Set when the node is lost, with `error`."""
        self.held = asyncio.Event()
        """Set when the node is this head's; an older node does not say so."""
        self._on_loss: OnLoss = lambda reason, missed=wire.NOBODY: None

    @property
    def name(self) -> str:
        return self.address.name

    def _stub(self) -> service.RingStub:
        if self._channel is None:
            self._channel = self._dialer.channel(self.address.host, self.address.port, self.address.certificate)
        return service.RingStub(self._channel)

    async def describe(self, types: list[str] | None = None) -> wire.DescribeReply:
        """Who the node is; its profile where weight types are given. Raises NodeLost, ProtocolError."""
        started = time.monotonic()
        request = wire.DescribeRequest(protocol=PROTOCOL, types=types or [])
        try:
            reply = await self._stub().Describe(request, timeout=_PROFILE_SECONDS if types else _CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            why, seconds = reason(error), time.monotonic() - started
            # TLS 1.3 refuses a client after its handshake, which looks like an end of the connection, and at once; a
            # node that sleeps says nothing until gRPC gives the handshake up.
            if why == _UNREACHABLE and self.address.certificate and await self._is_listening():
                why = UNTRUSTED
            if why == UNTRUSTED and seconds >= _CALL_SECONDS:
                why = _ASLEEP
            raise NodeLost(f"{self.name} at {write_peer(self.address.host, self.address.port)} {why}") from error
        if reply.protocol != PROTOCOL:
            raise ProtocolError(
                f"{self.name} {OTHER_PROTOCOL} {reply.protocol} and this machine {PROTOCOL}; update the older one"
            )
        return reply

    async def _is_listening(self) -> bool:
        try:
            async with asyncio.timeout(_OPEN_SECONDS):
                _, writer = await asyncio.open_connection(self.address.host, self.address.port)
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    async def measure_link(self) -> Link:
        """Seconds of a short message one way, bytes per second. Raises NodeLost."""
        try:
            return await measure_link(self._stub())
        except grpc.aio.AioRpcError as error:
            raise NodeLost(f"{self.name} {reason(error)}") from error

    async def hold(self, opening: wire.Open, loads: list[Load], file: ModelFile, on_loss: OnLoss) -> int:
        """Hold the node and have it load its windows; the bytes of weights that were sent.

        Raises NodeBusy, NodeLost, ClusterError. `on_loss` is called once if the node is lost later.
        """
        call = self._call = self._stub().Hold()
        self._on_loss = on_loss
        self._heard = time.monotonic()
        self._tasks = [asyncio.create_task(task) for task in (self._speak(call), self._listen(call))]
        self._tasks += [asyncio.create_task(task) for task in (self._beat(), self._watch())]
        del opening.windows[:]
        for load in loads:
            parts = [
                wire.Part(sha256=piece.sha256, n_bytes=piece.n_bytes, source_offset=piece.source_offset)
                for piece in load.recipe.pieces
            ]
            opening.windows.append(
                wire.WindowFile(
                    hop=load.hop,
                    n_gpu_layers=load.n_gpu_layers,
                    header=load.recipe.header,
                    parts=parts,
                    source_name=load.recipe.source_name,
                    source_bytes=load.recipe.source_bytes,
                )
            )
        await self._outgoing.put(wire.ToNode(open=opening))
        while True:
            message = await self._next(_LOAD_SECONDS)
            if message.WhichOneof("message") == "loaded":
                return self.n_sent_bytes
            want = message.want
            if message.WhichOneof("message") != "want" or want.window >= len(loads):
                raise ProtocolError(f"{self.name} answered out of turn; update localreason there")
            await self._send_part(want, loads[want.window].window.parts, file)

    async def _send_part(self, want: wire.Want, parts: tuple[Part, ...], file: ModelFile) -> None:
        if want.part >= len(parts) or want.offset >= parts[want.part].n_bytes:
            raise ProtocolError(f"{self.name} asked for a part that is not there; update localreason there")
        part, offset = parts[want.part], want.offset
        blocks = iter([part.data[offset:]]) if part.data else file.read(part, offset)
        while (block := await asyncio.to_thread(next, blocks, None)) is not None:
            chunk = wire.Chunk(window=want.window, part=want.part, offset=offset, data=block)
            try:
                await asyncio.wait_for(self._outgoing.put(wire.ToNode(chunk=chunk)), _CHUNK_SECONDS)
            except TimeoutError:
                self._lose(f"took no weights for {_CHUNK_SECONDS:.0f} s")
            if self.error is not None:
                raise self.error
            offset += len(block)
            self.n_sent_bytes += len(block)

    async def connect(self, following: Address | None) -> Link | None:
        """Have the node reach the next one, or wait for the head where there is none; the link to it if it was timed.
        Raises NodeLost."""
        target = wire.Connect()
        if following is not None:
            target = wire.Connect(
                host=following.host,
                port=following.port,
                certificate=following.certificate,
                other_hosts=following.other_hosts,
            )
        await self._outgoing.put(wire.ToNode(connect=target))
        message = await self._next(_CONNECT_SECONDS)
        if message.WhichOneof("message") != "connected":
            raise ProtocolError(f"{self.name} answered out of turn; update localreason there")
        found = message.connected
        return (found.link_seconds, found.link_bytes_per_second) if found.link_bytes_per_second > 0 else None

    def flow(self, session: bytes, role: str) -> "grpc.aio.StreamStreamCall[wire.Step, wire.Step]":
        """The stream of activations into the node ("in") or out of it ("out")."""
        return self._stub().Flow(metadata=(("session-bin", session), ("role", role)))

    async def _next(self, seconds: float) -> wire.FromNode:
        """The node's next word besides beats. Raises what it failed with."""
        message = wire.FromNode()
        try:
            message = await asyncio.wait_for(self._incoming.get(), seconds)
        except TimeoutError:
            self._lose(f"did not answer for {seconds:.0f} s")
        if self.error is not None:
            raise self.error
        return message

    async def _speak(self, call: "grpc.aio.StreamStreamCall[wire.ToNode, wire.FromNode]") -> None:
        while True:
            message = await self._outgoing.get()
            # A call that is broken is noticed, and told, by `_listen`; who wants to say something must not wait here.
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await call.write(message)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            if not self._outgoing.full():
                self._outgoing.put_nowait(wire.ToNode(beat=wire.Beat()))

    async def _listen(self, call: "grpc.aio.StreamStreamCall[wire.ToNode, wire.FromNode]") -> None:
        try:
            async for message in call:
                self._heard = time.monotonic()
                kind = message.WhichOneof("message")
                if kind == "beat":
                    if message.beat.is_held:
                        self.held.set()
                    else:
                        self.busy_seconds = message.beat.busy_seconds
                    continue
                if kind == "failure":
                    message.failure.text = shown(message.failure.text, MOST_TEXT)
                    self._lose(f"failed: {message.failure.text}", message.failure)
                    return
                if self._incoming.qsize() >= _MOST_WORDS - 1:
                    self._lose("says what nobody asked; update localreason there")
                    return
                self._incoming.put_nowait(message)
            self._lose("ended the session")
        except grpc.aio.AioRpcError as error:
            self._lose(reason(error))

    async def _watch(self) -> None:
        self._looked = time.time()
        while time.monotonic() - self._heard < SILENCE_SECONDS:
            await asyncio.sleep(_LOOK_SECONDS)
            self._look()
        self._lose(f"sent no sign of life for {SILENCE_SECONDS} s")

    def _look(self) -> None:
        """Notice that this machine stood still: what the node said meanwhile has not been read yet."""
        still, self._looked = time.time() - self._looked - _LOOK_SECONDS, time.time()
        if still > _STILL_SECONDS:
            self._heard = time.monotonic()
        if still > _SLEEP_SECONDS:
            self._woken = time.monotonic()

    def _lose(self, why: str, told: wire.Failure | None = None) -> None:
        if self._is_over:
            return
        self._is_over = True
        self._look()
        if told is None:
            has_slept = time.monotonic() - self._woken < _WAKING_SECONDS
            told = wire.Failure(text=why, missed=wire.HEAD if has_slept else wire.NOBODY)
        self.error = (NodeBusy if told.is_busy else NodeLost)(f"{self.name}: {told.text}")
        self.ended.set()
        self._incoming.put_nowait(wire.FromNode())  # for who waits for a word
        self._on_loss(why, told.missed)

    async def __aenter__(self) -> "Member":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.release()

    async def release(self) -> None:
        """End the session, if there is one, and leave the node idle."""
        self._is_over = True
        if self._call is not None:
            self._call.cancel()
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.aio.AioRpcError):
            await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()
            self._channel = None


def reason(error: grpc.aio.AioRpcError) -> str:
    """Why a call failed, for a person."""
    code, details = error.code(), (error.details() or "").lower()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return _ASLEEP
    if "certificate_verify_failed" in details:
        return STRANGER
    if "wrong_version_number" in details:
        return _NO_TLS
    if code is grpc.StatusCode.UNAUTHENTICATED or "handshake" in details or "certificate" in details:
        return UNTRUSTED
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):  # a node that is being stopped
        return _UNREACHABLE
    return f"failed: {shown(error.details() or '', MOST_TEXT)}"
