"""How long bytes take from one machine to another, and a memory of what nodes measured between themselves."""

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import grpc

from ..runtime.files import replacing
from .wire import ring_pb2 as wire
from .wire import ring_pb2_grpc as service

_N_SHORT, _SHORT_BYTES = 6, 64
_CALL_SECONDS = 5.0
_STALE_SECONDS = 7 * 86_400
Link = tuple[float, float]
"""Seconds of a short message one way, bytes per second."""


async def measure_link(stub: service.RingStub, n_bytes: int = 1 << 20) -> Link:
    """Time short round trips and one of `n_bytes` each way. Raises what gRPC raises."""
    times = []
    for _ in range(_N_SHORT):
        started = time.perf_counter()
        await stub.Echo(wire.EchoRequest(data=bytes(_SHORT_BYTES), n_reply=_SHORT_BYTES), timeout=_CALL_SECONDS)
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    await stub.Echo(wire.EchoRequest(data=bytes(n_bytes), n_reply=n_bytes), timeout=_CALL_SECONDS)
    long = time.perf_counter() - started
    return min(times) / 2, 2 * n_bytes / max(1e-6, long - min(times))


class LinkBook:
    """Links between two nodes in a file of the head's: a head can time only its own links, so nodes time theirs to
    each other while a ring is formed, and the next plan uses that. What is old, impossible or cannot be read counts as
    unknown."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def read(self) -> dict[tuple[str, str], Link]:
        """From and to, by name, in both directions; one that was timed in one direction only holds for both."""
        found = {pair: link for pair, (link, at) in self._entries().items() if time.time() - at < _STALE_SECONDS}
        return {(b, a): link for (a, b), link in found.items()} | found

    def note(self, links: Mapping[tuple[str, str], Link]) -> None:
        """Remember these besides what is there; a folder that cannot be written is left as it is."""
        if not links:
            return
        entries = self._entries() | {pair: (link, time.time()) for pair, link in links.items() if _is_possible(*link)}
        rows = [{"from": a, "to": b, "link": link, "at": at} for (a, b), (link, at) in entries.items()]
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path) as part:
                part.write_text(json.dumps(rows, indent=1))

    def _entries(self) -> dict[tuple[str, str], tuple[Link, float]]:
        try:
            rows = json.loads(self._path.read_text())
        except (OSError, ValueError, RecursionError):
            return {}
        entries: dict[tuple[str, str], tuple[Link, float]] = {}
        for row in rows if isinstance(rows, list) else []:
            with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
                seconds, width, at = map(float, (*row["link"], row["at"]))
                if _is_possible(seconds, width):
                    entries[str(row["from"]), str(row["to"])] = (seconds, width), at
        return entries


def _is_possible(seconds: float, width: float) -> bool:
    return 0 <= seconds < _CALL_SECONDS and 1 <= width < 1e12


async def answering(channels: list[grpc.aio.Channel]) -> grpc.aio.Channel:
    """The first of several ways to a machine that answers; the others are closed. Raises AioRpcError where none
    does."""

    async def ask(channel: grpc.aio.Channel) -> grpc.aio.Channel:
        await service.RingStub(channel).Echo(wire.EchoRequest(), timeout=_CALL_SECONDS)
        return channel

    best, asking = None, [asyncio.create_task(ask(channel)) for channel in channels]
    try:
        failure: Exception | None = None
        for answered in asyncio.as_completed(asking):
            try:
                best = await answered
                return best
            except grpc.aio.AioRpcError as error:
                failure = error
        assert failure is not None, "there is a way to ask"
        raise failure
    finally:
        for task in asking:
            task.cancel()
        try:
            await asyncio.gather(*asking, return_exceptions=True)
        except asyncio.CancelledError:
            best = None  # nobody takes it
            raise
        finally:
            await asyncio.gather(*(channel.close() for channel in channels if channel is not best))


async def measured(stub: service.RingStub) -> wire.Connected:
    """What a node says of its link to the next one; nothing where that cannot be timed, for the ring runs without."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        seconds, width = await measure_link(stub, 1 << 18)
        return wire.Connected(link_seconds=seconds, link_bytes_per_second=width)
    return wire.Connected()
