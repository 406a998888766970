"""Opens a model on the home's machines: finds the nodes, plans the windows, forms the ring."""

import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..cluster.errors import PlanImpossible
from ..cluster.formation import HEAD, Assignment, Placement
from ..cluster.home import Home, Seen
from ..cluster.ring import Placer, RingEngine, RingOptions
from ..quant.gguf import ModelFile
from ..runtime.llama import EngineOptions, load_tokenizer, physical_cores
from ..runtime.model import Model
from .config import Config

if TYPE_CHECKING:
    from ..cluster.member import Address

LOOK_SECONDS = 2.0
_N_CONTEXT = 4096


def make_home(config: Config) -> Home:
    """This machine in the home, as the settings say."""
    chosen = config.settings
    folder = Path(chosen.cluster_folder).expanduser() if chosen.cluster_folder else None
    cache = Path(chosen.cluster_cache).expanduser() if chosen.cluster_cache else None
    return Home(folder, cache, chosen.plaintext)


def find_nodes(home: Home, config: Config, types: list[str]) -> list[Seen]:
    """Usable nodes; of the others is told why they are not used."""
    seen = asyncio.run(home.survey(LOOK_SECONDS, config.settings.peers, types))
    for one in seen:
        if one.problem:
            tell(f"{one.name} {one.problem}")
    return [one for one in seen if not one.problem]


def open_ring(path: Path, options: EngineOptions, config: Config) -> Model:
    """The model on this machine and all paired nodes that are there; on this one alone where there are none.

    Raises PlanImpossible, NodeBusy, ClusterError, ModelError, OutOfMemory.
    """
    file = ModelFile(path)
    file.check_cut()
    home = make_home(config)
    is_planned = config.settings.windows is None
    nodes = find_nodes(home, config, sorted({t.type_name for t in file.tensors.values()}) if is_planned else [])
    if not nodes:
        tell("no node can be used; this machine works alone")
        return Model.open(path, options)
    addresses: list[Address] = [node.address for node in nodes if node.address is not None]
    n_context = options.n_context or min(options.n_needed or _N_CONTEXT, file.n_context_train * options.n_sequences)
    n_threads = options.n_threads or physical_cores()
    place: Placer = named_windows(config.settings.windows or "", file)
    ring = RingEngine(
        file,
        addresses,
        home.gate,
        home.store([path]),
        place,
        RingOptions(
            n_context=n_context,
            n_sequences=options.n_sequences,
            n_threads=n_threads,
            cache_type=options.cache_type,
            row_type=config.settings.row_type,
            name=home.identity.name,
        ),
        tell,
    )
    try:
        return Model(path, ring, load_tokenizer(path))
    except BaseException:
        ring.close()
        raise


def named_windows(text: str, file: ModelFile) -> Placer:
    """Windows as a person wrote them, `attic=10,head=6,attic=8,head=4`. A lost node's layers go to the one that
    follows it in the ring. Raises PlanImpossible."""
    wanted: list[tuple[str, int]] = []
    for part in text.split(","):
        name, _, number = part.rpartition("=")
        if not name.strip() or not number.strip().isdigit() or not 1 <= int(number) <= file.n_layers:
            raise PlanImpossible(f"{part!r} in the windows {text!r} is not NAME=LAYERS; write e.g. attic=14,head=14")
        wanted.append((HEAD if name.strip() == "head" else name.strip(), int(number)))
    total = sum(n for _, n in wanted)
    if total != file.n_layers or wanted[-1][0] != HEAD:
        raise PlanImpossible(
            f"the windows {text!r} have {total} layers and end with {wanted[-1][0] or 'head'}; the model has "
            f"{file.n_layers} and the last window is the head's"
        )

    def place(names: list[str]) -> Placement:
        windows: list[Assignment] = []
        first = start = 0
        for name, n in wanted:
            first += n
            if name != HEAD and name not in names:
                continue
            if windows and windows[-1].member == name:  # the one between them is lost
                windows[-1] = Assignment(name, windows[-1].first, first)
            else:
                windows.append(Assignment(name, start, first))
            start = first
        return Placement(tuple(windows))

    return place


def tell(sentence: str) -> None:
    print(f"localreason: {sentence}", file=sys.stderr, flush=True)
