"""What would be otherwise: other machines, contexts and quantisations, and whole copies of the model in place of a
ring. Pure."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from .costs import Links, ModelCosts
from .device import Device
from .errors import PlanImpossible
from .plan import ROUNDS, Objective, Plan, plan


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

    Each copy has a cache of the whole context.
    """
    alone: list[tuple[float, str]] = []
    for device in devices:
        try:
            alone.append((plan(costs, [device], is_disk_allowed=is_disk_allowed).token_seconds, device.name))
        except PlanImpossible:
            continue
    alone = sorted(alone)[:n_samples]
    if len(alone) < 2:
        return None
    seconds = tuple(found for found, _ in alone)
    return Replicas(tuple(name for _, name in alone), seconds, 1 / sum(1 / found for found in seconds))


def variations(
    costs: ModelCosts,
    devices: Sequence[Device],
    links: Links | None = None,
    objective: Objective = "latency",
    n_in_flight: int | None = None,
    is_disk_allowed: bool = False,
    rounds: int | Sequence[int] = ROUNDS,
    alternatives: Mapping[str, ModelCosts] | None = None,
) -> list[tuple[str, float | None]]:
    """Sentences' subjects and the seconds of a token that they would bring, None where nothing fits.

    One device less or one more, the disk the other way, half and double the context, and `alternatives` by name, such
    as other quantisations.
    """

    def seconds(costs: ModelCosts, devices: Sequence[Device], is_disk_allowed: bool) -> float | None:
        try:
            found: Plan = plan(costs, devices, links, objective, n_in_flight, is_disk_allowed, rounds)
        except PlanImpossible:
            return None
        return found.token_seconds

    def cases() -> Iterator[tuple[str, float | None]]:
        for i, device in enumerate(devices):
            if i:
                yield f"without {device.name}", seconds(costs, [*devices[:i], *devices[i + 1 :]], is_disk_allowed)
        if len(devices) > 1:
            strongest = max(devices[1:], key=lambda device: device.memory_bandwidth)
            more = [*devices, replace(strongest, name=f"{strongest.name} again")]
            yield f"one more like {strongest.name}", seconds(costs, more, is_disk_allowed)
        text = "without the disk" if is_disk_allowed else "with the disk"
        yield text, seconds(costs, devices, not is_disk_allowed)
        for text, n_context in (("half", costs.n_context // 2), ("double", costs.n_context * 2)):
            n_read = None if costs.n_read is None else min(costs.n_read, n_context)
            changed = replace(costs, n_context=n_context, n_read=n_read)
            yield f"{text} the context", seconds(changed, devices, is_disk_allowed)
        for name, other in (alternatives or {}).items():
            yield name, seconds(other, devices, is_disk_allowed)

    return list(cases())
