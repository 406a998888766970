"""Times what decoding is made of: weights through the cores or the GPU, plain memory, the disk."""

import contextlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from ..runtime import native
from ..runtime.cache import Cache
from ..runtime.engine import Span
from ..runtime.errors import InputError
from .codec import MICRO_BATCH

_N_VOCAB, _N_HEADS, _N_CONTEXT = 256, 8, 256
_LEAST_SECONDS, _MOST_SECONDS, _MOST_STEPS = 0.25, 2.0, 64
_ROWS_SECONDS = 0.1
ROWS = (2, 4, 8, 16)
"""Rows of the steps that are timed beside those of one: kernels work in tiles, and what lies between is no line."""
_PAGE_BYTES, _N_PAGES = 64 << 10, 64
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Speeds:
    """Bytes of weights per second of decode; bytes times tokens per second of prefill; the seconds of a step of `ROWS`
    over those of one row."""

    decode: float
    prefill: float
    rows: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Disk:
    """Bytes per second; `is_cold` if the pages could be dropped before they were timed."""

    sequential: float
    random: float
    is_cold: bool


def speeds(kind: str, n_threads: int, folder: Path, n_bytes: int, n_embd: int) -> Speeds:
    """Time a llama model of zeros of one ggml type on the CPU, of at least `n_bytes` and one layer.

    Zeros take as long as other weights: no kernel looks at them. Raises InputError for a type that weights cannot
    have, and what opening a model raises.
    """
    with _opened(kind, n_threads, folder, n_bytes, n_embd) as (cache, n_weights):
        one, prefill = _time(cache, 1), _time(cache, MICRO_BATCH)
        rows = tuple(max(1.0, _time(cache, n, _ROWS_SECONDS) / one) for n in ROWS)
    return Speeds(n_weights / one, n_weights * MICRO_BATCH / prefill, rows)


def gpu_speed(kind: str, folder: Path, n_bytes: int, n_embd: int) -> float:
    """Bytes of weights per second of decode of the same model on the GPU. Raises as `speeds` does."""
    with _opened(kind, 1, folder, n_bytes, n_embd, n_gpu_layers=999) as (cache, n_weights):
        return n_weights / _time(cache, 1)


@contextlib.contextmanager
def _opened(
    kind: str, n_threads: int, folder: Path, n_bytes: int, n_embd: int, n_gpu_layers: int = 0
) -> Iterator[tuple[Cache, int]]:
    """The model's cache, and bytes of the weights that every token is multiplied with."""
    with tempfile.TemporaryDirectory(prefix="probe-", dir=folder) as scratch:
        path = Path(scratch) / "probe.gguf"
        n_weights = _write(path, kind, n_bytes, n_embd)
        with (
            contextlib.closing(native.Model(path, n_gpu_layers)) as model,
            contextlib.closing(Cache(model, _N_CONTEXT, 1, MICRO_BATCH, n_threads, "f16")) as cache,
        ):
            yield cache, n_weights


def _time(cache: Cache, n_tokens: int, least_seconds: float = _LEAST_SECONDS) -> float:
    """Median seconds of a step; the first one only warms up, unless it takes so long that it has to do."""
    span, taken = Span(0, 0, [0] * n_tokens), []
    while len(taken) < 3 or (sum(taken[1:]) < least_seconds and len(taken) < _MOST_STEPS):
        started = time.perf_counter()
        cache.decode([span])
        taken.append(time.perf_counter() - started)
        cache.remove(0, 0)
        if sum(taken) > _MOST_SECONDS:
            break
    return float(np.median(taken[1:] or taken))


