"""What layers cost on a device: the numbers of a model, of links, and seconds of a step. Pure.

One token on one device takes `busy` seconds: bytes of weights over the measured speed of their type, and the cells of
the cache over the memory bandwidth; layers on the GPU take their bytes over its speed. A step of several samples takes
as many times that of one as was measured for such weights: a core that unpacks weights more slowly than it reads them
gains little by few rows, and kernels like some numbers of them. A GPU reads the weights once for all. Weights that do
not fit into memory beside cache and scratch are read from disk again for every token, only what overflows (`reload`; a
kernel that drops pages in strict order reads more). Cache and scratch never overflow.

With k rounds a device can read ahead for its next window while others compute, up to what its memory for weights, A
bytes, holds. Of D bytes in k windows D - A are read per token, and max(0, D - kA) of them cannot be ahead of time; at
k = 1 that is all. The stalls of the devices are a fixed point: each one's reads that can be ahead are free as long as
the round is longer than its computing and reading. Its solution is

    token = max( sum(busy + max(0, D - kA) / disk) + hops , max over devices of (busy + reload) ).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .device import Device

Array = NDArray[np.float64]
N_UNDER_WAY = 2
"""Batches under way for each machine of a ring: one is computed, one travels."""
N_BATCHES = (1, 2, 4, 8, 16, 32)
"""Over how many batches samples may be spread; a node lets twice as many wait as the most."""


@dataclass(frozen=True)
class ModelCosts:
    """A model as the plan sees it; all sizes are bytes."""

    layer_bytes: tuple[int, ...]
    """Weights of each layer."""
    layer_type: tuple[str, ...]
    """The dominant ggml type of each layer, such as "Q4_K"."""
    cache_bytes: int
    """Keys and values of one token in one layer."""
    n_context: int
    """Cells of the cache, of all sequences together."""
    output_bytes: int
    output_type: str
    n_embd: int
    scratch_bytes: int = 0
    """Compute buffers, on every device, and on its GPU where layers are there."""
    n_read: int | None = None
    """Cells that a token reads; all of them where None, which is the end of a full context."""
    value_bytes: int = 4
    """Of one number of an activation on the wire."""
    barred: frozenset[tuple[int, int]] = frozenset()
    """Windows (first, end) that cannot be cut out."""
    expert_parts: tuple[float, ...] = ()
    """Of each layer's weights, what is in experts; nothing in models without."""
    expert_share: float = 1.0
    """Of the experts, those that a token is multiplied with."""

    def __post_init__(self) -> None:
        assert self.layer_bytes, "a model has layers"
        assert len(self.layer_bytes) == len(self.layer_type), "a type for each layer"

    @property
    def n_layers(self) -> int:
        return len(self.layer_bytes)

    @cached_property
    def weights(self) -> Array:
        """`layer_bytes` to calculate with."""
        return np.array(self.layer_bytes, np.float64)

    @cached_property
    def types(self) -> tuple[list[str], NDArray[np.intp]]:
        """The ggml types that there are, and which of them each layer, and last the output, is of."""
        names, numbers = np.unique([*self.layer_type, self.output_type], return_inverse=True)
        return names.tolist(), numbers

    @cached_property
    def is_barred(self) -> NDArray[np.bool_]:
        """Whether windows cannot be cut out, (first, end)."""
        found = np.zeros((self.n_layers + 1, self.n_layers + 1), np.bool_)
        for window in self.barred:
            found[window] = True
        return found

    def read_bytes(self, n_rows: int) -> Array:
        """Weights of each layer that so many rows are multiplied with, no two of them with the same experts."""
        if not self.expert_parts:
            return self.weights
        return self.weights * (1 - np.array(self.expert_parts) * (1 - min(1.0, n_rows * self.expert_share)))

    @property
    def held_cache_bytes(self) -> int:
        """Cache of one layer."""
        return self.cache_bytes * self.n_context

    @property
    def read_cache_bytes(self) -> int:
        """Cache of one layer that a token reads."""
        return self.cache_bytes * (self.n_context if self.n_read is None else self.n_read)

    @property
    def needed_bytes(self) -> int:
        """Weights, cache and output in all, without scratch."""
        return sum(self.layer_bytes) + self.n_layers * self.held_cache_bytes + self.output_bytes


