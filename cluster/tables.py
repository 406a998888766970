"""Tables of what runs of layers take on a device, and of what bounds that from below, for the search. Pure.

One round has layers of any sizes: a table over (number of layers, end of the run). Several rounds share out layers of
the mean size: one over their number. Where a GPU has some layers of a run, the table has the best split.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .costs import Array, ModelCosts, Rates, has_gpu, reload_bytes, reload_seconds
from .device import Device


class _Spans:
    """Runs of places, each from `low` to `high`, for the least of some values in each."""

    def __init__(self, low: NDArray[np.intp], high: NDArray[np.intp]) -> None:
        self._is_empty = low > high
        low, high = np.where(self._is_empty, 0, low), np.where(self._is_empty, 0, high)
        power = np.frexp(high - low + 1)[1].astype(np.intp) - 1
        n = low.shape[-1]
        # Two runs of a power of two cover each.
        self._one, self._other = power * n + low, power * n + high + 1 - (1 << power)

    def least(self, values: Array) -> Array:
        """The least in each run; infinite where there is none."""
        runs = [values]  # of 1, 2, 4 and so on from each place
        while (n := 1 << (len(runs) - 1)) < len(values):
            runs.append(np.concatenate((np.minimum(runs[-1][:-n], runs[-1][n:]), runs[-1][-n:])))
        found = np.concatenate(runs)
        return np.where(self._is_empty, np.inf, np.minimum(found[self._one], found[self._other]))


@dataclass(frozen=True, slots=True)
class Splits:
    """Layers [first, split) on a CPU and [split, end) on its GPU, with the head's output. Arrays over two of these."""

    reload: Array
    """Seconds of reading again what overflows of the CPU's layers; infinite where impossible."""
    is_held: NDArray[np.bool_]
    """Whether the GPU holds its layers. One without any holds nothing."""
    fitting: _Spans
    """Splits for each [first, end) where nothing overflows."""
    spilling: _Spans | None
    """Those where something does and may."""
    spilled: Array
    """Seconds to read layers [0, split) and their cache from disk."""
    spared: Array
    """Those of layers [0, first), and of all that memory holds. The difference is `reload`, where something spills."""

    def least(self, cpu: Array, gpu: Array) -> Array:
        """Least seconds of layers [first, end), of those of layers [0, end) on each; a sum of a term of `first`, one of
        `split` and one of `end`."""
        least = self.fitting.least(cpu - gpu) - cpu[:, None]
        if self.spilling is not None:
            over = self.spilling.least(cpu - gpu + self.spilled) - (cpu + self.spared)[:, None]
            least = np.minimum(least, over)
        return least + gpu

    def n_gpu_layers(self, cpu: Array, gpu: Array, first: int, end: int) -> int:
        """Of the split with the least seconds."""
        run = slice(first, end + 1)
        sums = np.where(self.is_held[run, end], (cpu - gpu)[run] + self.reload[first, run], np.inf)
        return end - first - int(np.argmin(sums))


@dataclass(frozen=True, slots=True)
class Room:
    """What a device holds in one round, whatever it evaluates."""

    reload: Array
    """Seconds of reading again what overflows of layers [first, end), all on the CPU, and the head's output; infinite
    where impossible."""
    splits: Splits | None
    """With a GPU."""


def room(costs: ModelCosts, device: Device, is_head: bool, is_disk_allowed: bool) -> Room:
    """What one device holds in one round."""
    place = np.arange(costs.n_layers + 1)
    count, weights, filled = (
        _between(sums) for sums in (place, _prefix(costs.weights), _prefix(costs.weights + costs.held_cache_bytes))
    )
    output = costs.output_bytes if is_head else 0

    def reload(output: int) -> Array:
        over = reload_bytes(costs, device, weights + output, count * float(costs.held_cache_bytes), 1)
        return np.where(count < 0, np.inf, reload_seconds(device, over, is_disk_allowed))

    plain = reload(output)
    if not has_gpu(device):
        return Room(plain, None)
    beside = reload(0) if is_head else plain
    is_held = filled + output + costs.scratch_bytes <= device.gpu_memory_bytes
    is_held = (count >= 0) & (is_held if is_head else is_held | (count == 0))
    low = np.maximum(place[:, None], place + 1 - is_held.sum(axis=0))
    fits, most = (place[:, None] - 1 + is_so.sum(axis=1, keepdims=True) for is_so in (beside == 0, beside < np.inf))
    fitting = _Spans(low, np.minimum(place, fits))
    spilling = _Spans(np.maximum(low, fits + 1), np.minimum(place, most)) if (fits < most).any() else None
    disk = device.disk_sequential or np.inf
    spilled, memory = filled[0] / disk, device.memory_bytes - costs.scratch_bytes
    return Room(plain, Splits(beside, is_held, fitting, spilling, spilled, spilled + memory / disk))


@dataclass(frozen=True, slots=True)
class Exact:
    """One round, layers of any sizes."""

    bound: Array
    """Seconds of the last `count` layers before `end`, the split chosen, (count, end); infinite where impossible."""
    least: Array
    """Of each count."""
    plain: Array
    """Seconds of layers [first, end) without the GPU."""
    splits: Splits | None
    cpu: Array
    """Seconds of layers [0, end)."""
    gpu: Array

    def within(self, limit: float) -> Array:
        """The seconds within a limit, (count, end), up to the last count that has some."""
        part = self.bound[: _n_counts(self.least, limit)]
        return np.where(part <= limit, part, np.inf)

    def split(self, first: int, end: int) -> tuple[int, bool]:
        """Number of GPU layers of the best split, and whether the output is on the GPU."""
        if self.splits is None or self.plain[first, end] <= self.bound[end - first, end]:
            return 0, False
        return self.splits.n_gpu_layers(self.cpu, self.gpu, first, end), True


