"""The exact search behind a plan: which devices, in which order, with which run of layers. Pure.

A table says what the last `count` layers before `end` cost on a device, as (count, end), infinite where they cannot lie
there; (count, 1) where layers are alike, and only so many counts as can lie there. A dynamic programme over (devices
visited, last of them, layers assigned) finds the cheapest ring; devices that are left out cost nothing.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from .costs import Array
from .tables import fewer

N_ANY_ORDER = 7
"""Most workers of which all orders are searched."""


@dataclass(frozen=True, slots=True)
class Stop:
    """Layers [first, end) on a device, by its number; 0 is the head."""

    device: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class State:
    """Having come to `device` from one of `before`, which are numbers of states from 1 on; 0 is the start."""

    device: int
    before: NDArray[np.intp]


@cache
def orders(n_workers: int, is_any_order: bool) -> tuple[State, ...]:
    """Visits of some workers: in all orders, or in the order given."""
    if not is_any_order:
        return tuple(State(m, np.arange(m)) for m in range(1, n_workers + 1))
    number: dict[tuple[int, int], int] = {}
    states: list[State] = []
    for visited in range(1, 1 << n_workers):
        for last in (m for m in range(n_workers) if visited >> m & 1):
            rest = visited ^ (1 << last)
            before = [number[rest, m] for m in range(n_workers) if rest >> m & 1] or [0]
            states.append(State(last + 1, np.array(before)))
            number[visited, last] = len(states)
    return tuple(states)


class Route:
    """The cheapest ring, `total` the sum of its costs and hops; infinite where there is none.

    `tables` are the head's first; `hops[m, n]` is the cost of a hop, nothing from the head to itself; each state comes
    after those it comes from.
    """

    def __init__(self, n_layers: int, tables: Sequence[Array], hops: Array, states: Sequence[State]) -> None:
        self._tables, self._hops, self._states = tables, hops, states
        self._devices = np.array([0, *(state.device for state in states)])
        self._values = np.full((len(states) + 1, n_layers + 1), np.inf)
        """Costs of having come to a state with so many layers assigned."""
        self._values[0, 0] = 0.0
        for number, state in enumerate(states, 1):
            table, best = tables[state.device], self._arrivals(state.device, state.before).min(axis=0)
            (fewer(best).T[: len(table)] + table).min(axis=0, out=self._values[number])
        self._ends = np.arange(len(states) + 1)  # the head closes the ring
        self.total = float(self._sums(0, self._ends, n_layers).min())

    def _arrivals(self, device: int, before: NDArray[np.intp]) -> Array:
        """Costs before the device's own layers, (states before, layers assigned)."""
        return self._values[before] + self._hops[self._devices[before], device][:, None]

    def _sums(self, device: int, before: NDArray[np.intp], end: int) -> Array:
        """Costs with the device's own layers, the last of them before `end`, (states before, number of layers)."""
        table = self._tables[device]
        window = table[: end + 1, end if table.shape[1] > 1 else 0]
        return self._arrivals(device, before)[:, end - np.arange(len(window))] + window

    def stops(self) -> tuple[Stop, ...]:
        """In the order of the ring, the head's last. There is a ring."""
        stops, end, device, before = [], self._values.shape[1] - 1, 0, self._ends
        while end:
            sums = self._sums(device, before, end)
            came, count = (int(i) for i in np.unravel_index(sums.argmin(), sums.shape))
            stops.append(Stop(device, end - count, end))
            end -= count
            if number := int(before[came]):
                device, before = self._states[number - 1].device, self._states[number - 1].before
        return tuple(reversed(stops))


def least(
    find: Callable[[float], Route], limits: Array, value: Callable[[float, float], float], most: float
) -> tuple[float, Route] | None:
    """The limit and the route of the least `value(total, limit)`, which grows with both, where `find(limit)` gives the
    route of least total within it; among equals that of the least total. `limits` are all that can matter, in order,
    and values from `most` on do not."""
    if not len(limits) or not np.isfinite((route := find(float(limits[-1]))).total):
        return None
    best = (value(route.total, float(limits[-1])), route.total, float(limits[-1]), route)
    # Ranges of limits by what is the least that they can bring: the total of their end at the limit of their start.
    ranges = [(value(route.total, float(limits[0])), 0, len(limits) - 1, route.total)]
    while ranges and ranges[0][0] < min(best[0], most):
        _, low, high, total = heapq.heappop(ranges)
        if low == high:
            continue
        middle = (low + high) // 2
        limit = float(limits[middle])
        heapq.heappush(ranges, (value(total, float(limits[middle + 1])), middle + 1, high, total))
        if np.isfinite((route := find(limit)).total):
            best = min(best, (value(route.total, limit), route.total, limit, route), key=lambda found: found[:2])
            heapq.heappush(ranges, (value(route.total, float(limits[low])), low, middle, route.total))
    return (best[2], best[3]) if best[0] < most else None


def nearest_order(hops: NDArray[np.float64]) -> list[int]:
    """Devices from the head on, each time the nearest one left; numbers without the head."""
    left, order = set(range(1, len(hops))), [0]
    while left:
        order.append(min(sorted(left), key=lambda m: hops[order[-1], m]))
        left.remove(order[-1])
    return order[1:]