@dataclass(frozen=True, slots=True)
class Links:
    """(seconds of latency one way, bytes per second) from one name to another; a pair holds for both directions
    unless both are given."""

    pairs: Mapping[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    default: tuple[float, float] = (0.0005, 110e6)

    def of(self, one: str, other: str) -> tuple[float, float]:
        """Latency and bandwidth of a hop; nothing between windows of one device."""
        if one == other:
            return 0.0, float("inf")
        return self.pairs.get((one, other)) or self.pairs.get((other, one)) or self.default

    def with_twin(self, name: str, twin: str, head: str) -> "Links":
        """The links with one more machine, linked as `name` is, and to that as it is to the head."""
        pairs = {(twin, other): link for (one, other), link in self.pairs.items() if one == name}
        pairs |= {(one, twin): link for (one, other), link in self.pairs.items() if other == name}
        between = {} if name == head else {(name, twin): self.of(name, head), (twin, name): self.of(head, name)}
        return Links({**self.pairs, **pairs, **between}, self.default)

    def hops(self, names: Sequence[str], n_bytes: int) -> tuple[Array, Array]:
        """`seconds` and `transfer_seconds` from each of `names` to each."""
        seconds, uses = (
            np.array([[of(one, other, n_bytes) for other in names] for one in names])
            for of in (self.seconds, self.transfer_seconds)
        )
        return seconds, uses

    def seconds(self, one: str, other: str, n_bytes: int) -> float:
        """A hop of `n_bytes`."""
        latency, bandwidth = self.of(one, other)
        return latency + n_bytes / bandwidth

    def transfer_seconds(self, one: str, other: str, n_bytes: int) -> float:
        """What a hop of `n_bytes` occupies the link."""
        return n_bytes / self.of(one, other)[1]


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds of one step on one device, with cache; arrays have an entry per layer."""

    cpu: Array
    gpu: Array
    output_cpu: float
    output_gpu: float


@dataclass(frozen=True, slots=True)
class Step:
    """What a device evaluates at once."""

    n_rows: int = 1
    """Sequences that each get a token."""
    n_prompt: int = 0
    """Tokens of a prompt, in place of all that."""

    @property
    def n_tokens(self) -> int:
        """Activations that go over the wire."""
        return self.n_prompt or self.n_rows


def prompt_seconds(total: Any, slowest: Any, n_batches: int, n_rounds: int) -> Any:
    """Until the last of `n_batches` micro-batches of a prompt is through: `total` seconds for one alone, hops included,
    and `slowest` for one on the slowest machine or link, over all rounds.

    With more rounds a machine waits for the others' first windows only, at the start and at the end; few batches follow
    each other by a window. A bound from below that a simulated ring of first come, first served keeps to within a
    tenth, and mostly meets.
    """
    few, many = total + (n_batches - 1) * slowest / n_rounds, n_batches * slowest + (total - slowest) / n_rounds
    return np.maximum(few, many)


def guessed_seconds(total: Any, slowest: Any, share: float) -> Any:
    """Of a token of a lone answer whose ring guesses what comes next, one token ahead: `total` seconds around the ring,
    `slowest` on the slowest machine or link, a `share` of tokens guessed right.

    After a right guess a token takes half a round, or the slowest machine's part; after a wrong one a round, or twice
    the slowest machine's part, which is busy with that still. Where this is more than a round nothing is guessed.
    """
    return np.minimum(total, (2 - share) * np.maximum(slowest, total / 2))


def row_choices(n_samples: int) -> list[int]:
    """Rows of a step where samples are spread over one batch, two, four and so on; most rows first."""
    return sorted({-(-n_samples // n) for n in N_BATCHES}, reverse=True)


def rates(costs: ModelCosts, device: Device, step: Step) -> Rates:
    """Seconds of a step.

    Many rows on a GPU are taken to be faster by what one is; the last row's output is left out of a prefill.
    """
    gpu_speed, n_rows, (names, numbers) = device.gpu_speed or np.inf, step.n_rows, costs.types
    known = [(device.weight_speed(name), device.prefill_speed(name), device.row_cost(name, n_rows)) for name in names]
    speed, prefill, cost = np.array(known).T[:, numbers]
    # Of the weights that one row and all rows are multiplied with.
    one, all = (np.concatenate((costs.read_bytes(n), [costs.output_bytes])) for n in (1, n_rows))
    many = one * step.n_tokens / prefill
    if step.n_prompt:
        return Rates(many[:-1], (many * speed / gpu_speed)[:-1], 0.0, 0.0)
    # Rows of a mixture that need other experts each read their own.
    cpu = np.minimum(np.maximum(cost, n_rows) * one, all - one + cost * one) / speed
    gpu, cache = np.maximum(all, many * speed) / gpu_speed, n_rows * costs.read_cache_bytes
    output_cpu, output_gpu = float(cpu[-1]), float(gpu[-1])
    return Rates(cpu[:-1] + cache / device.memory_bandwidth, gpu[:-1] + cache / gpu_speed, output_cpu, output_gpu)


RatesOf = Callable[[str, Step], Rates]


def known_rates(costs: ModelCosts, devices: Sequence[Device]) -> RatesOf:
    """`rates` of each of some devices by its name, each worked out once."""
    by_name = {device.name: device for device in devices}
    return cache(lambda name, step: rates(costs, by_name[name], step))


def reload_bytes(costs: ModelCosts, device: Device, ram_weights: Array, ram_cache: Array, n_rounds: int) -> Array:
    """D - kA: what `n_rounds` times the memory does not hold; infinite where not even the cache fits.

    With one round it is all that is read again per token, with more what cannot be read ahead.
    """
    room = device.memory_bytes - costs.scratch_bytes - ram_cache
    return np.where(room < 0, np.inf, np.maximum(0, ram_weights - n_rounds * np.maximum(room, 0)))


def reload_seconds(device: Device, n_bytes: Array, is_disk_allowed: bool) -> Array:
    """Seconds to read bytes again; infinite where that is not wanted or there is no disk."""
    if is_disk_allowed and device.disk_sequential > 0:
        return n_bytes / device.disk_sequential
    return np.where(n_bytes > 0, np.inf, 0.0)


def has_gpu(device: Device) -> bool:
    """True where layers may go to a GPU."""
    return device.gpu_speed > 0 and device.gpu_memory_bytes > 0


def least_seconds(
    costs: ModelCosts, devices: Sequence[Device], known: Sequence[Rates], is_disk_allowed: bool
) -> tuple[float, float]:
    """Seconds that no ring's sum is below, each layer where it is quickest, and none's slowest step, the quickest layer
    shared out in fractions."""
    layer = min(costs.layer_bytes) + costs.held_cache_bytes
    places, quickest, outputs = [], [], []
    for device, rate in zip(devices, known, strict=True):
        is_here = has_gpu(device)
        quickest.append(np.minimum(rate.cpu, rate.gpu) if is_here else rate.cpu)
        outputs.append(min(rate.output_cpu, rate.output_gpu) if is_here else rate.output_cpu)
        there = [(rate.cpu.min(), np.inf if is_disk_allowed else device.memory_bytes / layer), (np.inf, 0.0)]
        if is_here:
            there[1] = (rate.gpu.min(), device.gpu_memory_bytes / layer)
        places.append(sorted(there))
    seconds, rooms = np.array(places).transpose(2, 0, 1)

    def n_layers(limit: float) -> float:
        quick = np.minimum(limit / seconds[:, 0], rooms[:, 0])
        slow = np.minimum((limit - quick * seconds[:, 0]) / seconds[:, 1], rooms[:, 1])
        return float((quick + slow).sum())

    low, high = 0.0, float(seconds[np.isfinite(seconds)].max() * costs.n_layers)
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (low, middle) if n_layers(middle) >= costs.n_layers else (middle, high)
    return float(np.min(quickest, axis=0).sum()) + outputs[0], low
