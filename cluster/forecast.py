"""What given windows will take: the same costs as the plan's search, of the true layers, laid out per device. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from .costs import (
    Links,
    ModelCosts,
    Rates,
    RatesOf,
    Step,
    has_gpu,
    known_rates,
    reload_bytes,
    reload_seconds,
    row_choices,
)
from .device import Device


@dataclass(frozen=True, slots=True)
class Window:
    """Layers [first, end) on a device, the last `n_gpu_layers` of them on its GPU."""

    device: str
    first: int
    end: int
    n_gpu_layers: int = 0


@dataclass(frozen=True, slots=True)
class Share:
    """What one device holds and does, over all its windows; seconds are per token of one sequence."""

    name: str
    n_layers: int
    weight_bytes: int
    """Layers, and on the head the output matrix."""
    cache_bytes: int
    busy_seconds: float
    link_seconds: float
    """Of its hops to the next device."""
    reload_seconds: float
    """Of reading weights from disk again, before what is read ahead."""
    n_gpu_layers: int
    is_output_on_gpu: bool
    """llama.cpp moves the output first: with layers of the last window, this needs one more in its `n_gpu_layers`."""
    prefill_seconds: float
    """Of a micro-batch of a prompt."""
    prefill_link_seconds: float
    prefill_transfer_seconds: float
    """What the micro-batch's hops occupy the link."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """Seconds, and shares in the order of the ring."""

    token_seconds: float
    slowest_seconds: float
    """Of a token of one sequence on the slowest machine or link."""
    throughput_seconds: float
    n_rows: int
    """Samples that share a step."""
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class _Held:
    """One device's part: layers on the CPU and on the GPU, and whether the output is there."""

    device: Device
    cpu: list[int]
    gpu: list[int]
    has_output: bool
    is_output_on_gpu: bool

    def seconds(self, rate: Rates) -> float:
        output = (rate.output_gpu if self.is_output_on_gpu else rate.output_cpu) if self.has_output else 0.0
        return float(rate.cpu[self.cpu].sum() + rate.gpu[self.gpu].sum()) + output


def forecast(
    costs: ModelCosts,
    devices: Sequence[Device],
    links: Links,
    windows: Sequence[Window],
    n_rounds: int,
    is_output_on_gpu: bool = False,
    is_disk_allowed: bool = False,
    n_batch: int = 512,
    n_samples: int | None = None,
    rates: RatesOf | None = None,
) -> Forecast | None:
    """Predict windows in the order of hops, the last one the head's, `devices` the head first; None where they do not
    fit. Between two tokens of `n_samples` sequences each device has a step for every batch of them, which are as many
    as is best; None is one row each of as many as keep the ring full."""
    rates = rates or known_rates(costs, devices)
    by_name = {device.name: device for device in devices}
    names = list(dict.fromkeys(window.device for window in windows[: len(windows) // n_rounds]))
    hops = list(pairwise([*names, names[0]]))
    shares, waits, parts = [], [], []
    for one, other in hops:
        held = _held(by_name[one], windows, one == windows[-1].device, is_output_on_gpu)
        found = _share(costs, held, rates, n_rounds, is_disk_allowed, n_batch)
        if found is None:
            return None
        row = costs.n_embd * costs.value_bytes
        hop, batch_hop = (n_rounds * links.seconds(one, other, row * n) for n in (1, n_batch))
        batch_use = n_rounds * links.transfer_seconds(one, other, row * n_batch)
        link = {"link_seconds": hop, "prefill_link_seconds": batch_hop, "prefill_transfer_seconds": batch_use}
        shares.append(replace(found[0], **link))
        waits.append(found[1])
        parts.append(held)
    each = [share.busy_seconds + share.reload_seconds for share in shares]
    # Each device computes and reads within the token, and waits for what cannot be ahead (costs.py).
    token = max(sum(s.busy_seconds + w + s.link_seconds for s, w in zip(shares, waits, strict=True)), max(each))

    def slowest(n_rows: int, busy: list[float]) -> float:
        n_bytes = costs.n_embd * costs.value_bytes * n_rows
        uses = [n_rounds * links.transfer_seconds(one, other, n_bytes) for one, other in hops]
        return max(*uses, *(b + share.reload_seconds for b, share in zip(busy, shares, strict=True)))

    def between(n_rows: int) -> float:
        n_bytes = costs.n_embd * costs.value_bytes * n_rows
        busy = [held.seconds(rates(held.device.name, Step(n_rows))) for held in parts]
        if n_samples is None:
            return slowest(n_rows, busy)
        total = sum(busy) + sum(waits) + n_rounds * sum(links.seconds(one, other, n_bytes) for one, other in hops)
        return max(-(-n_samples // n_rows) * slowest(n_rows, busy), total) / n_samples

    choices = row_choices(n_samples or 1)
    seconds = [between(n_rows) for n_rows in choices]
    best = seconds.index(min(seconds))
    alone = slowest(1, [share.busy_seconds for share in shares])
    return Forecast(token, alone, seconds[best], choices[best], tuple(shares))


def _held(device: Device, windows: Sequence[Window], is_head: bool, is_output_on_gpu: bool) -> _Held:
    cpu, gpu = [], []
    for window in windows:
        if window.device == device.name:
            cpu += range(window.first, window.end - window.n_gpu_layers)
            gpu += range(window.end - window.n_gpu_layers, window.end)
    return _Held(device, cpu, gpu, is_head, is_head and is_output_on_gpu)


def _share(
    costs: ModelCosts, held: _Held, rates: RatesOf, n_rounds: int, is_disk_allowed: bool, n_batch: int
) -> tuple[Share, float] | None:
    """The share without its links, and the seconds of reading that cannot be ahead; None where it does not fit."""
    device, output = held.device, costs.output_bytes if held.has_output else 0
    cache = costs.held_cache_bytes
    weights = [sum(costs.layer_bytes[i] for i in layers) for layers in (held.cpu, held.gpu)]
    weights[held.is_output_on_gpu] += output
    on_gpu = weights[1] + len(held.gpu) * cache + costs.scratch_bytes
    if (held.gpu or held.is_output_on_gpu) and (not has_gpu(device) or on_gpu > device.gpu_memory_bytes):
        return None
    over = [
        reload_bytes(costs, device, np.array(float(weights[0])), np.array(float(len(held.cpu) * cache)), k)
        for k in (n_rounds, 1)
    ]
    late, read = (float(reload_seconds(device, n_bytes, is_disk_allowed)) for n_bytes in over)
    if not np.isfinite(read):
        return None
    share = Share(
        name=device.name,
        n_layers=len(held.cpu) + len(held.gpu),
        weight_bytes=sum(weights),
        cache_bytes=(len(held.cpu) + len(held.gpu)) * cache,
        busy_seconds=held.seconds(rates(device.name, Step())),
        link_seconds=0.0,
        reload_seconds=read,
        n_gpu_layers=len(held.gpu),
        is_output_on_gpu=held.is_output_on_gpu,
        prefill_seconds=held.seconds(rates(device.name, Step(n_prompt=n_batch))) + read,
        prefill_link_seconds=0.0,
        prefill_transfer_seconds=0.0,
    )
    return share, late
