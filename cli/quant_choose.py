"""`localreason quant choose`: which file to take for this machine, or for a described cluster."""

import json
from collections.abc import Iterable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..quant.advice import explain
from ..quant.choose import Candidate, Fit, Machine, Option, Room, rank
from ..quant.evidence import Measured
from ..runtime.devices import backends, cpu_features
from ..runtime.errors import InputError, ModelUnsupported
from ..runtime.fit import Free
from ..runtime.llama import free_memory
from ..runtime.memory import cache_bytes, repacked_schemes
from ..runtime.room import size
from . import config
from .quant_sources import Source, find_sources, main_type
from .say import safe, tell

if TYPE_CHECKING:
    from ..cluster.costs import Links
    from ..cluster.device import Device

_LEAST_CONTEXT = 256
Files = Annotated[
    list[str] | None, typer.Argument(metavar="FILE", help="Files or names; unset: all models on this machine.")
]
Repositories = Annotated[
    list[str] | None,
    typer.Option("--hf", metavar="OWNER/REPO", help="Consider a Hugging Face repository."),
]
Context = Annotated[
    int, typer.Option("--context", min=_LEAST_CONTEXT, max=1 << 24, help="Tokens that the cache holds.")
]
MeasuredFiles = Annotated[
    list[Path] | None, typer.Option("--measured", help="A result of `localreason quant measure --out`.")
]
Devices = Annotated[Path | None, typer.Option("--devices", help="Choose for the machines of this JSON file.")]
Force = Annotated[bool, typer.Option("--force", help="Admit weights below 4 bits and 4-bit caches on small models.")]
Hard = Annotated[
    bool, typer.Option("--hard", help="The tasks are hard (AIME, long proofs): one class more bits than usual.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


class Ring:
    """The machines of a described cluster as a room, by the planner."""

    def __init__(self, devices: "list[Device]", links: "Links", sources: Iterable[Source]) -> None:
        self._devices, self._links = devices, links
        self._sources = {source.candidate.name: source for source in sources}

    def fit(self, candidate: Candidate, cache_type: str, n_context: int) -> Fit:
        """The context, halved until a plan is possible."""
        from ..cluster.errors import PlanImpossible
        from ..cluster.placing import Wish, model_costs

        file, n_wanted = self._sources[candidate.name].file, n_context
        ratio = candidate.n_bytes / sum(tensor.n_bytes for tensor in file.tensors.values())

        def needed(n: int) -> int:
            return candidate.n_bytes + cache_bytes(file.header, n, cache_type)

        while n_context >= _LEAST_CONTEXT:
            costs = model_costs(file, n_context, cache_type)
            if ratio != 1:  # a published file of which only the size is known
                kind = main_type(candidate.scheme)
                costs = replace(
                    costs,
                    layer_bytes=tuple(int(n * ratio) for n in costs.layer_bytes),
                    layer_type=(kind,) * len(costs.layer_type),
                    output_bytes=int(costs.output_bytes * ratio),
                    output_type=kind,
                )
            try:
                return Fit(n_context, needed(n_context), Wish().plan(costs, self._devices, self._links).token_seconds)
            except PlanImpossible:
                n_context //= 2
        return Fit(0, needed(n_wanted))


def choose(
    context: typer.Context,
    files: Files = None,
    repositories: Repositories = None,
    n_context: Context = 8192,
    measured: MeasuredFiles = None,
    devices: Devices = None,
    force: Force = False,
    is_hard: Hard = False,
    folder: Annotated[str | None, config.flag("store")] = None,
    is_json: Json = False,
) -> None:
    """Say which file to take, with which cache and context, for this machine or a described cluster, and why.

    \b
    Examples:
      localreason quant choose
      localreason quant choose small-q8_0.gguf large-q4_k_m.gguf --context 16384 --measured q4.json
      localreason quant choose --hf Qwen/Qwen3-4B-GGUF --devices home.json --json
    """
    where = config.load({"store": folder}).store
    sources = find_sources(context, files or [], repositories or [], where)
    if devices is not None:
        room, limit = _ring(devices, sources := _cut(sources))
    else:
        room, limit = _machine()
    known = _read_measured(measured or [])
    candidates = [source.candidate for source in sources]
    by_name = {one.name: known.get(_base(one.name), ()) for one in candidates}
    options = rank(candidates, room, n_context, by_name, force, is_hard)
    if is_json:
        lines = explain(options, limit)
        print(json.dumps({"room": limit, "choice": lines, "options": [_row(option) for option in options]}, indent=2))
        return
    print("\n".join([*map(safe, explain(options, limit)), "", *_table(options)]))


def _cut(sources: list[Source]) -> list[Source]:
    """Those that a ring can run."""
    found, problem = [], None
    for source in sources:
        try:
            source.file.check_cut()
            found.append(source)
        except ModelUnsupported as error:
            problem = error
            tell(f"passed over: {error}")
    if problem and not found:
        raise problem
    return found


def _ring(devices: Path, sources: list[Source]) -> tuple[Room, str]:
    from .planning import read_devices

    machines, links = read_devices(devices)
    free = sum(machine.memory_bytes + machine.gpu_memory_bytes for machine in machines)
    return Ring(machines, links, sources), f"{size(free)} on {len(machines)} machine(s)"


def _machine() -> tuple[Room, str]:
    free = free_memory()
    return Machine(free, repacked_schemes(cpu_features())), describe_free(free, [one.name for one in backends()])


def describe_free(free: Free, names: Iterable[str]) -> str:
    """What is free, and where; `names` of the devices, the CPU among them."""
    if free.gpu_bytes is None:
        return f"{size(free.host_bytes)} free"
    gpus = " and ".join(name for name in names if name != "CPU")
    if free.is_shared:
        return f"{size(free.host_bytes)} free, {size(free.gpu_bytes)} of them for the GPU {gpus}"
    return f"{size(free.host_bytes)} free and {size(free.gpu_bytes)} on the GPU {gpus}"


def _read_measured(paths: list[Path]) -> dict[str, tuple[Measured, ...]]:
    """Results by the name of the candidate's file. Raises InputError."""
    found: dict[str, tuple[Measured, ...]] = {}
    for path in paths:
        try:
            one = json.loads(path.read_text("utf-8"))
            drift, paired = one["drift"] or {}, one["problems"] or {}
            change = paired.get("accuracy")
            entry = Measured(
                reference=str(one["reference"]["name"]),
                cache_type=str(one["candidate"]["cache_type"]),
                divergence=float(drift["divergence"]["value"]) if drift else None,
                same_top=float(drift["same_top"]["value"]) if drift else None,
                accuracy=(float(change["mean"]), float(change["low"]), float(change["high"])) if change else None,
                n_problems=int(paired["n_graded"]) if change else 0,
                mcnemar_p=float(paired["mcnemar_p"]) if change else None,
            )
            name = str(one["candidate"]["name"])
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; give a result of `quant measure`") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise InputError(
                f"{path} is not a result of `localreason quant measure --out`: {type(error).__name__} {error}; "
                f"measure again"
            ) from error
        found[name] = (*found.get(name, ()), entry)
    return found


def _count(n: int) -> str:
    return f"{n / 1e9:.2f}B" if n >= 1e8 else f"{n / 1e6:.2f}M"


def _base(name: str) -> str:
    """The file that a candidate is called after; published ones are called without their ending."""
    return Path(name).name.removesuffix(".gguf") + ".gguf"


def _row(option: Option) -> dict[str, Any]:
    candidate = asdict(replace(option.candidate, header=None))
    del candidate["header"]
    row = {item.name: getattr(option, item.name) for item in fields(option)}
    measured = [asdict(one) for one in option.measured]
    return row | {"candidate": candidate, "verdict": option.verdict.name.lower(), "measured": measured}


def _table(options: list[Option]) -> list[str]:
    """All files, the best first, and what is to be said of each."""
    lines = [f"{'file':<44} {'size':>9} {'bits':>6} {'cache':>6} {'context':>8} {'needs':>10} {'ms/token':>9}  verdict"]
    for option in options:
        one = option.candidate
        seconds = f"{option.token_seconds * 1000:9.1f}" if option.token_seconds else f"{'':>9}"
        lines.append(
            f"{safe(one.name)[-44:]:<44} {_count(one.n_parameters):>9} {one.bits_per_weight:>6.2f} "
            f"{option.cache_type:>6} {option.n_context:>8} {size(option.needed_bytes):>10} {seconds}  "
            f"{option.verdict.name.lower()}"
        )
        lines += [f"    {text}" for text in (*option.warnings, *option.reasons)]
    return lines
