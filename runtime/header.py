"""Reads metadata and tensor table of a GGUF file and refuses what would end the process inside llama.cpp.

llama.cpp asserts on some contradictions of a header instead of reporting them. Each check here stands for one that a
test has seen do so.
"""

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from .errors import ModelBroken, ModelNotFound
from .schemes import KINDS

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_ALIGNMENT = 32
_WHOLE_HEADS = ("qwen2", "qwen3", "qwen3moe")
"""Architectures whose keys and values are of one length, all of which is rotated."""
_PLAIN_HEADS = ("llama", *_WHOLE_HEADS)
"""Architectures of which every layer has heads, all of one length."""
_NO_WEIGHTS = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")
"""Types of what is computed on the way, of tables and of nothing at all."""
_TABLE = "tid2eid"
"""In the names of tables of integers, which are looked up."""
_MOST_LAYERS = 512
_MOST_EXPERTS = 1024
_MOST_TENSORS = 1 << 16
_LONGEST_READ = 256 << 20
"""Bytes of one value; the longest vocabularies' numbers take one or two MB."""
_LONGEST_KEPT = 4096
"""Arrays of more numbers than this are passed over."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A line of the tensor table: `shape` in ggml's order (columns first), `kind` ggml's number of the type, `offset`
    of the data from the beginning of the data part."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


@dataclass(slots=True)
class Header:
    """What stands before the weights. `kinds` are GGUF's numbers of the values' types (of the items, for an array);
    `data_offset` is where the data part begins."""

    values: dict[str, Any] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    tensors: list[TensorEntry] = field(default_factory=list)
    data_offset: int = 0
    n_bytes: int = 0


class _Damage(Exception):
    """The header ends early or contradicts itself."""


def read_header(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file: scalars, strings and short arrays of numbers. Raises ModelNotFound, ModelBroken."""
    return read_table(path, has_tensors=False).values


def read_table(path: Path, has_tensors: bool = True) -> Header:
    """Metadata and tensor table of a GGUF file. Raises ModelNotFound, ModelBroken."""
    try:
        if path.is_dir():
            raise ModelNotFound(f"{path} is a folder; give the .gguf file in it")
        if not path.is_file():
            raise ModelNotFound(f"there is no model file {path}; see `localreason models list`")
        with path.open("rb") as file:
            return read_stream(file, str(path), path.stat().st_size, has_tensors)
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"{path} cannot be read: {error}; check its name and its permissions") from error


def read_stream(file: BinaryIO, name: str, n_bytes: int, has_tensors: bool = True) -> Header:
    """Metadata and tensor table from the beginning of an open GGUF file of `n_bytes`, which is read in order and never
    sought in; `name` is for messages. Raises ModelBroken, and what reading raises."""
    try:
        return _read(file, name, n_bytes, has_tensors)
    except _Damage as error:
        raise ModelBroken(f"{name} is truncated or damaged: {error}; get it again") from error


