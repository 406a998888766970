"""Bytes that a model takes on a device: weights, their repacked copies, cache, and llama.cpp's compute buffer. Pure.

Weights and cache are exact for the architectures that llama.cpp holds in one plain cache. The compute buffer is an
estimate: the larger of what one layer needs and what the logits need, as the graph allocator of llama.cpp 0.3.36 lays
them out with flash attention. A `Header` may be that of a split model, joined.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from .errors import ModelUnsupported
from .header import Header, TensorEntry
from .room import cell_bytes, padded
from .schemes import KINDS, SCHEMES, Scheme

_REPACKED: Mapping[str, tuple[str, ...]] = {
    "AVX2": ("Q4_0", "Q4_K", "IQ4_NL", "MXFP4"),
    "AVX512": ("Q2_K",),
    "DOTPROD": ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "MXFP4", "Q8_0", "Q1_0"),
    "MATMUL_INT8": ("Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q1_0"),
}
_N_ROWS_TOGETHER = 8
"""Rows that repacking interleaves; some kernels of ARM take 4, and matrices with other counts are rare."""
_TOKEN_BYTES, _MERGE_BYTES, _CODE_BYTES = 166, 99, 9 << 20
"""Of one entry of a vocabulary in tables of llama.cpp and ours, of a merge, of which vocabularies that have any have
about as many, and of code and small buffers. What was measured of SmolLM2, Qwen2.5 and Gemma 3, with 49, 152 and 262
thousand tokens, is within 2 MiB of it."""
_INDEX_BYTES = 24
"""Of one token of a batch: its position, where it goes in keys and values, and whether it gives logits."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes on one device."""

    weights_bytes: int = 0
    repacked_bytes: int = 0
    """Copies of weights in the order that the CPU's kernels want. Their originals stay mapped until the system wants
    the memory, and one that is embedding and output at once is needed twice."""
    cache_bytes: int = 0
    compute_bytes: int = 0
    spare_bytes: int = 0
    """Originals of repacked weights, which are not read again: the system can take their pages back."""
    idle_bytes: int = 0
    """Of the compute buffer, what is only written where logits of every token of a batch are wanted."""
    other_bytes: int = 0
    """The file's header, the vocabulary made of it, code and small buffers."""

    @property
    def total_bytes(self) -> int:
        """All that is allocated or mapped."""
        return self.weights_bytes + self.repacked_bytes + self.cache_bytes + self.compute_bytes + self.other_bytes

    @property
    def resident_bytes(self) -> int:
        """What a process holds once it has read a prompt and answers, of a machine that is not short of memory."""
        return self.total_bytes - self.idle_bytes

    @property
    def needed_bytes(self) -> int:
        """What must be there for it to run without reading weights from the disk again."""
        return self.total_bytes - self.spare_bytes

    @property
    def locked_bytes(self) -> int:
        """What must be there for it to run at all: everything but weights that are mapped from the file."""
        return self.total_bytes - self.weights_bytes


def scheme_of(entry: TensorEntry) -> Scheme:
    """The type of a tensor. Raises ModelUnsupported for one that is not in the table."""
    if entry.kind not in KINDS:
        raise ModelUnsupported(
            f"the tensor {entry.name!r} is of type {entry.kind}, which this version does not know; update localreason"
        )
    return KINDS[entry.kind]


def tensor_bytes(entry: TensorEntry) -> int:
    """Bytes of a tensor's data, without padding. Raises ModelUnsupported."""
    scheme = scheme_of(entry)
    return math.prod(entry.shape) // scheme.n_values * scheme.n_bytes


def weights_bytes(header: Header) -> int:
    """Bytes of all tensors, what llama.cpp calls the size of a model. Raises ModelUnsupported."""
    return sum(map(tensor_bytes, header.tensors))


def repacked_schemes(features: Iterable[str]) -> frozenset[str]:
    """Tensor types of which a CPU with these features, as llama.cpp names them, makes a copy when it loads them."""
    there = set(features)
    if "REPACK" not in there:
        return frozenset()
    return frozenset(name for feature, names in _REPACKED.items() if feature in there for name in names)


