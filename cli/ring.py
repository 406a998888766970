"""Opens a model on the home's machines: finds the nodes, plans the windows, forms the ring."""

import asyncio
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import cast

from ..cluster.costs import Links
from ..cluster.device import Device, profile
from ..cluster.errors import ClusterError, PlanImpossible
from ..cluster.formation import HEAD, Assignment, Placement
from ..cluster.home import Home, Seen
from ..cluster.member import Member
from ..cluster.placing import (
    GUESSED,
    HEAD_NAME,
    Wish,
    counted_by_llama,
    model_costs,
    planned,
    types_of,
    with_cache_type,
    with_gpu_layers,
)
from ..cluster.plan import Objective
from ..cluster.ring import Placer, RingEngine, RingOptions
from ..quant.gguf import ModelFile
from ..runtime.llama import EngineOptions, load_tokenizer, physical_cores
from ..runtime.model import Model
from ..runtime.paths import expanded
from .config import Config, Settings
from .say import tell

LOOK_SECONDS = 2.0
_FREE_SECONDS = 12.0
"""More than a node takes to notice that the machine it works for is gone."""
_WINDOW = re.compile(r"\s*(\S.*?)\s*=\s*([0-9]{1,4})\s*(?:/\s*([0-9]{1,4})\s*)?")
N_CONTEXT = 4096
"""Tokens of the cache where nobody says how many are needed."""


def make_home(config: Config) -> Home:
    """This machine in the home, as the settings say."""
    chosen = config.settings
    folder = expanded(chosen.cluster_folder) if chosen.cluster_folder else None
    cache = expanded(chosen.cluster_cache) if chosen.cluster_cache else None
    return Home(folder, cache, chosen.plaintext)


def find_nodes(home: Home, config: Config, types: list[str], free_seconds: float = _FREE_SECONDS) -> list[Seen]:
    """The nodes that are there; told is why some cannot be used, after busy ones had some seconds to become free."""
    seen = asyncio.run(home.survey(LOOK_SECONDS, config.settings.peers, types, tell, is_brief=True))
    busy = [f"{one.name} {one.problem}" for one in seen if one.is_busy]
    if busy:
        tell(f"{', '.join(busy)}; asking again for {free_seconds:.0f} s")
        seen = asyncio.run(home.await_free(seen, free_seconds, types))
    for one in seen:
        if one.problem:
            tell(f"{one.name} {one.problem}{'; going on without it' if one.is_busy else ''}")
    return seen


def _usable(seen: list[Seen]) -> list[Seen]:
    return [one for one in seen if not one.problem]


def open_ring(path: Path, options: EngineOptions, config: Config) -> Model:
    """The model on this machine and the paired nodes that are there, as planned for the number of sequences; on this
    one alone where that is expected to be best.

    Raises PlanImpossible, NodeBusy, ClusterError, ModelError, OutOfMemory.
    """
    file = ModelFile(path)
    file.check_cut()
    path = file.path
    home = make_home(config)
    wanted = config.settings.windows
    seen = find_nodes(home, config, types_of(file) if wanted is None else [])
    nodes = _usable(seen)
    named = None if wanted is None else named_windows(wanted, file, [one.name for one in seen])
    if not nodes:
        tell("no node can be used; this machine works alone")
        if named is not None or not config.settings.disk:
            return Model.open(path, options)
    n_context = options.n_context or min(options.n_needed or N_CONTEXT, file.n_context_train * options.n_sequences)
    n_threads = options.n_threads or physical_cores()
    if named is None:
        devices, links = measure_machines(file, home, nodes, config)
        nodes = [node for node in nodes if node.name in {device.name for device in devices}]
        wish = wish_of(file, options.n_busy, config.settings)

        def find(cache_type: str) -> tuple[Placer, Placement]:
            costs = model_costs(file, n_context, cache_type, config.settings.row_type)
            there = [with_gpu_layers(devices[0], options.n_gpu_layers, costs), *devices[1:]]
            place = planned(costs, {device.name: device for device in there}, links, wish)
            return place, place([node.name for node in nodes])

        cache_type, (place, first) = with_cache_type(file, options.cache_type, find)
        if len(first.windows) == 1:
            if nodes:
                tell("this machine alone is expected to be the fastest; --windows shares the layers all the same")
            if not first.is_disk_used:  # weights that do not fit are read from disk in a window only
                return Model.open(path, options)
        if cache_type != (options.cache_type or "f16"):
            tell(f"the cache is of {cache_type}: f16 does not hold {n_context} tokens")
    else:
        place, cache_type = named, options.cache_type or "f16"
        if options.n_gpu_layers:
            tell("--windows says what goes to a GPU, --gpu-layers is not looked at; write e.g. head=14/8")
    ring = RingEngine(
        file,
        [replace(node.address, name=node.name) for node in nodes if node.address is not None],
        home.gate,
        home.store([path]),
        place,
        RingOptions(
            n_context=n_context,
            n_sequences=options.n_sequences,
            n_threads=n_threads,
            cache_type=cache_type,
            row_type=config.settings.row_type,
            name=home.identity.name,
            is_guessing=config.settings.guess,
        ),
        tell,
        home.links(),
    )
    try:
        return Model(path, ring, load_tokenizer(path))
    except BaseException:
        ring.close()
        raise