def _write(path: Path, kind: str, n_bytes: int, n_embd: int) -> int:
    """Write the model of zeros; bytes of the weights that every token is multiplied with."""
    numbers = {item.name: item for item in gguf.GGMLQuantizationType}
    if kind not in numbers or kind.startswith(("I8", "I16", "I32", "I64", "F64")):
        raise InputError(f"there are no weights of the type {kind!r}; name a ggml type such as Q4_K")
    number = numbers[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[number]
    n_ff = max(block, 11 * n_embd // 4 // 256 * 256)
    shapes = {f"attn_{part}": (n_embd, n_embd) for part in ("q", "k", "v", "output")}
    shapes |= {"ffn_gate": (n_ff, n_embd), "ffn_up": (n_ff, n_embd), "ffn_down": (n_embd, n_ff)}
    layer_bytes = sum(rows * (width // block) * block_bytes for rows, width in shapes.values())
    n_layers = max(1, -(-n_bytes // layer_bytes))
    writer = gguf.GGUFWriter(path, "llama")
    _add_metadata(writer, n_layers, n_embd, n_ff)
    norm = np.ones(n_embd, np.float32)
    table = np.zeros((_N_VOCAB, n_embd // block * block_bytes), np.uint8)
    writer.add_tensor("token_embd.weight", table, raw_dtype=number)
    writer.add_tensor("output_norm.weight", norm)
    for i in range(n_layers):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", norm)
        for name, (rows, width) in shapes.items():
            zeros = np.zeros((rows, width // block * block_bytes), np.uint8)
            writer.add_tensor(f"blk.{i}.{name}.weight", zeros, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return n_layers * layer_bytes + _N_VOCAB * (n_embd // block) * block_bytes


def _add_metadata(writer: gguf.GGUFWriter, n_layers: int, n_embd: int, n_ff: int) -> None:
    writer.add_name("probe")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    writer.add_token_list([chr(i) if i in plain else chr(next(others)) for i in range(_N_VOCAB)])
    writer.add_token_types([gguf.TokenType.NORMAL] * _N_VOCAB)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_context_length(_N_CONTEXT)
    writer.add_embedding_length(n_embd)
    writer.add_block_count(n_layers)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_feed_forward_length(n_ff)
    writer.add_head_count(_N_HEADS)
    writer.add_head_count_kv(_N_HEADS)
    writer.add_rope_dimension_count(n_embd // _N_HEADS)


def memory_bandwidth(n_bytes: int) -> float:
    """Bytes per second that one thread reads; the best of five."""
    values = np.ones(max(1, n_bytes // 8), np.float64)
    return values.nbytes / _best(values.sum, 5)


def disk(folder: Path, n_bytes: int) -> Disk:
    """Time reads of a temporary file after its pages were dropped, from its start and in random pages of 64 KiB."""
    with tempfile.TemporaryFile(dir=folder) as file:
        block = np.random.default_rng(0).bytes(_BLOCK_BYTES)
        n_blocks = max(1, n_bytes // _BLOCK_BYTES)
        for _ in range(n_blocks):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        is_cold = _drop(file.fileno())
        places = np.random.default_rng(1).permutation(n_blocks * _BLOCK_BYTES // _PAGE_BYTES)[:_N_PAGES]

        def read_all() -> None:
            file.seek(0)
            while file.read(_BLOCK_BYTES):
                pass

        def read_some() -> None:
            for place in places:
                file.seek(int(place) * _PAGE_BYTES)
                file.read(_PAGE_BYTES)

        sequential = n_blocks * _BLOCK_BYTES / _best(read_all, 1)
        _drop(file.fileno())
        return Disk(sequential, len(places) * _PAGE_BYTES / _best(read_some, 1), is_cold)


def _drop(descriptor: int) -> bool:
    """Have the system forget the pages of a file; False where it cannot be asked to."""
    advise = getattr(os, "posix_fadvise", None)
    if advise is None:
        return False
    try:
        advise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    except OSError:
        return False
    return True


def _best(work: Callable[[], object], n_times: int) -> float:
    """Least seconds of several runs."""
    taken = []
    for _ in range(n_times):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return max(min(taken), 1e-9)
