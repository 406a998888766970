"""Importance matrices: mean squares of each weight column's inputs, by which quantisation decides what may be rough.

Both forms of llama.cpp are read: the GGUF one (`<tensor>.in_sum2`, `<tensor>.counts`) and the older `.dat`. The GGUF
one is written.
"""

import contextlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import InputError, ModelError, OutputError
from ..runtime.files import replacing
from ..runtime.header import Header, read_table

_F32 = int(gguf.GGMLQuantizationType.F32)
_SUMS, _COUNTS = ".in_sum2", ".counts"
_MOST_ENTRIES, _LONGEST_NAME, _MOST_VALUES = 1 << 16, 256, 1 << 30


@dataclass(frozen=True, slots=True)
class Entry:
    """Sums of squared inputs of one tensor, shape (n_matrices, n_columns), and the rows each was summed over."""

    sums: NDArray[np.float32]
    counts: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Importance:
    """An importance matrix. `dataset` names the text it is from, empty where that is not known; `n_tokens` is known
    while it is new."""

    entries: Mapping[str, Entry]
    n_chunks: int
    chunk_tokens: int
    dataset: str = ""
    n_tokens: int | None = None
    is_whole: bool = True
    """False where the reading was interrupted."""

    @property
    def reached_share(self) -> float:
        """The share of matrices that any token reached: below 1 where experts went without."""
        counts = np.concatenate([entry.counts for entry in self.entries.values()])
        return float((counts > 0).mean())

    def weights(self) -> dict[str, NDArray[np.float32]]:
        """Mean squares by tensor, flat; 1 for experts that no token reached, so that all their columns count alike."""
        found = {}
        for name, entry in self.entries.items():
            counts = entry.counts[:, None]
            mean = np.where(counts > 0, entry.sums / np.maximum(counts, 1e-30), np.float32(1))
            found[name] = np.ascontiguousarray(mean, np.float32).ravel()
        return found


def read_importance(path: Path) -> Importance:
    """An importance matrix of either form. Raises InputError."""
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        found = _read_gguf(path) if is_gguf else _read_legacy(path)
    except OSError as error:
        raise InputError(f"the importance matrix {path} cannot be read: {error.strerror}; check its name") from error
    except ModelError as error:
        raise InputError(f"the importance matrix {error}") from error
    for name, entry in found.entries.items():
        if not (np.isfinite(entry.sums).all() and np.isfinite(entry.counts).all()) or entry.sums.min() < 0:
            raise InputError(f"{path}: the sums of {name!r} are not finite and positive; make the matrix again")
    return found


def _read_gguf(path: Path) -> Importance:
    header = read_table(path)
    arrays = {tensor.name: _array(header, path, i) for i, tensor in enumerate(header.tensors)}
    names = sorted(name.removesuffix(_SUMS) for name in arrays if name.endswith(_SUMS))
    if not names:
        raise InputError(f"{path} is a GGUF file without sums ({_SUMS}): it is no importance matrix; give another")
    entries = {}
    for name in names:
        sums, counts = arrays[name + _SUMS], arrays.get(name + _COUNTS)
        if counts is None or not counts.size or sums.size % counts.size:
            raise InputError(f"{path}: the sums of {name!r} have no counts that fit; make the matrix again")
        entries[name] = Entry(sums.reshape(counts.size, -1), counts.ravel())
    n_chunks, chunk_tokens = (header.values.get(f"imatrix.chunk_{name}", 0) for name in ("count", "size"))
    if not isinstance(n_chunks, int) or not isinstance(chunk_tokens, int):
        raise InputError(f"{path} counts {n_chunks!r:.40} chunks of {chunk_tokens!r:.40} tokens; make the matrix again")
    return Importance(entries, n_chunks, chunk_tokens)


def _array(header: Header, path: Path, i: int) -> NDArray[np.float32]:
    tensor = header.tensors[i]
    size, start = math.prod(tensor.shape), header.data_offset + tensor.offset
    if tensor.kind != _F32 or not size or start + 4 * size > header.n_bytes:
        raise InputError(f"{path}: {tensor.name!r} is no whole F32 array; it is damaged or no importance matrix")
    return np.fromfile(path, "<f4", size, offset=start).astype(np.float32, copy=False)


def _read_legacy(path: Path) -> Importance:
    """The form before 2025: sums are divided by their counts already and multiplied by the number of calls."""
    data, place, entries = path.read_bytes(), 0, {}

    def take(n: int) -> bytes:
        nonlocal place
        if not 0 <= n <= len(data) - place:
            raise InputError(f"{path} is no importance matrix, or it is cut off at {len(data)} bytes; make it again")
        place += n
        return data[place - n : place]

    def number(most: int) -> int:
        value = struct.unpack("<i", take(4))[0]
        if not 0 <= value <= most:
            raise InputError(f"{path} is neither a GGUF file nor an older importance matrix; give another")
        return value

    n_entries = number(_MOST_ENTRIES)
    for _ in range(n_entries):
        name = take(number(_LONGEST_NAME)).decode("utf-8", "replace")
        n_calls, n_values = number(2**31 - 1), number(_MOST_VALUES)
        sums = np.frombuffer(take(4 * n_values), "<f4").astype(np.float32)
        if not n_values:
            raise InputError(f"{path}: {name!r} has no values; make the matrix again")
        entries[name] = Entry(sums[None], np.asarray([max(n_calls, 1)], np.float32))
    if not entries:
        raise InputError(f"{path} holds no entries; make the matrix again")
    n_chunks, dataset = 0, ""
    if place < len(data):
        n_chunks = number(2**31 - 1)
    if place < len(data):
        dataset = take(number(1 << 16)).decode("utf-8", "replace")
    return Importance(entries, n_chunks, 0, dataset)


def write_importance(importance: Importance, path: Path) -> None:
    """Write the GGUF form as llama-imatrix does; the file appears whole or not at all. Raises OutputError."""
    writer = gguf.GGUFWriter(None, "")
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [importance.dataset])
    writer.add_uint32("imatrix.chunk_count", importance.n_chunks)
    writer.add_uint32("imatrix.chunk_size", importance.chunk_tokens)
    for name, entry in sorted(importance.entries.items()):
        writer.add_tensor(name + _SUMS, np.ascontiguousarray(entry.sums, np.float32))
        writer.add_tensor(name + _COUNTS, np.ascontiguousarray(entry.counts, np.float32)[:, None])
    try:
        with replacing(path) as part, contextlib.closing(writer):
            writer.write_header_to_file(part)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; give another -o") from error