def wish_of(file: ModelFile, n_sequences: int, settings: Settings) -> Wish:
    """What a ring of a model for so many sequences at once is to be good at."""
    wish = Wish.of(n_sequences, settings.disk, settings.rounds)
    objective = cast(Objective | None, settings.objective)
    guessed = GUESSED if settings.guess and n_sequences == 1 and not file.has_sliding_window else 0.0
    return replace(wish, objective=objective or wish.objective, guessed=guessed)


def measure_machines(file: ModelFile, home: Home, nodes: list[Seen], config: Config) -> tuple[list[Device], Links]:
    """This machine and the nodes as they were measured, the head first, and their links; a node that could not be
    measured is told and left out."""
    n_threads = config.settings.threads or physical_cores()
    devices = [profile(home.cache, n_threads, types_of(file), HEAD_NAME)]
    links = asyncio.run(measure_links(home, nodes, tell))
    for node in nodes:
        if (HEAD_NAME, node.name) in links.pairs and node.reply is not None:
            try:
                devices.append(replace(Device.from_json(node.reply.device), name=node.name))
            except ClusterError as error:
                tell(f"{node.name}: {error}; going on without it")
    return devices, links


def measure_home(file: ModelFile, config: Config) -> tuple[list[Device], Links]:
    """All machines that can be used now."""
    home = make_home(config)
    return measure_machines(file, home, _usable(find_nodes(home, config, types_of(file))), config)


async def measure_links(home: Home, nodes: list[Seen], tell: Callable[[str], None]) -> Links:
    """The links between this machine and each node that can be timed, one after the other. Between two nodes what they
    found when they were last neighbours in a ring; until then the slower of theirs to this machine."""
    found: dict[str, tuple[float, float]] = {}
    for node in nodes:
        if node.address is not None:
            try:
                async with Member(node.address, home.gate) as member:
                    found[node.name] = await member.measure_link()
            except ClusterError as error:
                tell(f"{error}; going on without it")
    pairs = {(HEAD_NAME, name): link for name, link in found.items()}
    for one in found:
        for other in found:
            pairs[one, other] = (max(found[one][0], found[other][0]), min(found[one][1], found[other][1]))
    return Links(pairs | {pair: link for pair, link in home.links().read().items() if found.keys() >= set(pair)})


def named_windows(text: str, file: ModelFile, known: list[str]) -> Placer:
    """Windows as a person wrote them, `attic=10/4,head=6,attic=8,head=4`, on nodes of `known` names, 4 of the first 10
    layers on a GPU. The layers of one that is lost or cannot be used go to the one that follows it in the ring, which
    keeps as many on its GPU as it has there. Raises PlanImpossible."""
    wanted: list[tuple[str, int, int]] = []
    for part in text.split(","):
        match = _WINDOW.fullmatch(part)
        n, n_gpu = (int(match[2]), int(match[3] or 0)) if match else (0, 0)
        if match is None or not 1 <= n <= file.n_layers or n_gpu > n:
            raise PlanImpossible(
                f"{part!r} in the windows {text!r} is not NAME=LAYERS or NAME=LAYERS/GPU, with 1 to {file.n_layers} "
                f"layers and no more on the GPU; write e.g. attic=14,head=14 or attic=14/8,head=14"
            )
        wanted.append((HEAD if match[1] == HEAD_NAME else match[1], n, counted_by_llama(n_gpu)))
    total = sum(n for _, n, _ in wanted)
    if total != file.n_layers or wanted[-1][0] != HEAD:
        raise PlanImpossible(
            f"the windows {text!r} have {total} layers and end with {wanted[-1][0] or 'head'}; the model has "
            f"{file.n_layers} and the last window is the head's"
        )

    unknown = sorted({name for name, *_ in wanted} - {HEAD, *known})
    if unknown:
        raise PlanImpossible(
            f"no node is named {', '.join(unknown)}, which the windows {text!r} name; there are "
            f"{', '.join([*known, 'head'])}, the last being this machine"
        )

    def place(names: list[str]) -> Placement:
        windows: list[Assignment] = []
        first = start = 0
        for name, n, n_gpu in wanted:
            first += n
            if name != HEAD and name not in names:
                continue
            if windows and windows[-1].member == name:  # the one between them is lost
                windows[-1] = Assignment(name, windows[-1].first, first, max(n_gpu, windows[-1].n_gpu_layers))
            else:
                windows.append(Assignment(name, start, first, n_gpu))
            start = first
        return Placement(tuple(windows))

    return place
