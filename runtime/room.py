"""How much memory there is, and what a cache takes of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from .errors import OutOfMemory

N_PADDED = 256
"""llama.cpp rounds caches up to a multiple of so many cells."""
_BYTES_PER_VALUE = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat"),
)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of an open model: its weights (mapped from the file where that is possible) and its cache."""

    weights_bytes: int
    cache_bytes: int
    n_context: int
    cache_type: str


def available_bytes() -> int:
    """Memory that this process may still take, under the limit of a container too."""
    free = psutil.virtual_memory().available
    root = Path("/sys/fs/cgroup")
    for limit, usage, stat in _CGROUPS:
        try:
            allowed, used = int((root / limit).read_text()), int((root / usage).read_text())
            # Pages of files count as used and are given back on demand.
            cached = dict(line.split() for line in (root / stat).read_text().splitlines()).get("inactive_file", "0")
        except (OSError, ValueError):  # no such limit, or "max"
            continue
        free = min(free, max(0, allowed - used + int(cached)))
    return free


def padded(n_cells: int) -> int:
    """The cells of a cache for which so many were asked."""
    return -(-n_cells // N_PADDED) * N_PADDED


def cell_bytes(header: Mapping[str, Any], cache_type: str) -> float:
    """Cache bytes of one token, every layer with heads counted as full attention; 0 for a recurrent model."""
    architecture = header.get("general.architecture")

    def get(name: str, default: Any) -> Any:
        """Numbers of the layers, or one for all."""
        value = header.get(f"{architecture}.{name}")
        is_list = isinstance(value, list) and all(isinstance(item, int) for item in value)
        return value if isinstance(value, int) or is_list else default

    def highest(value: Any) -> int:
        return max(value, default=0) if isinstance(value, list) else value

    n_layers, n_embd = highest(get("block_count", 0)), highest(get("embedding_length", 0))
    n_heads = get("attention.head_count", 0)
    n_kv = get("attention.head_count_kv", n_heads)
    n_kv_all = sum(n_kv[:n_layers]) if isinstance(n_kv, list) else n_kv * n_layers
    width = n_embd // highest(n_heads) if highest(n_heads) else 0
    n_values = n_kv_all * sum(highest(get(f"attention.{part}_length", width)) for part in ("key", "value"))
    return n_values * _BYTES_PER_VALUE[cache_type]


def check_room(n_context: int, per_cell: float, free_bytes: int) -> None:
    """Refuse a cache that the memory cannot hold: the system would grant it and end the process on writing."""
    wanted = int(n_context * per_cell)
    if wanted > free_bytes:
        raise OutOfMemory(
            f"a cache of {n_context} tokens takes {wanted} bytes and {free_bytes} are free; "
            f"give a smaller context ({int(free_bytes / per_cell)} tokens at most) or the cache type q8_0"
        )


def size(n_bytes: int) -> str:
    """Bytes for a person."""
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.0f} MiB"
