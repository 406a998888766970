"""Headers of models that may be in several files, on this machine or behind a server that gives ranges of bytes."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from ..runtime.errors import ModelBroken, ModelNotFound
from ..runtime.header import Header, read_stream, read_table

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
_FIRST_READ, _LARGEST_READ = 256 << 10, 8 << 20
_MOST_BYTES = 256 << 20
"""Of a remote header; a vocabulary of a million tokens with its merges takes less than a quarter of it."""
Fetch = Callable[[int, int], bytes]
"""Bytes of a file from a position on, as many as asked for."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The header of one file of a model, and its size in bytes."""

    name: str
    header: Header
    n_bytes: int

    @property
    def n_split(self) -> int:
        """Files that the model was split into."""
        count = self.header.values.get("split.count", 1)
        return count if isinstance(count, int) and count > 1 else 1


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


def read_local(path: Path) -> list[Piece]:
    """The headers of a file and, where it is one of several parts, of them all in order. Raises ModelNotFound for a
    file or part that is not there, ModelBroken."""
    pieces = []
    for file in part_names(path.name):
        there = path.with_name(file)
        if there != path and not there.exists():
            n = len(part_names(path.name))
            raise ModelNotFound(f"{path} is one of {n} parts and {there} is missing; put all {n} into one folder")
        pieces.append(Piece(str(there), header := read_table(there), header.n_bytes))
    return pieces


def part_names(name: str) -> list[str]:
    """The names of all files of a model by that of one: `m-00001-of-00003.gguf` stands for three."""
    part = _PART.search(name)
    if not part:
        return [name]
    stem, count = name[: part.start()], part[2]
    return [f"{stem}-{i:05}-of-{count}.gguf" for i in range(1, int(count) + 1)]


def join(pieces: Sequence[Piece]) -> Header:
    """The values of the first file and the tensors of all, each with its offset within its own file's data.

    Raises ModelBroken where the files are not all the parts of one model, in order.
    """
    first = pieces[0]
    if first.n_split != len(pieces):
        raise ModelBroken(
            f"{first.name} is one of {first.n_split} parts and {len(pieces)} were found by its name; "
            f"name them as in model-00001-of-{first.n_split:05}.gguf"
        )
    joined = Header(first.header.values, first.header.kinds, [], first.header.data_offset, 0)
    for i, piece in enumerate(pieces):
        values = piece.header.values
        number = values.get("split.no", 0)
        if piece.n_split != len(pieces) or number != i:
            raise ModelBroken(
                f"{piece.name} says that it is part {number} of {piece.n_split}, counted from 0, and it stands for "
                f"part {i} of {len(pieces)}; get the parts again under their own names"
            )
        joined.tensors += piece.header.tensors
        joined.n_bytes += piece.n_bytes
    n_tensors = first.header.values.get("split.tensors.count", len(joined.tensors))
    if n_tensors != len(joined.tensors):
        raise ModelBroken(
            f"{first.name} says that the parts hold {n_tensors} tensors and they hold {len(joined.tensors)}; "
            f"get them again"
        )
    return joined
