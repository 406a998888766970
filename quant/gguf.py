"""Model files as tensors: the table of one, and a run of its layers as a file of its own.

A window [first, end) of a model is a GGUF of the same architecture whose layers are renumbered from 0 and whose
quantised bytes are copied untouched. A middle window carries 32 rows of zeros as its vocabulary; the last one carries
the output matrix under the name of the embedding, which llama.cpp takes for both, so that only one large matrix is in
the file. A window has no tokens in: it is fed with activations.

What may be cut is a table: `ARCHITECTURES`. An architecture is entered when a test has compared every cut of a model
of it with the whole, bit for bit.
"""

import hashlib
import math
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import ModelBroken, ModelUnsupported
from ..runtime.header import Header, TensorEntry, check_header
from ..runtime.memory import scheme_of, tensor_bytes
from ..runtime.native import dequantize
from ..runtime.parts import Piece, join, read_local
from ..runtime.schemes import KINDS, SCHEMES

ALIGNMENT = 32
_N_STUB = 32
"""Rows of the vocabulary that stands in for none."""
_UINT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 6, 7, 8, 9
_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LAYER = re.compile(r"blk\.([0-9]{1,9})\..+", re.DOTALL)
_F32, _F16 = SCHEMES["F32"].kind, SCHEMES["F16"].kind
_READ_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Architecture:
    """How an architecture is cut. `pattern` is the period of sliding-window layers where the file does not say which
    layers they are; `is_scaled`: embeddings are multiplied by the root of their width; `uncut`: layer counts that
    llama.cpp treats apart, so that no part may have them and a whole that has them cannot be cut."""

    pattern: int | None = None
    is_scaled: bool = False
    uncut: tuple[int, ...] = ()


