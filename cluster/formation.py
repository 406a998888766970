"""One ring as it stands: who runs which window, held and connected. A lost node ends it; `ring.py` makes the next."""

import asyncio
import contextlib
import queue
import secrets
import threading
import time
from dataclasses import dataclass, field
from itertools import pairwise

import grpc

from ..quant.gguf import ModelFile
from .codec import PROTOCOL
from .errors import NodeLost, PlanImpossible
from .link import Link
from .member import Address, Dialer, Load, Member, OnLoss, reason
from .store import Store, make_recipe
from .window import LayerWindow, WindowOptions
from .wire import ring_pb2 as wire

_WRITE_SECONDS = 60.0
_REASON_SECONDS = 1.0
HEAD = ""
"""The name of this machine in a placement."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Layers [first, end) on a machine; the place in a placement is the hop."""

    member: str
    first: int
    end: int
    n_gpu_layers: int = 0


@dataclass(frozen=True, slots=True)
class Placement:
    """Windows in the order of hops, the last one the head's; `is_disk_used` where weights do not fit into memory,
    `token_seconds` what is expected between two tokens, of all sequences together; 0 where nothing is known."""

    windows: tuple[Assignment, ...]
    is_disk_used: bool = False
    token_seconds: float = 0.0
    n_spread: int = 0
    """Batches over which decoding sequences are spread; 0 for as many as are under way at once."""

    def check(self, file: ModelFile) -> None:
        """Raises PlanImpossible for a placement that is no ring."""
        bounds = [0, *(window.end for window in self.windows)]
        is_whole = bounds[-1] == file.n_layers and all(
            window.first == first < window.end for window, first in zip(self.windows, bounds, strict=False)
        )
        if not is_whole or self.windows[-1].member != HEAD:
            raise PlanImpossible(
                f"the windows {[(w.member or 'head', w.first, w.end) for w in self.windows]} do not cover "
                f"{file.n_layers} layers in order with the head last; give other windows"
            )
        following: dict[str, str] = {}
        for one, other in pairwise([*self.windows, self.windows[0]]):
            if one.member != other.member and following.setdefault(one.member, other.member) != other.member:
                raise PlanImpossible(
                    f"{one.member or 'the head'} would pass on to two machines; keep the same order in every round"
                )


@dataclass(frozen=True, slots=True)
class Returned:
    """A step came back to the head, or the head's own window is due."""

    number: int
    hop: int
    rows: wire.Rows
    came: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True, slots=True)
class Lost:
    """A node is gone, or with the name of the head only the ring; the formation is over."""

    member: str
    reason: str
    witness: str = ""
    """The node that says so."""