def repacked_bytes(header: Header, schemes: frozenset[str]) -> int:
    """Bytes of the copies of matrices of the given types; an embedding is one only where it is the output too."""
    return sum(tensor_bytes(entry) for entry in header.tensors if _is_repacked(entry, schemes, is_tied(header)))


def _is_repacked(entry: TensorEntry, schemes: frozenset[str], is_output_tied: bool) -> bool:
    if scheme_of(entry).name not in schemes or len(entry.shape) < 2 or entry.shape[1] % _N_ROWS_TOGETHER:
        return False
    return is_output_tied if entry.name.startswith("token_embd.") else True


def is_tied(header: Header) -> bool:
    """True where the embedding is the output matrix too."""
    return all(entry.name != "output.weight" for entry in header.tensors)


def token_bytes(header: Header, cache_type: str) -> float:
    """Cache bytes of one token in all layers that keep keys and values. `cache_type` is f16, q8_0 or q4_0."""
    values = header.values
    per_cell = cell_bytes(values, cache_type)
    n_key, n_value = (_number(values, f"attention.{name}_length") for name in ("key", "value"))
    if _number(values, "attention.key_length_mla") and n_key:  # latent attention keeps no values
        per_cell *= n_key / (n_key + n_value)
    n_recurrent, n_layers = _recurrent_layers(values), _number(values, "block_count")
    if n_recurrent and not _has_own_counts(values):  # `cell_bytes` has counted heads for every layer
        per_cell *= (n_layers - n_recurrent) / n_layers
    return per_cell


def cache_bytes(header: Header, n_context: int, cache_type: str, n_sequences: int = 1) -> int:
    """Bytes of keys and values of `n_context` cells, rounded up as llama.cpp does, and of the states of recurrent
    layers, one for each sequence."""
    n_cells = padded(n_context)
    states = _recurrent_layers(header.values) * n_sequences * _state_bytes(header.values)
    return round(token_bytes(header, cache_type) * n_cells) + states


def is_cache_possible(header: Header, cache_type: str) -> bool:
    """False where the heads do not fill the blocks of a packed cache type; llama.cpp refuses such a context."""
    n_heads = _number(header.values, "attention.head_count")
    width = _number(header.values, "embedding_length") // n_heads if n_heads else 0
    block = SCHEMES[cache_type.upper()].n_values
    return all(_number(header.values, f"attention.{name}_length", width) % block == 0 for name in ("key", "value"))


def compute_bytes(
    header: Header, n_batch: int, n_context: int, has_layers: bool = True, has_output: bool = True
) -> int:
    """An estimate of the compute buffer of a device that runs layers, the output or both for batches of `n_batch`."""
    values = header.values
    n_tokens = min(n_batch, n_context)
    n_embd, n_ff = _number(values, "embedding_length"), _number(values, "feed_forward_length")
    n_used, n_expert_ff = _number(values, "expert_used_count"), _number(values, "expert_feed_forward_length")
    inner = _number(values, "ssm.inner_size")
    # The mask is 16-bit; models with a sliding window have one for each kind of layer.
    n_masks = 2 if _number(values, "attention.sliding_window") else 1
    mask = 2 * n_context * n_masks if cell_bytes(values, "f16") else 0
    # Residual, normed input, and up, gate and their product, of each expert in use.
    layer = max(4 * n_embd + 3 * max(n_ff, n_used * n_expert_ff), 6 * n_embd, 7 * inner)
    most = max(
        4 * layer + mask + _INDEX_BYTES if has_layers else 0,
        4 * (_n_vocab(header) + 2 * n_embd) if has_output else 0,
        4 * n_embd + mask + _INDEX_BYTES,  # the inputs alone, which the host makes for a GPU
    )
    return n_tokens * most


