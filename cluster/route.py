"""The exact search behind a plan: which devices, in which order, with which run of layers. Pure.

A table says what layers [first, end) cost on a device, infinite where they cannot lie there. A dynamic programme over
(devices visited, last of them, layers assigned) finds the cheapest ring; devices that are left out cost nothing.
"""

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


def orders(n_workers: int, is_any_order: bool) -> list[State]:
    """States of the search, each after those it comes from: all orders, or subsets in the order given."""
    if not is_any_order:
        return [State(m, tuple(range(-1, m - 1))) for m in range(1, n_workers + 1)]
    number: dict[tuple[int, int], int] = {}
    states: list[State] = []
    for visited in range(1, 1 << n_workers):
        for last in (m for m in range(n_workers) if visited >> m & 1):
            rest = visited ^ (1 << last)
            before = tuple(number[rest, m] for m in range(n_workers) if rest >> m & 1) or (-1,)
            number[visited, last] = len(states)
            states.append(State(last + 1, before))
    return states


def search(tables: Sequence[Array], hops: Array, states: Sequence[State]) -> Route | None:
    """The cheapest ring. `tables[m][first, end]`, the head's first; `hops[m, n]` is the cost of a hop."""
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
    everything = tuple(range(-1, len(states)))
    last = arrivals(0, everything)
    last[0] = start
    ends = last + tables[0][:, n_layers]
    total = float(ends.min())
    if not np.isfinite(total):
        return None
    came, first = (int(i) for i in np.unravel_index(ends.argmin(), ends.shape))
    stops, number = [Stop(0, first, n_layers)], everything[came]
    while number >= 0:
        state, end = states[number], stops[-1].first
        sums = arrivals(state.device, state.before) + tables[state.device][:, end]
        came, first = (int(i) for i in np.unravel_index(sums.argmin(), sums.shape))
        stops.append(Stop(state.device, first, end))
        number = state.before[came]
    return Route(total, tuple(reversed(stops)))


def least(find: Callable[[float], Route | None], limits: Array, weight: float) -> tuple[float, Route] | None:
    """The least max(weight * total, limit) and its route, where `find(limit)` gives the route of least total within
    it; among equals that of the least total. `limits` are all that can matter."""
    limits = np.unique(limits[np.isfinite(limits)])
    low, high = 0, len(limits) - 1
    if high < 0 or (route := find(float(limits[high]))) is None:
        return None
    best = (max(weight * route.total, float(limits[high])), route)
    while low < high:
        middle = (low + high) // 2
        limit = float(limits[middle])
        route = find(limit)
        if route is not None:
            best = min(best, (max(weight * route.total, limit), route), key=lambda pair: (pair[0], pair[1].total))
        if route is not None and weight * route.total <= limit:
            high = middle
        else:
            low = middle + 1
    return best


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
