"""How much of what is wished for the free memory holds: context, cache type, layers on a GPU. Pure.

It is decided before anything is loaded: the system grants more memory than it has, and ends whoever writes to it. What
is given up comes in this order: tokens of context that nobody asked for, 16 bits of the cache, layers on the GPU.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .errors import OutOfMemory
from .header import Header
from .memory import Usage, count_layers, is_cache_possible, split_usage, token_bytes
from .native import CACHE_TYPES
from .room import N_PADDED, padded, size

RESERVE_BYTES = 512 << 20
"""Left to the rest of the machine, and on each GPU to its driver, where the size of the cache is our choice."""
N_BATCH_CPU, N_BATCH_GPU = 128, 512
"""Tokens of a batch where no number is asked for."""
_N_USUAL = 4096
"""Tokens of context for which a layer is rather left to the CPU, where no size is asked for."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What the file is to be opened for. None is for us to choose."""

    n_context: int | None
    n_train: int
    """Tokens that the model was trained for, of one sequence."""
    n_needed: int | None = None
    """Tokens of all sequences beyond which a larger context has no use."""
    cache_type: str | None = None
    n_gpu_layers: int | None = None
    n_batch: int = N_BATCH_CPU
    n_sequences: int = 1
    is_mapped: bool = True
    """Whether weights are mapped from the file, so that they may stay on the disk."""

    @property
    def n_most(self) -> int:
        """Cells that could be used, rounded up as llama.cpp does."""
        n = self.n_context or min(self.n_train * self.n_sequences, self.n_needed or 1 << 24)
        return padded(n)


@dataclass(frozen=True, slots=True)
class Free:
    """Bytes that can be had. `gpu_bytes` is None where there is no GPU; `is_shared` where they are the host's own."""

    host_bytes: int
    gpu_bytes: int | None = None
    n_gpus: int = 1
    is_shared: bool = False


@dataclass(frozen=True, slots=True)
class Fit:
    """What to open the file with, what that takes, and one sentence for each thing that was reduced."""

    n_context: int
    cache_type: str
    n_gpu_layers: int
    usage: dict[str, Usage]
    notes: tuple[str, ...] = ()


def fit(header: Header, wish: Wish, free: Free, repacked: frozenset[str] = frozenset()) -> Fit:
    """The most of the wish that fits; `repacked` as in `split_usage`. Raises OutOfMemory where nothing does, or where
    it is less than was asked for, and ModelUnsupported for tensors of unknown types."""
    place = _Place(header, wish, free, repacked)
    n_least = wish.n_most if wish.n_context else min(wish.n_most, _N_USUAL)
    found = next(place.fitting(n_least), None)
    if found is None and not wish.n_context:
        found = next(place.fitting(N_PADDED), None)
    if found is None:
        raise place.refusal(n_least if wish.n_context else N_PADDED)
    n_layers, kind = found
    n_cells = wish.n_most if wish.n_context else place.most(n_layers, kind)
    if n_cells < wish.n_most and wish.n_needed and kind == "f16" and "q8_0" in place.kinds:
        kind = "q8_0"
        n_cells = place.most(n_layers, kind)
    usage = place.usage(n_layers, kind, n_cells)
    return Fit(n_cells, kind, n_layers, usage, tuple(_notes(place, n_layers, kind, n_cells, usage)))


