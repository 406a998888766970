"""`localreason quant choose`: which file to take for this machine, or for a described cluster."""

import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from gguf.constants import GGMLQuantizationType

from ..quant.advice import explain, size
from ..quant.choose import Candidate, Fit, Machine, Measured, Option, Room, describe, find_scheme, rank
from ..quant.gguf import ModelFile
from ..runtime.errors import InputError, ModelBroken, ModelError, ModelNotFound, ModelUnsupported
from ..runtime.room import available_bytes
from . import build, config, store
from .hub import Hub
from .render import safe

if TYPE_CHECKING:
    from ..cluster.costs import Links
    from ..cluster.device import Device

_HEAD_BYTES = 1 << 24
"""Of a published file: more than metadata, vocabulary and tensor table of known models take."""
_LEAST_CONTEXT = 256
_PART = re.compile(r"(?:-\d{5}-of-\d{5})?\.gguf$")
_SIZE_WORD = re.compile(r"_(?:XXS|XS|S|M|L|XL|NL)$")
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


class Ranged(Hub, Protocol):
    """A hub that can send the beginning of a file."""

    def head(self, repository: str, name: str, n_bytes: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Source:
    """A candidate, and the file whose tensor table stands for it: its own, or that of another scheme of the model."""

    candidate: Candidate
    file: ModelFile


class Ring:
    """The machines of a described cluster as a room, by the planner."""

    def __init__(self, devices: "list[Device]", links: "Links", sources: Iterable[Source]) -> None:
        self._devices, self._links = devices, links
        self._sources = {source.candidate.name: source for source in sources}

    def fit(self, candidate: Candidate, cache_type: str, n_context: int) -> Fit:
        """The context, halved until a plan is possible."""
        from ..cluster.errors import PlanImpossible
        from ..cluster.placing import Wish, model_costs

        source = self._sources[candidate.name]
        ratio = candidate.n_bytes / sum(tensor.n_bytes for tensor in source.file.tensors.values())
        while n_context >= _LEAST_CONTEXT:
            costs = model_costs(source.file, n_context, cache_type)
            if ratio != 1:  # a published file of which only the size is known
                kind = candidate.scheme
                if kind not in GGMLQuantizationType.__members__:  # Q4_K_M is mostly Q4_K
                    kind = _SIZE_WORD.sub("", kind)
                costs = replace(
                    costs,
                    layer_bytes=tuple(int(n * ratio) for n in costs.layer_bytes),
                    layer_type=(kind,) * len(costs.layer_type),
                    output_bytes=int(costs.output_bytes * ratio),
                    output_type=kind,
                )
            try:
                return Fit(n_context, Wish().plan(costs, self._devices, self._links).token_seconds)
            except PlanImpossible:
                n_context //= 2
        return Fit(0)


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
    sources = _sources(context, files or [], repositories or [], where)
    if devices is not None:
        room, limit = _ring(devices, sources := _cut(sources))
    else:
        free_bytes = available_bytes()
        room, limit = Machine(free_bytes), f"{size(free_bytes)} free"
    known = _read_measured(measured or [])
    candidates = [source.candidate for source in sources]
    by_name = {one.name: known.get(_base(one.name), ()) for one in candidates}
    options = rank(candidates, room, n_context, by_name, force, is_hard)
    if is_json:
        lines = explain(options, limit)
        print(json.dumps({"room": limit, "choice": lines, "options": [_row(option) for option in options]}, indent=2))
        return
    print("\n".join([*explain(options, limit), "", *_table(options)]))


def _sources(context: typer.Context, files: list[str], repositories: list[str], folder: Path) -> list[Source]:
    """What is named, or else all models of the store."""
    if not files and not repositories:
        return _stored(folder)
    named = [_local(name, folder) for name in dict.fromkeys(files)]
    taken = Counter(source.file.path.name for source in named)
    sources = [source if taken[source.file.path.name] > 1 else _briefly(source) for source in named]
    for repository in repositories:
        hub: Any = build.wiring(context).hub()
        sources += _published(repository, hub, folder)
    return sources


def _local(name: str, folder: Path) -> Source:
    path = store.find(name, folder)
    if path is None:
        raise ModelNotFound(f"{name} is not on this machine; run `localreason models pull {name}`, or give --hf")
    file = ModelFile(path)
    return Source(describe(file, name), file)


def _briefly(source: Source) -> Source:
    return replace(source, candidate=replace(source.candidate, name=source.file.path.name))


def _stored(folder: Path) -> list[Source]:
    """All models of the store that can be read; the others are named."""
    found = []
    for item in store.list_stored(folder) if folder.is_dir() else []:
        try:
            file = ModelFile(item.path)
            found.append(Source(describe(file, item.path.relative_to(folder).as_posix()), file))
        except (ModelError, InputError) as error:
            _tell(f"passed over: {error}")
    if not found:
        raise ModelNotFound("there are no models on this machine; name files, or a repository with --hf OWNER/REPO")
    return found


def _published(repository: str, hub: Ranged, folder: Path) -> list[Source]:
    """The model files of a repository that name their scheme: sizes as the hub records them, all else of one header."""
    sizes, names = Counter[str](), dict[str, list[str]]()
    for item in hub.files(repository):
        stem = _PART.sub("", item.name)
        if item.name.endswith(".gguf") and "mmproj" not in item.name.lower() and find_scheme(stem):
            sizes[stem] += item.n_bytes
            names.setdefault(stem, []).append(item.name)
    whole = [stem for stem in sizes if len(names[stem]) == 1]
    if not whole:
        raise ModelNotFound(
            f"{repository} has no GGUF file in one part whose name says its scheme, such as Q8_0; name another"
        )
    least = min(whole, key=lambda stem: sizes[stem])
    file = _remote(repository, hub, names[least][0], sizes[least], folder)
    like = describe(file, least)
    found = []
    for stem, n_bytes in sizes.items():
        scheme, n_bits = find_scheme(stem) or ("", 0)
        bits = 8 * n_bytes / like.n_parameters
        one = replace(
            like,
            name=f"{repository}/{stem}",
            n_bytes=n_bytes,
            bits_per_weight=bits,
            n_bits=n_bits,
            scheme=scheme,
            source_scheme="",
        )
        found.append(Source(one, file))
    return found


def _remote(repository: str, hub: Ranged, name: str, n_bytes: int, folder: Path) -> ModelFile:
    """The tensor table of a published file, from the store if it is there, else from its first megabytes."""
    path = folder / repository / name
    if path.is_file():
        return ModelFile(path)
    head = hub.head(repository, name, _HEAD_BYTES)
    with tempfile.TemporaryDirectory(prefix="localreason-") as scratch:
        path = Path(scratch) / Path(name).name
        path.write_bytes(head)
        os.truncate(path, max(n_bytes, len(head)))  # a hole in place of the weights, whose end is checked
        try:
            return ModelFile(path)
        except ModelBroken as error:
            raise ModelUnsupported(
                f"{name} of {repository} is damaged, or its header is longer than {_HEAD_BYTES} bytes; "
                f"pull a file of it and name that"
            ) from error


def _cut(sources: list[Source]) -> list[Source]:
    """Those that a ring can run."""
    found, problem = [], None
    for source in sources:
        try:
            source.file.check_cut()
            found.append(source)
        except ModelUnsupported as error:
            problem = error
            _tell(f"passed over: {error}")
    if problem and not found:
        raise problem
    return found


def _ring(devices: Path, sources: list[Source]) -> tuple[Room, str]:
    from .planning import read_devices

    machines, links = read_devices(devices)
    free = sum(machine.memory_bytes + machine.gpu_memory_bytes for machine in machines)
    return Ring(machines, links, sources), f"{size(free)} on {len(machines)} machine(s)"


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
            )
            name = str(one["candidate"]["name"])
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; give a result of `quant measure`") from error
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    return asdict(option) | {"verdict": option.verdict.name.lower()}


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


def _tell(sentence: str) -> None:
    print(f"localreason: {safe(sentence)}", file=sys.stderr, flush=True)