class Formation:
    """The windows of one placement. Methods named `async` run on the loop, the others on the head's thread.

    `inbox` is where the head's thread finds what is due: `Returned`, or `Lost` once.
    """

    def __init__(self, file: ModelFile, placement: Placement, options: WindowOptions, row_type: wire.RowType) -> None:
        placement.check(file)
        self.file = file
        self.placement = placement
        self.options = options
        self.inbox: queue.SimpleQueue[Returned | Lost] = queue.SimpleQueue()
        self.windows: dict[int, LayerWindow] = {}
        self.members: dict[str, Member] = {}
        self.n_sent_bytes = 0
        self.links: dict[tuple[str, str], Link] = {}
        """What nodes found of their links to each other."""
        self._row_type = row_type
        self._outgoing: asyncio.Queue[wire.Step] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []
        self.lost: Lost | None = None
        """What ended the formation."""
        self._is_over = False
        self._is_held = threading.Event()
        """Set when every node is this head's, or `open` ended."""
        self._is_failed = False
        """True where `open` ended with an exception."""
        self._following: dict[str, str] = {}
        """The node that each node passes on to, where that is not the head."""

    @property
    def n_hops(self) -> int:
        return len(self.placement.windows)

    def owner(self, hop: int) -> str:
        return self.placement.windows[hop].member

    def load_own(self, store: Store, n_threads: int) -> None:
        """Open the head's windows, while the nodes open theirs: from when all nodes are held, for a ring that waits for
        a busy one is not worth the time, and until `open` fails, which tells why. Raises ModelError, OutOfMemory,
        ClusterError."""
        self._is_held.wait()  # no longer than `open` lasts, which has deadlines
        digests = store.digests(self.file)
        for hop, place in enumerate(self.placement.windows):
            if self._is_failed:
                return
            if place.member != HEAD:
                continue
            is_last = hop == self.n_hops - 1
            window = self.file.window(place.first, place.end, is_last)
            recipe = make_recipe(self.file, window, digests)
            building = store.build(recipe)
            if building is not None:
                try:
                    while (missing := building.missing()) is not None:
                        part, offset = window.parts[missing[0]], missing[1]
                        for block in [part.data] if part.data else self.file.read(part):
                            building.write(missing[0], offset, block)
                            offset += len(block)
                    building.finish()
                finally:
                    building.close()
            is_disk_used = self.placement.is_disk_used
            opened = LayerWindow(store.path(recipe), self.options, n_threads, place.n_gpu_layers, is_last, is_disk_used)
            self.windows[hop] = opened
            opened.warm()

    async def open(self, addresses: dict[str, Address], dialer: Dialer, store: Store, name: str) -> None:
        """Have every node load its windows and reach its neighbour. Raises NodeLost as soon as one is lost, and what
        nodes failed with."""
        order = list(dict.fromkeys(w.member for w in self.placement.windows if w.member != HEAD))
        self._following = dict(pairwise(order))
        self.members = {member: Member(addresses[member], dialer) for member in order}
        opening = asyncio.create_task(self._open(order, addresses, store, name))
        ends = [asyncio.create_task(member.ended.wait()) for member in self.members.values()]
        noting = asyncio.create_task(self._note_held())
        try:
            await asyncio.wait([opening, *ends], return_when=asyncio.FIRST_COMPLETED)
            error = next((member.error for member in self.members.values() if member.error), None)
            if error is not None and not opening.done():
                raise error
            await opening
        except BaseException:
            self._is_failed = True
            raise
        finally:
            self._is_held.set()
            for task in (opening, noting, *ends):
                task.cancel()
            await asyncio.gather(opening, noting, *ends, return_exceptions=True)

    async def _open(self, order: list[str], addresses: dict[str, Address], store: Store, name: str) -> None:
        stopped = threading.Event()
        try:
            digests = await asyncio.to_thread(store.digests, self.file, stopped)
        finally:
            stopped.set()
        session = secrets.token_bytes(16)
        opening = wire.Open(
            protocol=PROTOCOL,
            session=session,
            head=name,
            n_context=self.options.n_context,
            n_sequences=self.options.n_sequences,
            n_batch=self.options.n_batch,
            cache_type=self.options.cache_type,
            row_type=self._row_type,
            is_disk_used=self.placement.is_disk_used,
            neighbours=[a.certificate for a in map(addresses.__getitem__, order) if a.certificate],
        )
        holds = []
        for member in order:
            loads = [
                Load(hop, window, make_recipe(self.file, window, digests), place.n_gpu_layers)
                for hop, place in enumerate(self.placement.windows)
                if place.member == member
                for window in [self.file.window(place.first, place.end, False)]
            ]
            own = wire.Open()
            own.CopyFrom(opening)
            holds.append(self.members[member].hold(own, loads, self.file, self._losing(member)))
        self.n_sent_bytes = sum(await _all(holds))
        if not order:
            return
        neighbours = [*(addresses[member] for member in order[1:]), None]
        # A node that passes on to the head in the middle of a round does so at its end too.
        found = await _all([self.members[m].connect(following) for m, following in zip(order, neighbours, strict=True)])
        self.links = {pair: link for pair, link in zip(pairwise(order), found, strict=False) if link is not None}
        self._tasks = [
            asyncio.create_task(self._write(self.members[order[0]], session)),
            asyncio.create_task(self._read(self.members[order[-1]], session)),
        ]

    async def _note_held(self) -> None:
        for member in self.members.values():
            await member.held.wait()
        self._is_held.set()

    def _losing(self, member: str) -> OnLoss:
        def lose(reason: str, missed: wire.Missed = wire.NOBODY) -> None:
            if self.lost is None and not self._is_over:
                # A node that is killed is often missed first by the one before it, which is to stay in the ring; and
                # all are well where they missed the head, which was asleep.
                others = {wire.NEXT: self._following.get(member, member), wire.HEAD: HEAD}
                gone = others.get(missed, member)
                self.lost = Lost(gone, reason if gone == member else f"{member} {reason}", member)
                self.inbox.put(self.lost)

        return lose

    async def _write(self, first: Member, session: bytes) -> None:
        call = first.flow(session, "in")
        try:
            while True:
                step = await self._outgoing.get()
                async with asyncio.timeout(_WRITE_SECONDS):
                    await call.write(step)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError) as error:
            text = reason(error) if isinstance(error, grpc.aio.AioRpcError) else "takes no activations any more"
            await self._blame(first, text)

    async def _read(self, last: Member, session: bytes) -> None:
        try:
            async for step in last.flow(session, "out"):
                self.inbox.put(Returned(step.number, step.hop, step.rows))
            await self._blame(last, "ended its stream")
        except grpc.aio.AioRpcError as error:
            await self._blame(last, reason(error))

    async def _blame(self, member: Member, text: str) -> None:
        """A stream of activations ended: as a rule because the session did, which says in a moment why."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(member.ended.wait(), _REASON_SECONDS)
        self._losing(member.name)(text)

    def send(self, step: wire.Step) -> None:
        """Pass a step on to the first node; on the loop."""
        self._outgoing.put_nowait(step)

    async def close(self) -> None:
        """Leave the nodes idle and ready."""
        self._is_over = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(member.release() for member in self.members.values()), return_exceptions=True)

    def free(self) -> None:
        """Free the head's windows."""
        for window in self.windows.values():
            window.close()
        self.windows.clear()


async def _all(coroutines: list) -> list:
    """All results; at the first failure the others are cancelled. A lost node comes before other errors."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as error:
        failures = error.exceptions
        raise next((failure for failure in failures if isinstance(failure, NodeLost)), failures[0]) from None
    return [task.result() for task in tasks]