class _Place:
    """A model, a wish and the memory for it."""

    def __init__(self, header: Header, wish: Wish, free: Free, repacked: frozenset[str]) -> None:
        self.header = header
        self.wish = wish
        self.free = free
        self._repacked = repacked
        self.per_cell = {kind: token_bytes(header, kind) for kind in CACHE_TYPES}
        is_packable = bool(self.per_cell["f16"]) and is_cache_possible(header, "q8_0")
        self.kinds = [wish.cache_type] if wish.cache_type else ["f16", "q8_0"] if is_packable else ["f16"]
        self.n_layers = 1 + count_layers(header)
        """With the output, which counts as one."""

    def layers(self) -> list[int]:
        """How many layers the GPU could get, the most first."""
        if self.wish.n_gpu_layers is not None:
            return [min(self.wish.n_gpu_layers, self.n_layers)]
        return list(range(self.n_layers, -1, -1)) if self.free.gpu_bytes is not None else [0]

    def usage(self, n_layers: int, kind: str, n_cells: int) -> dict[str, Usage]:
        wish = self.wish
        return split_usage(self.header, n_cells, kind, wish.n_batch, wish.n_sequences, n_layers, self._repacked)

    def fitting(self, n_cells: int) -> Iterator[tuple[int, str]]:
        """Layers on the GPU and cache types with which so many cells fit, the preferred first."""
        first, *others = self.layers()
        # A packed cache pays where it keeps all layers on the GPU; not where it brings one more of them there.
        choices = [(first, kind) for kind in self.kinds] + [(n, kind) for kind in self.kinds for n in others]
        yield from ((n_layers, kind) for n_layers, kind in choices if self.holds(n_layers, kind, n_cells))

    def holds(self, n_layers: int, kind: str, n_cells: int) -> bool:
        usage, free = self.usage(n_layers, kind, n_cells), self.free
        host, gpu = usage["host"], usage.get("gpu", Usage())
        # A context that was asked for may take the last byte, and leave weights on the disk.
        is_exact = self.wish.n_context is not None
        reserve = 0 if is_exact else RESERVE_BYTES
        needed = (host.locked_bytes if is_exact and self.wish.is_mapped else host.needed_bytes) + reserve
        if gpu.total_bytes and free.gpu_bytes is not None:
            if gpu.total_bytes + RESERVE_BYTES * free.n_gpus > free.gpu_bytes:
                return False
            needed += gpu.total_bytes if free.is_shared else 0
        return needed <= free.host_bytes

    def most(self, n_layers: int, kind: str) -> int:
        """The most cells that fit, up to those that can be used."""
        return N_PADDED * _largest(
            self.wish.n_most // N_PADDED, lambda n: self.holds(n_layers, kind, max(1, n) * N_PADDED)
        )

    def refusal(self, n_cells: int) -> OutOfMemory:
        kind, n_layers = self.kinds[-1], self.layers()[-1]
        usage, free = self.usage(n_layers, kind, n_cells), self.free
        if self.wish.n_context is None:
            needed = usage["host"].needed_bytes + RESERVE_BYTES
            return OutOfMemory(
                f"the model takes {needed} bytes with a cache of {n_cells} tokens and {RESERVE_BYTES} left to the "
                f"rest, and {free.host_bytes} are free; close other programs, or take a smaller file"
            )
        remedy = "" if kind != "f16" or self.per_cell["q8_0"] == 0 else " or the cache type q8_0"
        if "gpu" in usage and free.gpu_bytes is not None and self.wish.n_gpu_layers:
            remedy += " or fewer GPU layers"
        beside = max(0, free.host_bytes - usage["host"].locked_bytes + usage["host"].cache_bytes)
        return OutOfMemory(
            f"a cache of {n_cells} tokens takes {usage['host'].cache_bytes} bytes and {beside} are free; "
            f"give a smaller context ({int(beside / max(self.per_cell[kind], 1))} tokens at most){remedy}"
        )


def _notes(place: _Place, n_layers: int, kind: str, n_cells: int, usage: dict[str, Usage]) -> Iterator[str]:
    """What was given up, and why."""
    wish, free = place.wish, place.free
    n_wanted = wish.n_most if wish.n_context or wish.n_needed else min(wish.n_most, wish.n_train)
    if n_cells < n_wanted:
        yield (
            f"the context holds {n_cells} of {n_wanted} tokens, since {size(free.host_bytes)} of memory are free; "
            f"close other programs or take a smaller file"
        )
    if wish.cache_type is None and kind != "f16":
        yield (
            f"the cache is {kind}, since one of 16 bits does not hold {n_wanted} tokens in the free memory; "
            f"--cache-type f16 insists, --context makes it smaller"
        )
    if wish.n_gpu_layers is None and free.gpu_bytes is not None and n_layers < place.n_layers:
        yield (
            f"{n_layers} of {place.n_layers} layers are on the GPU, which has {size(free.gpu_bytes)} free; "
            f"a smaller file or --context lets more of them fit"
        )
    if usage["host"].needed_bytes > free.host_bytes:
        yield (
            f"the model needs {size(usage['host'].needed_bytes)} and {size(free.host_bytes)} are free: weights are "
            f"read from the disk again for each token; take a smaller file, or --cluster"
        )


def _largest(n_most: int, holds: Callable[[int], bool]) -> int:
    """The largest n from 1 to `n_most` that holds, where smaller ones do too."""
    low, high = 1, max(1, n_most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
