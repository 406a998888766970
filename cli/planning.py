"""`localreason cluster plan`: which machine would run which layers, and what to expect of it."""

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..cluster.costs import Links, ModelCosts
from ..cluster.device import Device
from ..cluster.errors import ProtocolError
from ..cluster.placing import HEAD_NAME, N_READ, Wish, model_costs, with_cache_type
from ..cluster.plan import N_PROMPT, Plan
from ..cluster.variation import Replicas, replicate, variations
from ..quant.gguf import ModelFile
from ..runtime.errors import InputError

_SEE = "see `localreason cluster plan --help`"


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be planned: a file on machines, the head first."""

    file: ModelFile
    devices: list[Device]
    links: Links
    wish: Wish
    n_context: int
    cache_type: str
    row_type: str

    def costs(self) -> ModelCosts:
        return model_costs(self.file, self.n_context, self.cache_type, self.row_type)

    def settled(self, cache_type: str | None) -> "tuple[Question, Plan]":
        """The question with the wanted type of cache, or the one that fits, and its answer. Raises PlanImpossible."""

        def find(kind: str) -> tuple[Question, Plan]:
            asked = replace(self, cache_type=kind)
            return asked, self.wish.plan(asked.costs(), self.devices, self.links)

        return with_cache_type(self.file, cache_type, find)[1]

    def variations(self, others: Sequence[Path]) -> list[tuple[str, Plan | None]]:
        """What would be otherwise, and the plan then, None where nothing fits."""
        changed = {
            "half the context": replace(self, n_context=self.n_context // 2),
            "double the context": replace(self, n_context=2 * self.n_context),
            **{f"with {path.name}": replace(self, file=ModelFile(path)) for path in others},
        }

        def find(costs: ModelCosts, devices: Sequence[Device], links: Links, is_disk_allowed: bool) -> Plan:
            return replace(self.wish, is_disk_allowed=is_disk_allowed).plan(costs, devices, links)

        alternatives = {text: question.costs() for text, question in changed.items()}
        return variations(self.costs(), self.devices, self.links, find, self.wish.is_disk_allowed, alternatives)

    def replicas(self) -> Replicas | None:
        """Copies of the whole model in place of a ring, where several samples are wanted and they fit."""
        n = self.wish.n_in_flight
        return replicate(self.costs(), self.devices, n, self.wish.is_disk_allowed) if n else None


def read_devices(path: Path) -> tuple[list[Device], Links]:
    """A described cluster: `devices`, the head first, and `links` of `from`, `to`, `seconds`, `bytes_per_second`.

    Devices are as `localreason cluster profile --json` prints them; one alone needs nothing round it. Raises
    InputError for anything else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        if isinstance(found, dict) and "name" in found:
            found = {"devices": [found]}
        _check_keys("the file", found, ("devices",), ("links",))
        _check_lists(found)
        devices = [Device.from_json(json.dumps(item)) for item in found["devices"]]
        names = [device.name for device in devices]
        _check_names(names)
        pairs = _read_links(found.get("links", []), names)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise InputError(f"{path} does not describe machines: it is nested too deeply; {_SEE}") from error
    except (ValueError, ProtocolError) as error:
        raise InputError(f"{path} does not describe machines: {error}; {_SEE}") from error
    devices[0] = replace(devices[0], name=HEAD_NAME)
    return devices, Links(pairs)


def _check_keys(what: str, found: Any, needed: Collection[str], others: Collection[str] = ()) -> None:
    """Raises ValueError."""
    if not isinstance(found, dict):
        raise ValueError(f"{what} is {found!r:.40}, not an object of {', '.join(needed)}")
    for key in needed:
        if key not in found:
            raise ValueError(f"{what} has no {key!r}")
    for key in found:
        if key not in needed and key not in others:
            raise ValueError(f"{what} has an unknown key {key!r:.40}; known are {', '.join((*needed, *others))}")


def _check_lists(found: dict[str, Any]) -> None:
    """Raises ValueError."""
    for key, value in found.items():
        if not isinstance(value, list):
            raise ValueError(f"{key!r} is {value!r:.40}, not a list")


def _check_names(names: list[str]) -> None:
    """Raises ValueError."""
    if not names or len(set(names)) < len(names):
        raise ValueError(f"it names the machines {', '.join(names) or 'none'}; give one or more of different names")
    if HEAD_NAME in names[1:]:
        raise ValueError(f"{HEAD_NAME!r} is what a plan calls the first machine; give the later one another name")


def _read_links(items: list[Any], names: list[str]) -> dict[tuple[str, str], tuple[float, float]]:
    """Raises ValueError."""
    pairs: dict[tuple[str, str], tuple[float, float]] = {}
    for ends, link in (_read_link(item, names) for item in items):
        if ends in pairs:
            raise ValueError(f"the link from {ends[0]!r} to {ends[1]!r} is there twice; give each direction once")
        pairs[ends] = link
    return pairs


