"""What a head says to a node that it holds: read with deadlines, and checked before anything is done with it."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable

from ..runtime.native import CACHE_TYPES
from .codec import PROTOCOL
from .errors import ClusterError, HeadLost, ProtocolError
from .store import Piece, Recipe
from .window import WindowOptions
from .wire import ring_pb2 as wire

_SILENCE_SECONDS = 10.0
"""A head that sends no beat for so long is gone."""
_WORD_SECONDS = 60.0
"""Longest wait for the head's next word while a window is put together."""


class Inlet:
    """What the head says, each word awaited with a deadline, for as long as it is paired."""

    def __init__(self, messages: AsyncIterator[wire.ToNode], is_paired: Callable[[], bool]) -> None:
        self._messages = messages
        self._is_paired = is_paired

    async def _read(self, seconds: float) -> wire.ToNode | None:
        """None where the head has ended the session."""
        try:
            message = await asyncio.wait_for(anext(self._messages, None), seconds)
        except TimeoutError as error:
            raise HeadLost(f"the head said nothing for {seconds:.0f} s; the session is over") from error
        if message is not None and not self._is_paired():
            raise ClusterError("the head is not paired any more; the session is over")
        return message

    async def next(self, kind: str, seconds: float = _WORD_SECONDS) -> wire.ToNode:
        """The next word besides beats, which must be of that kind. Raises ProtocolError, HeadLost."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            message = await self._read(_SILENCE_SECONDS)
            if message is None:
                raise HeadLost("the head ended the session")
            found = message.WhichOneof("message")
            if found == kind:
                return message
            if found != "beat":
                raise ProtocolError(f"{found} came where {kind} was awaited")
        raise HeadLost(f"the head sent no {kind} for {seconds:.0f} s; the session is over")

    async def drain(self) -> None:
        """Read until the head ends the session. Raises HeadLost, and ProtocolError for anything but a beat."""
        while (message := await self._read(_SILENCE_SECONDS)) is not None:
            if message.WhichOneof("message") != "beat":
                raise ProtocolError(f"{message.WhichOneof('message')} came while the ring was running")


def read_options(opening: wire.Open) -> WindowOptions:
    """How the windows are to be opened. Raises ProtocolError for anything out of bounds."""
    if opening.protocol != PROTOCOL:
        raise ProtocolError(f"{opening.protocol} is spoken by the head and {PROTOCOL} here; update the older one")
    limits = (
        ("session", len(opening.session), 16, 32),
        ("windows", len(opening.windows), 1, 512),
        ("n_context", opening.n_context, 16, 1 << 24),
        ("n_sequences", opening.n_sequences, 1, 256),
        ("n_batch", opening.n_batch, 1, 4096),
        ("neighbours", len(opening.neighbours), 0, 64),
    )
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise ProtocolError(f"{name} is {value}; {low} to {high} are possible")
    if opening.cache_type not in CACHE_TYPES:
        raise ProtocolError(f"cache type {opening.cache_type[:16]!r} is not known here; update the older one")
    return WindowOptions(opening.n_context, opening.n_sequences, opening.n_batch, opening.cache_type)


def read_recipe(message: wire.WindowFile) -> Recipe:
    """What a window's file is made of. Raises ProtocolError for a name that is not one."""
    pieces = tuple(Piece(part.sha256, part.n_bytes, part.source_offset) for part in message.parts)
    name = message.source_name
    if "/" in name or "\\" in name or name.startswith(".") or len(name) > 255:
        raise ProtocolError(f"a model file named {name[:64]!r} came; names have no folders")
    return Recipe(message.header, pieces, name, message.source_bytes)
