"""What would be otherwise: other machines and other files, and whole copies of the model in place of a ring. Pure."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .costs import Links, ModelCosts
from .device import Device
from .errors import PlanImpossible
from .plan import Plan, plan

Finder = Callable[[ModelCosts, Sequence[Device], Links, bool], Plan]
"""From a model, devices, their links and whether the disk may be used to a plan. Raises PlanImpossible."""


@dataclass(frozen=True, slots=True)
class Replicas:
    """The whole model on each of several devices, the fastest first, each writing samples of its own."""

    devices: tuple[str, ...]
    token_seconds: tuple[float, ...]
    """Of one sequence on each device."""
    throughput_seconds: float
    """Between tokens, all devices together."""


def replicate(
    costs: ModelCosts, devices: Sequence[Device], n_samples: int, is_disk_allowed: bool = False
) -> Replicas | None:
    """Copies of the model for `n_samples` independent samples; None where it fits on fewer than two devices.

    Each copy has a cache of the whole context and as many of the samples, which share its steps.
    """

    def alone(device: Device, n: int) -> Plan:
        return plan(costs, [device], n_in_flight=n, is_disk_allowed=is_disk_allowed)

    found: list[tuple[float, Device]] = []
    for device in devices:
        with contextlib.suppress(PlanImpossible):
            found.append((alone(device, 1).token_seconds, device))
    found = sorted(found, key=lambda pair: pair[0])[:n_samples]
    if len(found) < 2:
        return None
    n_each = -(-n_samples // len(found))
    speed = sum(1 / alone(device, n_each).throughput_seconds for _, device in found)
    return Replicas(tuple(device.name for _, device in found), tuple(seconds for seconds, _ in found), 1 / speed)


def variations(
    costs: ModelCosts,
    devices: Sequence[Device],
    links: Links,
    find: Finder,
    is_disk_allowed: bool = False,
    alternatives: Mapping[str, ModelCosts] | None = None,
) -> list[tuple[str, Plan | None]]:
    """Sentences' subjects and the plans that they would bring, None where nothing fits.

    One device less, or one more like the fastest of the others, the disk the other way, and `alternatives` by name,
    such as other contexts and quantisations. `find` plans for what is wanted, and may use the disk where it is told so.
    """

    def found(costs: ModelCosts, devices: Sequence[Device], links: Links, is_disk_allowed: bool) -> Plan | None:
        try:
            return find(costs, devices, links, is_disk_allowed)
        except PlanImpossible:
            return None

    def cases() -> Iterator[tuple[str, Plan | None]]:
        for i, device in enumerate(devices):
            if i:
                yield f"without {device.name}", found(costs, [*devices[:i], *devices[i + 1 :]], links, is_disk_allowed)
        head, *workers = devices
        fastest = max(workers or [head], key=lambda device: max(device.memory_bandwidth, device.gpu_speed))
        names = {device.name for device in devices}
        twin = next(name for n in itertools.count(1) if (name := f"again {n}") not in names)
        more = [*devices, replace(fastest, name=twin)]
        with_twin = links.with_twin(fastest.name, twin, head.name)
        yield f"one more like {fastest.name}", found(costs, more, with_twin, is_disk_allowed)
        text = "without the disk" if is_disk_allowed else "with the disk"
        yield text, found(costs, devices, links, not is_disk_allowed)
        for name, other in (alternatives or {}).items():
            yield name, found(other, devices, links, is_disk_allowed)

    return list(cases())