ARCHITECTURES = {
    "llama": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "qwen3moe": Architecture(),
    # 62 layers mean Gemma 3 27B, whose attention is scaled otherwise.
    "gemma3": Architecture(pattern=6, is_scaled=True, uncut=(62,)),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a model; `shape` columns first, `offset` from the beginning of the file, or of the first of several
    that are laid one behind the other."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int
    n_bytes: int

    @property
    def type_name(self) -> str:
        return KINDS[self.kind].name


@dataclass(frozen=True, slots=True)
class Part:
    """The data of one tensor of a window: a range of the source model, or bytes made here (`data`)."""

    n_bytes: int
    source_offset: int | None = None
    data: bytes = b""


@dataclass(frozen=True, slots=True)
class Window:
    """The recipe of a window file: its header, then the parts, each padded to 32 bytes."""

    first: int
    end: int
    is_last: bool
    header: bytes
    parts: tuple[Part, ...]

    @property
    def n_bytes(self) -> int:
        return len(self.header) + sum(padded(part.n_bytes) for part in self.parts)


def padded(n: int) -> int:
    """`n` bytes and what fills them up to the alignment."""
    return -(-n // ALIGNMENT) * ALIGNMENT


def locate(files: Iterable[tuple[Path, int]], offset: int) -> tuple[Path, int]:
    """The one of files of these sizes, laid one behind the other, that a byte is in, and where. Raises ValueError."""
    for path, n_bytes in files:
        if offset < n_bytes:
            return path, offset
        offset -= n_bytes
    raise ValueError(f"byte {offset} lies behind the end")


def blocks(path: Path, offset: int, n_bytes: int) -> Iterator[bytes]:
    """A range of a file in blocks. Raises ModelBroken where the file shrank or cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            while n_bytes:
                block = file.read(min(n_bytes, _READ_BYTES))
                if not block:
                    raise ModelBroken(f"{path} became shorter while it was read; get it again")
                n_bytes -= len(block)
                yield block
    except OSError as error:
        raise ModelBroken(f"{path} cannot be read: {error.strerror}") from error


class ModelFile:
    """A GGUF model's metadata and tensor table, of one file or of several parts; the weights stay where they are."""

    def __init__(self, path: Path, pieces: Sequence[Piece] = ()) -> None:
        """`path` is the file or any of the parts; `pieces` are the headers where its weights are not on this machine.
        Raises ModelNotFound, ModelBroken, ModelUnsupported."""
        pieces = pieces or read_local(path)
        self.files = [(Path(piece.name), piece.n_bytes) for piece in pieces]
        self.path = self.files[0][0]
        self.header: Header = join(pieces)
        check_header(self.header.values, path)
        self.tensors: dict[str, Tensor] = {}
        start = 0
        for piece in pieces:
            self.tensors |= {entry.name: self._tensor(entry, piece, start) for entry in piece.header.tensors}
            start += piece.n_bytes
        self.architecture: str = str(self.header.values.get("general.architecture", ""))

    def _tensor(self, entry: TensorEntry, piece: Piece, start: int) -> Tensor:
        size, n_values = math.prod(entry.shape), scheme_of(entry).n_values
        offset = piece.header.data_offset + entry.offset
        if entry.shape[0] % n_values or not 0 < size < 1 << 48:
            raise ModelBroken(f"{piece.name}: the tensor {entry.name!r} has the shape {entry.shape}; get it again")
        total = tensor_bytes(entry)
        if offset + total > piece.n_bytes:
            raise ModelBroken(
                f"{piece.name} is truncated: the tensor {entry.name!r} ends at {offset + total} and the file at "
                f"{piece.n_bytes}; get it again"
            )
        return Tensor(entry.name, entry.shape, entry.kind, start + offset, total)

    def _number(self, name: str, default: int | None = None) -> int:
        value = self.header.values.get(f"{self.architecture}.{name}", default)
        if not isinstance(value, int):
            raise ModelBroken(f"{self.path} does not say {self.architecture}.{name}; get it again")
        return value

    @cached_property
    def n_layers(self) -> int:
        return self._number("block_count")

    @cached_property
    def n_embd(self) -> int:
        return self._number("embedding_length")

    @cached_property
    def n_context_train(self) -> int:
        return self._number("context_length", 4096)

    @cached_property
    def embedding(self) -> Tensor:
        """The input table, one row a token."""
        return self._one("token_embd.weight")

    @cached_property
    def output(self) -> Tensor:
        """The output matrix, which may be the input table again."""
        return self.tensors.get("output.weight") or self.embedding

    @property
    def n_vocab(self) -> int:
        if len(self.embedding.shape) != 2:
            raise ModelBroken(f"{self.path}: the embedding has the shape {self.embedding.shape}; get it again")
        return self.embedding.shape[1]

    def _one(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise ModelBroken(f"{self.path} has no tensor {name!r}; get it again")
        return self.tensors[name]

    def layer(self, i: int) -> list[Tensor]:
        """The tensors of one layer in the order of the file."""
        return self._layers[i]

    @cached_property
    def _layers(self) -> list[list[Tensor]]:
        layers: list[list[Tensor]] = [[] for _ in range(self.n_layers)]
        for tensor in self.tensors.values():
            found = _LAYER.fullmatch(tensor.name)
            if found and int(found[1]) < self.n_layers:
                layers[int(found[1])].append(tensor)
        empty = next((i for i, layer in enumerate(layers) if not layer), None)
        if empty is not None:
            raise ModelBroken(f"{self.path} has no tensors of layer {empty} of {self.n_layers}; get it again")
        return layers

    def check_cut(self) -> Architecture:
        """How the model is cut. Raises ModelUnsupported where that is not known to be exact."""
        rule = ARCHITECTURES.get(self.architecture)
        if rule is None:
            raise ModelUnsupported(
                f"{self.path}: the architecture {self.architecture!r} is not known to give the same answers cut in "
                f"windows; known are {', '.join(ARCHITECTURES)}"
            )
        if self.n_layers in rule.uncut:
            raise ModelUnsupported(
                f"{self.path}: a {self.architecture} of {self.n_layers} layers cannot be cut exactly; "
                f"run it on one machine"
            )
        # The table of the embedding is in no window, so llama.cpp does not look at it.
        for tensor in (self.embedding, self.output):
            if tensor.shape != (self.n_embd, self.n_vocab):
                raise ModelBroken(
                    f"{self.path}: {tensor.name!r} has the shape {tensor.shape}, not {(self.n_embd, self.n_vocab)}; "
                    f"get it again"
                )
        return rule

    @cached_property
    def _sliding(self) -> list[bool]:
        """Which layers look at a sliding window of the context only."""
        rule = self.check_cut()
        if rule.pattern is None or not self._number("attention.sliding_window", 0):
            return [False] * self.n_layers
        listed = self.header.values.get(f"{self.architecture}.attention.sliding_window_pattern")
        if isinstance(listed, list):
            return [bool(item) for item in listed]
        period = self._number("attention.sliding_window_pattern", rule.pattern)
        return [period == 0 or i % period < period - 1 for i in range(self.n_layers)]

    @property
    def has_sliding_window(self) -> bool:
        """True where some layers look at a sliding window of the context only."""
        return any(self._sliding)

    def is_window(self, first: int, end: int) -> bool:
        """True where layers [first, end) can be cut out. llama.cpp ends the process on sliding layers only, since
        one of its two caches would be empty."""
        sliding = self._sliding[first:end]
        return end - first not in self.check_cut().uncut and (not any(sliding) or not all(sliding))

    def window(self, first: int, end: int, is_last: bool) -> Window:
        """The recipe of the file of layers [first, end); `is_last` adds the norm and the output matrix.

        Raises ModelUnsupported for an architecture or a cut that is not known to be exact.
        """
        self.check_cut()
        if not 0 <= first < end <= self.n_layers or (is_last and end != self.n_layers):
            raise ValueError(f"layers {first} to {end} of {self.n_layers} are no window")
        if not self.is_window(first, end):
            raise ModelUnsupported(
                f"{self.path}: layers {first} to {end} cannot be a window of their own; cut elsewhere"
            )
        named = [*self._ends(is_last)]
        for i in range(first, end):
            named += [
                (f"blk.{i - first}.{tensor.name.split('.', 2)[2]}", tensor, Part(tensor.n_bytes, tensor.offset))
                for tensor in self.layer(i)
            ]
        values = _values(self._metadata(first, end, is_last))
        n_values, packed_values = len(values), b"".join(values)
        table, offset = bytearray(), 0
        for name, tensor, part in named:
            table += _text(name) + struct.pack("<I", len(tensor.shape))
            table += struct.pack(f"<{len(tensor.shape)}QIQ", *tensor.shape, tensor.kind, offset)
            offset += padded(part.n_bytes)
        header = b"GGUF" + struct.pack("<IQQ", 3, len(named), n_values) + packed_values + bytes(table)
        header = header.ljust(padded(len(header)), b"\0")
        return Window(first, end, is_last, header, tuple(part for _, _, part in named))

    def _ends(self, is_last: bool) -> Iterator[tuple[str, Tensor, Part]]:
        """What is in the file besides layers: the vocabulary's matrix, the norm, factors of the rotation."""
        output, norm = self.output, self._one("output_norm.weight")
        if is_last:
            yield "token_embd.weight", output, Part(output.n_bytes, output.offset)
            yield norm.name, norm, Part(norm.n_bytes, norm.offset)
        else:
            zeros, ones = bytes(2 * _N_STUB * self.n_embd), np.ones(self.n_embd, "<f4").tobytes()
            stub = Tensor("token_embd.weight", (self.n_embd, _N_STUB), _F16, 0, len(zeros))
            yield stub.name, stub, Part(len(zeros), data=zeros)
            yield norm.name, Tensor(norm.name, (self.n_embd,), _F32, 0, len(ones)), Part(len(ones), data=ones)
        for tensor in self.tensors.values():
            if tensor.name.startswith("rope_"):
                yield tensor.name, tensor, Part(tensor.n_bytes, tensor.offset)

    def _metadata(self, first: int, end: int, is_last: bool) -> Iterator[tuple[str, int, Any]]:
        """Key, type and value of what the window's file says; arrays with an item a layer are sliced."""
        architecture, sliding = self.architecture, self._sliding[first:end]
        yield "general.architecture", _STRING, architecture
        yield "tokenizer.ggml.model", _STRING, "none"
        yield f"{architecture}.vocab_size", _UINT32, self.output.shape[1] if is_last else _N_STUB
        yield f"{architecture}.block_count", _UINT32, end - first
        passed = {f"{architecture}.{name}" for name in ("vocab_size", "block_count")}
        if self.check_cut().pattern:
            pattern = f"{architecture}.attention.sliding_window_pattern"
            passed.add(pattern)
            if any(sliding):
                yield pattern, _BOOL, sliding
            else:  # and no empty cache for them either
                passed.add(f"{architecture}.attention.sliding_window")
        for key, value in self.header.values.items():
            if not key.startswith(f"{architecture}.") or key in passed or value is None:
                continue
            if isinstance(value, list) and len(value) == self.n_layers:
                value = value[first:end]
            yield key, self.header.kinds[key], value

    def embed(self, tokens: list[int]) -> NDArray[np.float32]:
        """The input of the first window, shape (n_tokens, n_embd): rows of the embedding as llama.cpp makes them."""
        rows = self._rows[np.asarray(tokens)]
        rows = (
            rows.view(np.float32) if self.embedding.kind == _F32 else dequantize(rows, self.embedding.kind, self.n_embd)
        )
        return rows * self._scale if self._scale is not None else rows

    @cached_property
    def _scale(self) -> np.float32 | None:
        return np.float32(math.sqrt(self.n_embd)) if self.check_cut().is_scaled else None

    @cached_property
    def _rows(self) -> NDArray[Any]:
        """The input table's bytes, mapped."""
        table = self.embedding
        path, offset = locate(self.files, table.offset)
        return np.memmap(path, np.uint8, "r", offset, (table.shape[1], table.n_bytes // table.shape[1]))

    def digest(self, part: Part) -> bytes:
        """The SHA-256 of a part's bytes, read from the file."""
        sha = hashlib.sha256(part.data)
        for block in self.read(part):
            sha.update(block)
        return sha.digest()

    def read(self, part: Part, start: int = 0) -> Iterator[bytes]:
        """The bytes of a part of the source from `start` on, in blocks. Raises ModelBroken."""
        if part.source_offset is not None:
            path, offset = locate(self.files, part.source_offset)
            yield from blocks(path, offset + start, part.n_bytes - start)


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _values(items: Iterator[tuple[str, int, Any]]) -> list[bytes]:
    """Metadata as GGUF writes it."""
    packed = []
    for key, kind, value in items:
        if isinstance(value, list):
            body = struct.pack("<IIQ", _ARRAY, kind, len(value)) + struct.pack(f"<{len(value)}{_FORMS[kind]}", *value)
        elif kind == _STRING:
            body = struct.pack("<I", _STRING) + _text(value)
        else:
            body = struct.pack(f"<I{_FORMS[kind]}", kind, value)
        packed.append(_text(key) + body)
    return packed
