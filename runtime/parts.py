"""Headers of models that may be in several files."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .errors import ModelBroken, ModelNotFound
from .header import Header, check_tensors, read_table

_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


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


def read_local(path: Path) -> list[Piece]:
    """The headers of a file and, where it is one of several parts, of them all in order. Raises ModelNotFound for a
    file or part that is not there, ModelBroken."""
    own = Piece(str(path), header := read_table(path), header.n_bytes)
    names = part_names(path.name) if own.n_split > 1 else [path.name]
    if path.name not in names:
        raise ModelBroken(f"{path} is one of {own.n_split} parts and counts them otherwise in its name; get it again")
    pieces = []
    for there in map(path.with_name, names):
        if there != path and not there.exists():
            raise ModelNotFound(f"{path} is one of {len(names)} parts and {there} is missing; put all into one folder")
        pieces.append(own if there == path else Piece(str(there), header := read_table(there), header.n_bytes))
    return pieces


def part_names(name: str) -> list[str]:
    """The names of all files of a model by that of one: `m-00001-of-00003.gguf` stands for three."""
    part = _PART.search(name)
    if not part:
        return [name]
    stem, count = name[: part.start()], part[2]
    return [f"{stem}-{i:05}-of-{count}.gguf" for i in range(1, int(count) + 1)]


def is_further_part(name: str) -> bool:
    """True for a file's name that says a part of a model behind the first."""
    part = _PART.search(name)
    return bool(part and int(part[1]) != 1)


def stem(name: str) -> str:
    """What a model is called by the name of its file, or of a part."""
    return _PART.sub("", name).removesuffix(".gguf")


def join(pieces: Sequence[Piece]) -> Header:
    """The values of the first file and the tensors of all, each with its offset within its own file's data.

    Raises ModelBroken where the files are not all the parts of one model, in order, or hold no tensors.
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
    check_tensors(joined, first.name)
    return joined
