"""Which device runs which layers in which order: the best ring for a model, found exactly. Pure.

For a fixed number of rounds the cost of a ring is a sum over its devices (`costs.py`) plus its hops, so a dynamic
programme (`route.py`) finds the best windows, the best selection of devices and, for up to seven workers, the best
order. One round is exact for layers of any sizes; several rounds share out layers of the mean size, and what is
predicted of the result is again of the true sizes. Without disk several rounds can only add hops to a token, and a full
ring has no idle time to read in, so for tokens they are tried where the disk is allowed and one sequence is alone (or
where they are all that is given), and taken only where reading ahead pays. A prompt gains by them, for the machines
wait less for its first piece and after its last. A device of the ring has a window in each round.

The objectives, lower is better:
- latency: seconds of a token of one sequence, busy + reload + hops; of a ring that guesses what comes next, by the
  share of tokens that is expected to be right (`costs.guessed_seconds`);
- throughput: seconds between tokens of a ring kept full, max over devices of busy + reload and over links of
  transfer; then latency. Where `n_in_flight` samples are given, they are spread over batches that follow each other:
  each number of rows that a batch may have is searched, by the longer of the sum and that maximum times the batches;
- prefill: seconds of a prompt of `N_PROMPT` tokens in batches of `n_batch` that follow each other
  (`costs.prompt_seconds`).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np

from .costs import (
    Array,
    Links,
    ModelCosts,
    RatesOf,
    Step,
    guessed_seconds,
    has_gpu,
    known_rates,
    least_seconds,
    prompt_seconds,
    row_choices,
)
from .device import Device
from .errors import PlanImpossible
from .forecast import Share, Window, forecast
from .route import N_ANY_ORDER, Route, least, nearest_order, orders
from .tables import Exact, Room, Uniform, exact, room, uniform

Objective = Literal["latency", "throughput", "prefill"]
ROUNDS = (1, 2, 4, 8)
N_PROMPT = 512
"""Tokens of a prompt by which plans for prompts are compared."""
_GAIN, _PROMPT_GAIN = 1 - 1e-9, 0.97
"""More rounds must be better than fewer by more than rounding, and for a prompt, with each doubling, by what makes up
for the slower tokens behind it."""

__all__ = ["ROUNDS", "Links", "ModelCosts", "Objective", "Plan", "Share", "Window", "plan"]


@dataclass(frozen=True, slots=True)
class Plan:
    """Windows in the order of hops, the last one the head's, and what is predicted of them."""

    windows: tuple[Window, ...]
    n_rounds: int
    token_seconds: float
    """Of one sequence alone, with as many cells of the cache read as the model's costs say, every token waited for."""
    lone_seconds: float
    """The same where some tokens are guessed; without a share of them, with several rounds or the disk no other."""
    throughput_seconds: float
    """Between tokens, all sequences together: of those that were given, or of a ring kept full."""
    per_device: tuple[Share, ...]
    """In the order of the ring, the head last; devices left out are not in it."""
    n_batch: int
    """Prompt tokens of a micro-batch."""
    n_rows: int = 1
    """Samples that share a step, where a number of them was given."""

    @property
    def is_disk_used(self) -> bool:
        """True where weights are read from disk again for every token."""
        return any(share.reload_seconds > 0 for share in self.per_device)

    @property
    def n_hops(self) -> int:
        """Messages from device to device per token."""
        return self.n_rounds * len(self.per_device) if len(self.per_device) > 1 else 0

    def prefill_seconds(self, n_tokens: int) -> float:
        """Until a prompt is evaluated, its micro-batches following each other round the ring."""
        if n_tokens <= 0:
            return 0.0
        n_batches = -(-n_tokens // self.n_batch)
        size = n_tokens / n_batches / self.n_batch
        total = sum(share.prefill_seconds + share.prefill_link_seconds for share in self.per_device)
        slowest = max(max(share.prefill_seconds, share.prefill_transfer_seconds) for share in self.per_device)
        return float(size * prompt_seconds(total, slowest, n_batches, self.n_rounds))


@dataclass(frozen=True, slots=True)
class _Task:
    costs: ModelCosts
    devices: tuple[Device, ...]
    links: Links
    rates: RatesOf
    rooms: Callable[[int], Room]
    """Of a device by its number, in one round."""
    objective: Objective
    n_in_flight: int | None
    is_disk_allowed: bool
    n_batch: int
    guessed: float = 0.0
    n_rounds: int = 1
    n_rows: int = 1
    most: float = np.inf
    """Value below which a ring is worth finding."""
    least: tuple[float, float] = (0.0, 0.0)
    """No ring's sum is below the first, and none's slowest step below the second."""

    @property
    def step(self) -> Step:
        """What is weighed."""
        return Step(n_prompt=self.n_batch) if self.objective == "prefill" else Step(self.n_rows)

    @property
    def share(self) -> float:
        """Of tokens that are guessed right: none where a machine's windows wait for each other, or for a disk."""
        return 0.0 if self.n_rounds > 1 or self.is_disk_allowed else self.guessed

    def value(self, total: float, limit: Any) -> Any:
        """What is to be least, of the sum of a ring's steps and hops and the slowest of them, or of each of many."""
        if self.objective == "latency":
            return np.maximum(limit, guessed_seconds(total, limit, self.share))
        if self.objective == "prefill":
            return prompt_seconds(total, limit, -(-N_PROMPT // self.n_batch), self.n_rounds)
        n = self.n_in_flight
        return np.maximum(-(-n // self.n_rows) * limit, total) / n if n else limit

    def parts(self, n_rounds: int) -> "Iterator[_Task]":
        """The task by the rows of a step."""
        n = self.n_in_flight if self.objective == "throughput" else None
        for n_rows in row_choices(n or 1):
            part = replace(self, n_rounds=n_rounds, n_rows=n_rows)
            known = [self.rates(device.name, part.step) for device in self.devices]
            yield replace(part, least=least_seconds(self.costs, self.devices, known, self.is_disk_allowed))

    def floor(self) -> float:
        """A value that no ring of the task's rows is below."""
        return self.value(*self.least)

    def hops(self) -> tuple[Array, Array]:
        """Seconds, and seconds of a link's use, between all devices in all rounds."""
        names = [device.name for device in self.devices]
        seconds, uses = self.links.hops(names, self.costs.n_embd * self.costs.value_bytes * self.step.n_tokens)
        return self.n_rounds * seconds, self.n_rounds * uses


def plan(
    costs: ModelCosts,
    devices: Sequence[Device],
    links: Links | None = None,
    objective: Objective = "latency",
    n_in_flight: int | None = None,
    is_disk_allowed: bool = False,
    rounds: int | Sequence[int] = ROUNDS,
    n_batch: int = 512,
    guessed: float = 0.0,
) -> Plan:
    """The best ring over some of `devices`, the head first. Raises PlanImpossible.

    `n_in_flight` samples make the throughput; None is as many as keep the ring full, with a step for each. `rounds` are
    the numbers of rounds to choose from. `guessed` is the share of a lone answer's tokens that are guessed right.
    """
    assert devices, "there is a head"
    assert len({device.name for device in devices}) == len(devices), "names tell devices apart"
    links = links or Links()
    devices = _ordered(devices, links, costs.n_embd * costs.value_bytes * (n_batch if objective == "prefill" else 1))
    rates, rooms = known_rates(costs, devices), cache(lambda i: room(costs, devices[i], i == 0, is_disk_allowed))
    task = _Task(costs, devices, links, rates, rooms, objective, n_in_flight, is_disk_allowed, n_batch, guessed)
    is_prompt = objective == "prefill"
    best: Plan | None = None
    for n_rounds in [rounds] if isinstance(rounds, int) else rounds:
        if best is not None and n_rounds > 1 and not is_prompt and not (is_disk_allowed and objective == "latency"):
            continue
        for part in sorted(task.parts(n_rounds), key=_Task.floor):
            most = np.inf
            if best is not None:
                gain = _PROMPT_GAIN ** np.log2(n_rounds / best.n_rounds) if is_prompt else _GAIN
                most = float(_value(task, best) * gain)
            if part.floor() >= most:
                break
            part = replace(part, most=most)
            found = _one_round(part) if n_rounds == 1 else _several_rounds(part)
            if found is not None and _value(task, found) < most:
                best = found
    if best is None:
        raise _impossible(task, [rounds] if isinstance(rounds, int) else rounds)
    return best


def _value(task: _Task, found: Plan) -> float:
    if task.objective == "latency":
        return found.lone_seconds
    if task.objective == "throughput":
        return found.throughput_seconds
    return found.prefill_seconds(N_PROMPT)


def _ordered(devices: Sequence[Device], links: Links, n_bytes: int) -> tuple[Device, ...]:
    """Many workers behind links that differ are brought into a short order for messages of `n_bytes`."""
    if len(devices) - 1 <= N_ANY_ORDER or _is_one_link(devices, links):
        return tuple(devices)
    order = nearest_order(links.hops([device.name for device in devices], n_bytes)[0])
    return (devices[0], *(devices[m] for m in order))


def _is_one_link(devices: Sequence[Device], links: Links) -> bool:
    names = [device.name for device in devices]
    return len({links.of(a, b) for a in names for b in names if a != b}) <= 1


def _find(task: _Task, tables: Sequence[Exact] | Sequence[Uniform], is_alike: bool) -> tuple[float, Route] | None:
    """The best route and the limit that it keeps to."""
    seconds, uses = task.hops()
    n_workers = len(task.devices) - 1
    is_any_order = n_workers <= N_ANY_ORDER and not (is_alike and _is_one_link(task.devices, task.links))
    ways = orders(n_workers, is_any_order)

    def find(limit: float) -> Route:
        parts = [table.within(limit) for table in tables]
        return Route(task.costs.n_layers, parts, np.where(uses <= limit, seconds, np.inf), ways)

    if task.objective == "latency" and task.n_rounds == 1 and not task.share:  # the sum is never below its parts
        route = find(np.inf)
        return (np.inf, route) if np.isfinite(route.total) else None
    limits = np.concatenate([uses.ravel(), *(table.bound.ravel() for table in tables)])
    limits = limits[np.isfinite(limits) & (limits >= task.least[1])]
    limits = np.unique(limits[task.value(0.0, limits) < task.most])
    # Of several rounds the true layers may take less than those of the mean size.
    return least(find, limits, task.value, task.most if task.n_rounds == 1 else np.inf)


def _one_round(task: _Task) -> Plan | None:
    costs = task.costs
    tables = [exact(costs, task.rates(d.name, task.step), task.rooms(i), i == 0) for i, d in enumerate(task.devices)]
    is_alike = len(set(zip(costs.layer_bytes, costs.layer_type, strict=True))) == 1 and not costs.barred
    found = _find(task, tables, is_alike)
    if found is None:
        return None
    windows, is_output_there = [], False
    for stop in found[1].stops():
        n_gpu, is_output_there = tables[stop.device].split(stop.first, stop.end)
        windows.append(Window(task.devices[stop.device].name, stop.first, stop.end, n_gpu))
    return _predict(task, windows, is_output_there)


def _several_rounds(task: _Task) -> Plan | None:
    if task.costs.n_layers < task.n_rounds:
        return None
    found = _evenly(task, 1)
    return _evenly(task, _grid(task.costs)) if found is None and task.costs.barred else found


def _grid(costs: ModelCosts) -> int:
    """The fewest layers of which every window, beginning and ending after a multiple of them, can be cut out."""
    n = costs.n_layers

    def is_cut(grid: int) -> bool:
        bounds = [*range(0, n - n % grid, grid), n]
        return not any((first, end) in costs.barred for i, first in enumerate(bounds) for end in bounds[i + 1 :])

    return next(filter(is_cut, range(2, n)), n)


def _evenly(task: _Task, grid: int) -> Plan | None:
    """The best plan of as many layers of a device in each round as can be, in multiples of `grid`."""
    tables = [
        uniform(task.costs, d, task.rates(d.name, task.step), i == 0, task.is_disk_allowed, task.n_rounds, grid)
        for i, d in enumerate(task.devices)
    ]
    found = _find(task, tables, is_alike=True)
    if found is None:
        return None
    limit, stops = found[0], found[1].stops()
    if len(stops) == 1:  # between two windows of the head alone there is nothing
        return _one_round(replace(task, devices=task.devices[:1], n_rounds=1))
    parts = []
    for stop in stops:
        count = stop.end - stop.first
        parts.append((stop.device, count, *tables[stop.device].choice(limit, count)))
    windows = _spread(task, parts, grid)
    if any((window.first, window.end) in task.costs.barred for window in windows):
        return None
    return _predict(task, windows, parts[-1][3])


def _spread(task: _Task, parts: list[tuple[int, int, int, bool]], grid: int) -> list[Window]:
    """Windows of each device, as equal as they can be, later rounds the larger; so too the layers on a GPU."""
    windows, first, n_rounds = [], 0, task.n_rounds
    for i in range(n_rounds):
        for device, count, n_gpu, _ in parts:
            n = count // grid
            sizes = [grid * ((r + 1) * n // n_rounds - r * n // n_rounds) for r in range(n_rounds)]
            sizes[-1] += count % grid
            n_cpu = [0] * n_rounds
            for _ in range(count - n_gpu):
                free = [r for r in range(n_rounds) if n_cpu[r] < sizes[r]]
                n_cpu[min(free, key=n_cpu.__getitem__)] += 1
            windows.append(Window(task.devices[device].name, first, first + sizes[i], sizes[i] - n_cpu[i]))
            first += sizes[i]
    return windows


def _predict(task: _Task, windows: list[Window], is_output_there: bool) -> Plan | None:
    """The plan of these windows with the true sizes of layers; None where they do not fit."""
    found = forecast(
        task.costs,
        task.devices,
        task.links,
        windows,
        task.n_rounds,
        is_output_there,
        task.is_disk_allowed,
        task.n_batch,
        task.n_in_flight,
        task.rates,
    )
    if found is None:
        return None
    token, between = found.token_seconds, found.throughput_seconds
    lone = float(guessed_seconds(token, found.slowest_seconds, task.share))
    return Plan(tuple(windows), task.n_rounds, token, lone, between, found.shares, task.n_batch, found.n_rows)


def _impossible(task: _Task, rounds: Sequence[int]) -> PlanImpossible:
    costs, n = task.costs, len(task.devices)
    if min(rounds) > costs.n_layers:
        return PlanImpossible(
            f"{min(rounds)} rounds were asked for and the model has {costs.n_layers} layers, of which each round takes "
            "one of every machine; ask for fewer rounds"
        )
    there = sum(
        max(0, device.memory_bytes - costs.scratch_bytes)
        + (max(0, device.gpu_memory_bytes - costs.scratch_bytes) if has_gpu(device) else 0)
        for device in task.devices
    )
    what = "the machine has" if n == 1 else f"the {n} machines have"
    detail = "" if there < costs.needed_bytes else ", of which too little is in pieces large enough for the layers"
    remedy = "" if task.is_disk_allowed else " or allow the disk to be used"
    return PlanImpossible(
        f"the model needs {costs.needed_bytes} bytes for weights and {costs.n_context} tokens of cache and {what} "
        f"{there} free{detail}; add a machine, take a smaller quantisation or context{remedy}"
    )
