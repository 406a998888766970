"""Headers of models behind a server that gives ranges of bytes."""

import io
from collections.abc import Callable
from typing import BinaryIO, cast

from ..runtime.errors import ModelBroken
from ..runtime.header import read_stream
from ..runtime.parts import Piece

_FIRST_READ, _LARGEST_READ = 256 << 10, 8 << 20
_MOST_BYTES = 256 << 20
"""Of a remote header; a vocabulary of a million tokens with its merges takes less than a quarter of it."""
Fetch = Callable[[int, int], bytes]
"""Bytes of a file from a position on, as many as asked for."""


class RangeFile(io.RawIOBase):
    """A remote file that is read from its beginning on, ahead in growing ranges: most headers are one small read, and
    one with a large vocabulary is few."""

    def __init__(self, name: str, n_bytes: int, fetch: Fetch) -> None:
        self._name = name
        self._n_bytes = n_bytes
        self._fetch = fetch
        self._position = 0
        self._ahead = memoryview(b"")
        self._step = _FIRST_READ

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not self._ahead:
            wanted = min(self._step, self._n_bytes - self._position)
            if wanted <= 0:
                return 0
            if self._position >= _MOST_BYTES:
                raise ModelBroken(f"{self._name} has a header above {_MOST_BYTES} bytes; it is damaged, take another")
            self._ahead = memoryview(self._fetch(self._position, wanted))
            if len(self._ahead) != wanted:
                raise ModelBroken(f"{self._name}: {len(self._ahead)} of {wanted} bytes came; try again")
            self._step = min(2 * self._step, _LARGEST_READ)
        n = min(len(buffer), len(self._ahead))
        buffer[:n] = self._ahead[:n]
        self._ahead = self._ahead[n:]
        self._position += n
        return n


def read_remote(name: str, n_bytes: int, fetch: Fetch) -> Piece:
    """The header of a remote file of `n_bytes`. Raises ModelBroken, and what `fetch` raises."""
    with io.BufferedReader(RangeFile(name, n_bytes, fetch), 1 << 16) as file:
        return Piece(name, read_stream(cast(BinaryIO, file), name, n_bytes), n_bytes)