def _read_link(item: Any, names: list[str]) -> tuple[tuple[str, str], tuple[float, float]]:
    """The ends of a link, the first machine being the head, and its numbers. Raises ValueError."""
    _check_keys("a link", item, ("from", "to", "seconds", "bytes_per_second"))
    for key, most in (("seconds", 1e6), ("bytes_per_second", 1e15)):
        number = item[key]
        is_number = isinstance(number, int | float) and not isinstance(number, bool)
        if not is_number or not 0 <= number < most or (key == "bytes_per_second" and not number):
            raise ValueError(f"{key} of a link is {number!r:.40}; it must be a number from 0 to {most:g}")
    ends = []
    for end in (item["from"], item["to"]):
        if end not in (*names, HEAD_NAME):
            raise ValueError(f"a link names the machine {end!r:.40}; the machines are {', '.join(names)}")
        ends.append(HEAD_NAME if end == names[0] else end)
    if ends[0] == ends[1]:
        raise ValueError(f"a link goes from {ends[0]!r} to itself; a machine needs none to itself")
    return (ends[0], ends[1]), (float(item["seconds"]), float(item["bytes_per_second"]))


def table(question: Question, found: Plan) -> list[str]:
    """The plan for a person."""
    wish, replicas = question.wish, question.replicas()
    lines = [
        f"{'machine':<16} {'layers':<20} {'on GPU':>6} {'weights':>10} {'cache':>10} {'busy ms':>8} {'link ms':>8}"
    ]
    for share in found.per_device:
        layers = ", ".join(f"{w.first}-{w.end - 1}" for w in found.windows if w.device == share.name)
        lines.append(
            f"{share.name:<16} {layers:<20} {share.n_gpu_layers:>6} {_mib(share.weight_bytes):>10} "
            f"{_mib(share.cache_bytes):>10} {share.busy_seconds * 1000:>8.2f} {share.link_seconds * 1000:>8.2f}"
        )
    token, lone, full = found.token_seconds, found.lone_seconds, found.throughput_seconds
    lines.append("")
    lines.append(f"{found.n_rounds} round(s) a token; expected {lone * 1000:.1f} ms a token, {1 / lone:.1f} a second")
    if lone < token:
        lines.append(
            f"  with {wish.guessed:.0%} of the tokens guessed by nodes that would wait; {token * 1000:.1f} ms without"
        )
    if wish.n_in_flight:
        shared = f", {found.n_rows} to a step" if found.n_rows > 1 else ""
        lines.append(f"with {wish.n_in_flight} samples{shared}: {1 / full:.1f} tokens a second together")
    elif len(found.per_device) > 1:
        lines.append(f"with the ring kept full by several samples: {1 / full:.1f} tokens a second together")
    if replicas is not None:
        names = ", ".join(replicas.devices)
        speed = 1 / replicas.throughput_seconds
        lines.append(f"whole copies on {names} instead, each run by itself: {speed:.1f} tokens a second together")
    lines.append(f"a prompt of {N_PROMPT} tokens: {found.prefill_seconds(N_PROMPT):.1f} s")
    if question.cache_type != "f16":
        lines.append(f"the cache is of {question.cache_type}")
    if found.is_disk_used:
        lines.append("weights are read from disk again for each token")
    return lines


def explain(question: Question, found: Plan, others: Sequence[Path]) -> list[str]:
    """The variations for a person, compared by what the plan is to be good at."""
    wish = question.wish
    what = {"latency": "a token", "throughput": "a token of all samples", "prefill": f"a prompt of {N_PROMPT} tokens"}
    lines = ["", f"what would change, in ms {what[wish.objective]}, and in weights and cache of all machines:"]
    rows = [("as planned", found), *question.variations(others)]
    for text, other in rows:
        if other is None:
            lines.append(f"  {text:<32} does not fit")
        else:
            seconds = wish.seconds(other)
            ratio = seconds / wish.seconds(found)
            lines.append(f"  {text:<32} {seconds * 1000:8.1f} ms, {ratio:.2f} times this {_mib(_n_bytes(other)):>12}")
    return [*lines, f"  (a token is taken to read {N_READ} tokens of context at most: more costs memory, not time)"]


def as_json(question: Question, found: Plan, is_explained: bool, others: Sequence[Path]) -> dict[str, Any]:
    """The plan for a program; `seconds` are of what the plan is to be good at."""
    wish, replicas = question.wish, question.replicas()
    answer = asdict(found) | {"replicas": asdict(replicas) if replicas else None}
    answer |= {"objective": wish.objective, "seconds": wish.seconds(found)}
    answer |= {"cache_type": question.cache_type, "n_samples": wish.n_in_flight}
    answer |= {"prefill_seconds": found.prefill_seconds(N_PROMPT), "is_disk_used": found.is_disk_used}
    if is_explained:
        answer["variations"] = [
            {
                "change": text,
                "seconds": wish.seconds(other) if other else None,
                "token_seconds": other.token_seconds if other else None,
                "memory_bytes": _n_bytes(other) if other else None,
            }
            for text, other in question.variations(others)
        ]
    return answer


def _n_bytes(found: Plan) -> int:
    """Weights and cache of all machines."""
    return sum(share.weight_bytes + share.cache_bytes for share in found.per_device)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f} MiB"