def split_usage(
    header: Header,
    n_context: int,
    cache_type: str = "f16",
    n_batch: int = 128,
    n_sequences: int = 1,
    n_gpu_layers: int = 0,
    repacked: frozenset[str] = frozenset(),
) -> dict[str, Usage]:
    """Bytes on the host and, with `n_gpu_layers`, on a GPU: of the layers the last ones go there, after the output,
    which counts as one. `repacked` are the CPU's types of `repacked_schemes`."""
    n_layers = _number(header.values, "block_count")
    first = max(n_layers + 1 - n_gpu_layers, 0)
    host, gpu, copies, spare = 0, 0, 0, 0
    has_output_on_gpu, tied = n_gpu_layers > 0, is_tied(header)
    for entry in header.tensors:
        n_bytes, place = tensor_bytes(entry), _layer(entry.name)
        is_embedding = entry.name.startswith("token_embd.")
        is_on_gpu = has_output_on_gpu and not is_embedding and (place is None or place >= first)
        gpu += n_bytes if is_on_gpu or (is_embedding and tied and has_output_on_gpu) else 0
        host += 0 if is_on_gpu else n_bytes
        if not is_on_gpu and _is_repacked(entry, repacked, tied and not has_output_on_gpu):
            copies += n_bytes
            spare += 0 if is_embedding else n_bytes
    cache = cache_bytes(header, n_context, cache_type, n_sequences)
    n_there = min(max(n_layers - first, 0), n_layers) if n_gpu_layers else 0
    cache_there = cache * n_there // n_layers if n_layers else 0
    n_vocab = _n_vocab(header)
    rows = 4 * n_vocab * n_sequences
    there = compute_bytes(header, n_batch, n_context, n_there > 0, True) if n_gpu_layers else 0
    here = compute_bytes(header, n_batch, n_context, n_there < n_layers, not n_gpu_layers)
    written = compute_bytes(header, n_batch, n_context, n_there < n_layers, has_output=False)
    idle = max(0, here - max(written, rows))  # where there are few rows, the logits reuse what the layers wrote
    has_merges = header.values.get("tokenizer.ggml.model") == "gpt2"
    other = header.data_offset + (_TOKEN_BYTES + _MERGE_BYTES * has_merges) * n_vocab + _CODE_BYTES
    usage = {"host": Usage(host, copies, cache - cache_there, here + rows, spare, idle, other)}
    return usage | ({"gpu": Usage(gpu, 0, cache_there, there)} if n_gpu_layers else {})


def count_layers(header: Header) -> int:
    """Layers that tensors are named by."""
    return max((layer + 1 for entry in header.tensors if (layer := _layer(entry.name)) is not None), default=0)


def _layer(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "blk" and len(parts) > 2 and parts[1].isdigit() else None


def _n_vocab(header: Header) -> int:
    table = next((entry for entry in header.tensors if entry.name == "token_embd.weight"), None)
    return table.shape[1] if table is not None and len(table.shape) > 1 else 0


def _number(values: Mapping[str, Any], name: str, default: int = 0) -> int:
    """A number of the architecture, the largest of a list of them, `default` where there is none."""
    value = values.get(f"{values.get('general.architecture')}.{name}")
    found = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int) and item >= 0]
    return max(found, default=default)


def _has_own_counts(values: Mapping[str, Any]) -> bool:
    """True where the file says the heads of each layer, so that layers without a cache count 0."""
    return isinstance(values.get(f"{values.get('general.architecture')}.attention.head_count_kv"), list)


def _recurrent_layers(values: Mapping[str, Any]) -> int:
    """Layers that hold a state in place of keys and values."""
    n_layers = _number(values, "block_count")
    if not _state_bytes(values):
        return 0
    counts = values.get(f"{values.get('general.architecture')}.attention.head_count_kv")
    if isinstance(counts, list):
        return sum(1 for count in counts[:n_layers] if not count)
    interval = _number(values, "full_attention_interval")
    if interval:
        return n_layers - n_layers // interval
    return 0 if cell_bytes(values, "f16") else n_layers


def _state_bytes(values: Mapping[str, Any]) -> int:
    """Of one recurrent layer and one sequence, 32-bit: Mamba's convolution and state, or RWKV's."""
    n_embd, head = _number(values, "embedding_length"), _number(values, "wkv.head_size")
    if head:
        return 4 * n_embd * (_number(values, "token_shift_count", 2) + head)
    inner, state = _number(values, "ssm.inner_size"), _number(values, "ssm.state_size")
    n_shifted = max(_number(values, "ssm.conv_kernel") - 1, 0)
    return 4 * (n_shifted * (inner + 2 * _number(values, "ssm.group_count") * state) + inner * state)