def exact(costs: ModelCosts, rate: Rates, room: Room, is_head: bool) -> Exact:
    """The table of one device for one round."""
    cpu, gpu = _prefix(rate.cpu), _prefix(rate.gpu)
    plain = _between(cpu) + room.reload + (rate.output_cpu if is_head else 0.0)
    best = plain
    if room.splits is not None:
        best = np.minimum(plain, room.splits.least(cpu, gpu) + (rate.output_gpu if is_head else 0.0))
    bound = _by_count(np.where(costs.is_barred, np.inf, best))
    return Exact(bound, bound.min(axis=1), plain, room.splits, cpu, gpu)


def _by_count(costs: Array) -> Array:
    """(count, end) from (first, end), infinite of no layer."""
    n, size = len(costs), costs.itemsize
    padded = np.concatenate((np.full((n, n), np.inf), costs))  # there are no layers before the first
    table = np.ndarray((n, n), costs.dtype, padded, n * n * size, (-n * size, (n + 1) * size)).copy()
    table[0] = np.inf
    return table


def _n_counts(least: Array, limit: float) -> int:
    """Of counts from 0 on, how many may matter of which the `least` is within a limit."""
    return len(least) - int((least[::-1] <= limit).argmax())


def _prefix(values: Array) -> Array:
    return np.concatenate(([0.0], np.cumsum(values)))


def _between(prefix: NDArray[Any]) -> NDArray[Any]:
    """Sums of [first, end) as (first, end)."""
    return prefix[None, :] - prefix[:, None]


@dataclass(frozen=True, slots=True)
class Uniform:
    """Several rounds, layers taken as equal. Arrays over (number of layers, choice): the seconds that count in the sum,
    those that bound the token from below, and the number of the choice: 0 is no GPU, others have the output there, with
    one layer less than that."""

    total: Array
    bound: Array
    number: NDArray[np.intp]
    least: Array
    """The bound of each number of layers."""

    def within(self, limit: float) -> Array:
        """Seconds whose bound is within a limit, (number of layers, 1), up to the last number that has some."""
        part = slice(_n_counts(self.least, limit))
        return np.where(self.bound[part] <= limit, self.total[part], np.inf).min(axis=1, keepdims=True)

    def choice(self, limit: float, n_layers: int) -> tuple[int, bool]:
        """GPU layers and whether the output is there, of the least seconds of `n_layers`."""
        best = np.where(self.bound[n_layers] <= limit, self.total[n_layers], np.inf).argmin()
        number = int(self.number[n_layers, best])
        return max(0, number - 1), number > 0


def uniform(
    costs: ModelCosts, device: Device, rate: Rates, is_head: bool, is_disk_allowed: bool, n_rounds: int, grid: int
) -> Uniform:
    """The table of one device for several rounds of multiples of `grid` layers; the head has what is over."""
    n, count = costs.n_layers, np.arange(costs.n_layers + 1, dtype=np.float64)
    weights, output = float(costs.weights.mean()), costs.output_bytes if is_head else 0
    output_cpu, output_gpu = (rate.output_cpu, rate.output_gpu) if is_head else (0.0, 0.0)

    def on_cpu(output: int, seconds: float) -> Array:
        """What counts in the sum, and the bound."""
        over = [
            reload_bytes(costs, device, count * weights + output, count * costs.held_cache_bytes, k)
            for k in (n_rounds, 1)
        ]
        waits = np.array([reload_seconds(device, n_bytes, is_disk_allowed) for n_bytes in over])
        # Without the disk nothing may overflow one round's memory, read ahead or not.
        return count * float(rate.cpu.mean()) + seconds + np.where(np.isinf(waits[1]), np.inf, waits)

    both = on_cpu(output, output_cpu)[:, :, None]
    if has_gpu(device):
        held = count * (weights + costs.held_cache_bytes) + output + costs.scratch_bytes
        on_gpu = np.where(held <= device.gpu_memory_bytes, count * float(rate.gpu.mean()) + output_gpu, np.inf)
        beside = np.stack([fewer(seconds) for seconds in on_cpu(0, 0.0)])
        both = np.concatenate((both, beside + on_gpu), axis=2)
    is_possible = (count % grid == (n % grid if is_head else 0)) & (count // grid >= n_rounds)
    total, bound = np.where(is_possible[:, None], both, np.inf)
    number = np.broadcast_to(np.arange(total.shape[1]), total.shape)
    if not is_disk_allowed:  # what is least in the sum is the least bound too
        best = total.argmin(axis=1)[:, None]
        total, bound, number = (np.take_along_axis(all, best, 1) for all in (total, bound, number))
    return Uniform(total, bound, number, bound.min(axis=1))


def fewer(values: Array) -> Array:
    """`values[i - j]` as (i, j), infinite where that is negative."""
    n, size = len(values), values.itemsize
    padded = np.concatenate((np.full(n - 1, np.inf), values))
    return np.ndarray((n, n), values.dtype, padded, (n - 1) * size, (size, -size))
