"""The exact search behind a plan: which devices, in which order, with which run of layers. Pure.

A table says what layers [first, end) cost on a device, infinite where they cannot lie there. A dynamic programme over
(devices visited, last of them, layers assigned) finds the cheapest ring; devices that are left out cost nothing.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .costs import Array

N_ANY_ORDER = 7
"""Most workers of which all orders are searched."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Layers [first, end) on a device, by its number; 0 is the head."""

    device: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Route:
    """Stops in the order of the ring, the head's last, and the sum of their costs and hops."""

    total: float
    stops: tuple[Stop, ...]


@dataclass(frozen=True, slots=True)
class State:
    """Having come to `device` from one of `before`, which are numbers of states; -1 is the start."""

    device: int
    before: tuple[int, ...]


def orders(n_workers: int, is_any_order: bool) -> tuple[State, ...]:
    """Visits of some workers: in all orders, or in the order given."""
    if not is_any_order:
        return tuple(State(m + 1, tuple(range(-1, m))) for m in range(n_workers))
    number: dict[tuple[int, int], int] = {}
    states: list[State] = []
    for visited in range(1, 1 << n_workers):
        for last in (m for m in range(n_workers) if visited >> m & 1):
            rest = visited ^ (1 << last)
            before = tuple(number[rest, m] for m in range(n_workers) if rest >> m & 1) or (-1,)
            number[visited, last] = len(states)
            states.append(State(last + 1, before))
    return tuple(states)


def search(tables: Sequence[Array], hops: Array, states: Sequence[State]) -> Route | None:
    """The cheapest ring. `tables[m][first, end]`, the head's first; `hops[m, n]` is the cost of a hop; each state comes
    after those it comes from."""
    n_layers = len(tables[0]) - 1
    start = np.full(n_layers + 1, np.inf)
    start[0] = 0.0
    values: list[Array] = []

    def arrivals(device: int, before: Sequence[int]) -> Array:
        """Costs before the device's own layers, (states before, layers assigned)."""
        if before == (-1,):
            return (start + hops[0, device])[None]
        known = [values[i] + hops[states[i].device, device] for i in before if i >= 0]
        return np.stack([start + hops[0, device], *known] if before[0] == -1 else known)

    for state in states:
        best = arrivals(state.device, state.before).min(axis=0)
        values.append((best[:, None] + tables[state.device]).min(axis=0))

    # The head closes the ring; alone it has no hops.
    ends = range(-1, len(states))
    last = arrivals(0, ends)
    last[0] = start
    sums = last + tables[0][:, n_layers]
    total = float(sums.min())
    if not np.isfinite(total):
        return None
    came, first = (int(i) for i in np.unravel_index(sums.argmin(), sums.shape))
    stops, number = [Stop(0, first, n_layers)], ends[came]
    while number >= 0:
        state, end = states[number], stops[-1].first
        sums = arrivals(state.device, state.before) + tables[state.device][:, end]
        came, first = (int(i) for i in np.unravel_index(sums.argmin(), sums.shape))
        stops.append(Stop(state.device, first, end))
        number = state.before[came]
    return Route(total, tuple(reversed(stops)))


def least(
    find: Callable[[float], Route | None], limits: Array, value: Callable[[float, float], float]
) -> tuple[float, Route] | None:
    """The limit and the route of the least `value(total, limit)`, which grows with both, where `find(limit)` gives the
    route of least total within it; among equals that of the least total. `limits` are all that can matter, in order."""
    if not len(limits) or (route := find(float(limits[-1]))) is None:
        return None
    best = (value(route.total, float(limits[-1])), route.total, float(limits[-1]), route)
    # Ranges of limits by what is the least that they can bring: the total of their end at the limit of their start.
    ranges = [(value(route.total, float(limits[0])), 0, len(limits) - 1, route.total)]
    while ranges and ranges[0][0] < best[0]:
        _, low, high, total = heapq.heappop(ranges)
        if low == high:
            continue
        middle = (low + high) // 2
        limit = float(limits[middle])
        heapq.heappush(ranges, (value(total, float(limits[middle + 1])), middle + 1, high, total))
        if (route := find(limit)) is not None:
            best = min(best, (value(route.total, limit), route.total, limit, route), key=lambda found: found[:2])
            heapq.heappush(ranges, (value(route.total, float(limits[low])), low, middle, route.total))
    return best[2], best[3]


def shifted(costs: Array) -> Array:
    """A table of layers that are all alike, from the cost of each number of them."""
    n = len(costs)
    count = np.arange(n)[None, :] - np.arange(n)[:, None]
    return np.where(count > 0, costs[np.maximum(count, 0)], np.inf)


def nearest_order(hops: NDArray[np.float64]) -> list[int]:
    """Devices from the head on, each time the nearest one left; numbers without the head."""
    left, order = set(range(1, len(hops))), [0]
    while left:
        order.append(min(sorted(left), key=lambda m: hops[order[-1], m]))
        left.remove(order[-1])
    return order[1:]