def _read(file: BinaryIO, name: str, n_bytes: int, has_tensors: bool) -> Header:
    head = file.read(24)
    if head[:4] != b"GGUF":
        raise ModelBroken(
            f"{name} is not a GGUF file: it begins with {head[:4]!r}, not with b'GGUF'; convert or get it again"
        )
    if len(head) < 24:
        raise _Damage(f"it has {len(head)} bytes and the first part of its header takes 24")
    version, n_tensors, n_values = struct.unpack("<IQQ", head[4:])
    if version not in (2, 3):
        raise ModelBroken(f"{name} is GGUF version {version}; versions 2 and 3 are read, convert it again")
    # A tensor takes at least 24 bytes of header and a value 13: more than the file holds is a damaged count.
    if n_tensors * 24 + n_values * 13 > n_bytes:
        raise _Damage(f"it claims {n_tensors} tensors and {n_values} values in {n_bytes} bytes")
    reader = _Reader(file, n_bytes)
    header = Header(n_bytes=n_bytes)
    for _ in range(n_values):
        key = reader.text()
        header.values[key], header.kinds[key] = reader.value(reader.number("I"), key)
    if has_tensors:
        if n_tensors > _MOST_TENSORS:
            raise _Damage(f"it claims {n_tensors} tensors; at most {_MOST_TENSORS} are read")
        header.tensors = [reader.tensor() for _ in range(n_tensors)]
        alignment = header.values.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise _Damage(f"its alignment is {alignment!r}")
        header.data_offset = -(-file.tell() // alignment) * alignment
    return header


class _Reader:
    """Reads numbers and texts, never past the end."""

    def __init__(self, file: BinaryIO, n_bytes: int) -> None:
        self._file = file
        self._n_bytes = n_bytes

    def take(self, n: int) -> bytes:
        if n > min(self._n_bytes - self._file.tell(), _LONGEST_READ):
            raise _Damage(f"its header wants {n} bytes at {self._file.tell()}, it ends at {self._n_bytes}")
        return self._file.read(n)

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize("<" + form)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def tensor(self) -> TensorEntry:
        name, n_dimensions = self.text(), self.number("I")
        if not 1 <= n_dimensions <= 4:
            raise _Damage(f"the tensor {name!r} has {n_dimensions} dimensions")
        shape = tuple(self.number("Q") for _ in range(n_dimensions))
        if not all(shape):
            raise _Damage(f"the tensor {name!r} has the shape {shape}")
        return TensorEntry(name, shape, self.number("I"), self.number("Q"))

    def value(self, kind: int, key: str) -> tuple[Any, int]:
        """The value, None for what is passed over, and its type or that of its items."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind]), kind
        if kind == _STRING:
            return self.text(), kind
        if kind != _ARRAY:
            raise _Damage(f"the value {key!r} is of unknown kind {kind}")
        kind, n = self.number("I"), self.number("Q")
        if kind == _STRING:
            return self._texts(n, key), kind
        if kind not in _SCALARS:
            raise _Damage(f"the array {key!r} is of unknown kind {kind}")
        form = _SCALARS[kind]
        data = self.take(n * struct.calcsize("<" + form))
        return (list(struct.unpack(f"<{n}{form}", data)) if n <= _LONGEST_KEPT else None), kind

    def _texts(self, n: int, key: str) -> None:
        """Pass over texts; those of a vocabulary must differ, the empty ones apart."""
        if n * 8 > self._n_bytes:
            raise _Damage(f"the array {key!r} claims {n} texts")
        read, unpack = self._file.read, struct.Struct("<Q").unpack
        is_vocabulary, found, n_empty = key == "tokenizer.ggml.tokens", set[bytes](), 0
        for _ in range(n):
            size = unpack(self.take(8) if self._file.tell() + 8 > self._n_bytes else read(8))[0]
            text = self.take(size) if size > 1024 else read(size)
            if len(text) != size:
                raise _Damage(f"the array {key!r} is cut off")
            if is_vocabulary:
                found.add(text)
                n_empty += not text
        if is_vocabulary and len(found) - (b"" in found) != n - n_empty:
            raise _Damage(f"{n - n_empty - len(found)} of its {n} tokens stand twice in the vocabulary")


def check_tensors(header: Header, path: Path | str) -> None:
    """Refuse a vocabulary without a model, and types and shapes that llama.cpp asserts on. Raises ModelBroken."""
    if not header.tensors:
        raise ModelBroken(f"{path} holds no tensors: it is a vocabulary or half a file; give a whole model")
    for tensor in header.tensors:
        n_columns, scheme = tensor.shape[0], KINDS.get(tensor.kind)
        name = scheme.name if scheme else tensor.kind
        if len(tensor.shape) == 1 and name != "F32":
            problem = f"is of type {name}, and vectors have to be F32"
        elif name in _NO_WEIGHTS and _TABLE not in tensor.name:
            problem = f"is of type {name}, which no weights are"
        elif scheme and n_columns % scheme.n_values:  # what is not in the table llama.cpp refuses itself
            problem = f"has {n_columns} columns, and {name} takes {scheme.n_values} together"
        else:
            continue
        raise ModelBroken(f"{path}: the tensor {tensor.name!r:.80} {problem}; convert it again")
    _check_heads(header, path)


def _check_heads(header: Header, path: Path | str) -> None:
    """Where the layers' heads are listed, their keys have to be of that many."""
    values, architecture = header.values, header.values.get("general.architecture")
    counts = values.get(f"{architecture}.attention.head_count_kv")
    n_heads, n_embd = (values.get(f"{architecture}.{name}") for name in ("attention.head_count", "embedding_length"))
    length = values.get(f"{architecture}.attention.key_length")
    if length is None and isinstance(n_heads, int) and isinstance(n_embd, int) and n_heads > 0:
        length = n_embd // n_heads
    if architecture not in _PLAIN_HEADS or not isinstance(counts, list) or not isinstance(length, int):
        return
    rows = {tensor.name: tensor.shape[-1] for tensor in header.tensors}
    for i, count in enumerate(counts):
        found = rows.get(f"blk.{i}.attn_k.weight", count * length)
        if not count or found != count * length:
            raise ModelBroken(
                f"{path} is damaged: layer {i} has keys of {found} numbers and {count} heads of {length}; get it again"
            )


def check_header(values: dict[str, Any], path: Path | str) -> None:
    """Refuse numbers that llama.cpp asserts on. Raises ModelBroken."""
    architecture = values.get("general.architecture")

    def highest(name: str, default: float = 0) -> float:
        """The largest of a number or of an array of them."""
        value = values.get(f"{architecture}.{name}", default)
        found = value if isinstance(value, list) else [value]
        return max((item for item in found if isinstance(item, int | float)), default=default)

    n_layers, n_experts, n_used = highest("block_count", 1), highest("expert_count"), highest("expert_used_count")
    n_groups, n_groups_used = highest("expert_group_count"), highest("expert_group_used_count")
    limits = [
        ("block_count", n_layers, 1, _MOST_LAYERS),
        ("nextn_predict_layers", highest("nextn_predict_layers"), 0, n_layers),
        ("expert_count", n_experts, 0, _MOST_EXPERTS),
        ("expert_used_count", n_used, 1 if n_experts else 0, n_experts),
        ("expert_group_count", n_groups, 0, max(n_experts - 1, 0)),
        ("attention.layer_norm_rms_epsilon", highest("attention.layer_norm_rms_epsilon"), 0, 1),
        ("attention.layer_norm_epsilon", highest("attention.layer_norm_epsilon"), 0, 1),
    ]
    if n_groups > 1:
        limits.append(("expert_group_used_count", n_groups_used, 1, n_groups - 1))
        limits.append(("expert_count modulo expert_group_count", n_experts % n_groups, 0, 0))
    if architecture in _WHOLE_HEADS:
        width = highest("embedding_length") // max(1, highest("attention.head_count", 1))
        key = highest("attention.key_length", width)
        limits.append(("attention.value_length", highest("attention.value_length", width), key, key))
        limits.append(("rope.dimension_count", highest("rope.dimension_count", key), key, key))
    for name, value, low, high in limits:
        if not low <= value <= high:
            raise ModelBroken(f"{path} is damaged: {architecture}.{name} is {value}, not {low} to {high}; get it again")
    scaling = values.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in _ROPE_SCALINGS:
        raise ModelBroken(f"{path} is damaged: {architecture}.rope.scaling.type is {scaling!r}; get it again")
    alignment = values.get("general.alignment", _ALIGNMENT)
    if not isinstance(alignment, int) or alignment < _ALIGNMENT or alignment % _ALIGNMENT:
        raise ModelBroken(
            f"{path} is aligned to {alignment} bytes and needs a multiple of {_ALIGNMENT}; convert it again"
        )
