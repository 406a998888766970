"""`localreason cluster`: which machines there are, whom this one trusts, what a plan would be."""

import asyncio
import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.errors import InputError
from . import config

if TYPE_CHECKING:
    from ..cluster.discovery import Found
    from ..cluster.home import Seen

app = typer.Typer(
    rich_markup_mode=None, add_completion=False, no_args_is_help=True, help="Pair, list and plan the home's machines."
)

_MOST_LINE_BYTES = 1024
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Peers = Annotated[list[str] | None, config.flag("peers", "--peer", show="HOST:PORT")]


@app.command("list")
def list_nodes(peers: Peers = None, is_json: Json = False) -> None:
    """List nodes that are there and machines that are paired, and why one cannot be used.

    \b
    Example:
      localreason cluster list --peer 192.168.1.20:7411
    """
    from .ring import LOOK_SECONDS, make_home
    from .say import tell

    settings = config.load({"peers": peers})
    home = make_home(settings)
    seen = asyncio.run(home.survey(LOOK_SECONDS, settings.settings.peers, tell=tell))
    missing = [peer for peer in home.peers.list() if peer.id not in {one.id for one in seen}]
    rows = [_row(one) for one in seen]
    rows += [{"name": p.name, "id": p.id, "address": None, "state": "paired, not there now"} for p in missing]
    if is_json:
        print(json.dumps(rows, indent=2))
        return
    if not rows:
        print("no nodes; run `localreason node` on another machine, then `localreason cluster pair NAME` here")
    for row in rows:
        print(f"{row['name']:<20} {row['id']:<18} {row['address'] or '-':<24} {row['state']}")


def _row(seen: "Seen") -> dict[str, Any]:
    from ..cluster.discovery import write_peer

    address = write_peer(seen.address.host, seen.address.port) if seen.address else None
    return {"name": seen.name, "id": seen.id, "address": address, "state": seen.problem or "ready"}


@app.command()
def pair(
    node: Annotated[str, typer.Argument(metavar="NODE", help="Name of a node that is there, or its host:port.")],
    code: Annotated[str | None, typer.Option("--code", help="The code, where nobody can be asked for it.")] = None,
) -> None:
    """Pair with a node, once: it shows a code, which you type here.

    \b
    Examples:
      localreason cluster pair attic
      localreason cluster pair 192.168.1.20:7411
    """
    from ..cluster.pairing import is_code
    from ..cluster.pairing import pair as pair_with
    from .ring import make_home

    if code is not None and not is_code(code):
        raise InputError(f"--code is {code!r:.40}; give the six digits that the node shows")
    home = make_home(config.load({}))
    host, port = asyncio.run(_find(node))
    if port == 65535:
        raise InputError(f"pairing takes the port above the node's, and {port} is the last; start the node at another")

    def ask(prompt: str) -> str:
        return code if code is not None else ask_line(prompt)

    peer = asyncio.run(pair_with(host, port + 1, home.identity, home.peers, ask))
    print(f"paired with {peer.name} ({peer.id})")


def ask_line(prompt: str) -> str:
    """What a person types, or a program writes, on standard input. Raises EOFError at its end."""
    if sys.stdin is not None and sys.stdin.isatty():
        try:
            return typer.prompt(prompt, prompt_suffix="")
        except typer.Abort as error:
            raise EOFError from error
    typer.echo(prompt, nl=False)
    # Not through sys.stdin: a thread that waits in it holds its lock, on which the interpreter dies at its end.
    line = b""
    while not line.endswith(b"\n") and len(line) < _MOST_LINE_BYTES:
        try:
            byte = os.read(0, 1)
        except OSError as error:
            raise EOFError from error
        if not byte:
            break
        line += byte
    if not line:
        raise EOFError
    return line.decode(errors="replace").strip()


async def _find(node: str) -> tuple[str, int]:
    """Host and port of a node by its name or address. Raises InputError, and ClusterError where none can be found."""
    from ..cluster.discovery import browse, is_address, parse_peer
    from ..cluster.errors import ClusterError
    from .ring import LOOK_SECONDS

    if is_address(node):
        return parse_peer(node)
    may_be_host = ":" in node or "." in node  # or a name: those of many systems end with .local or .lan
    found: list[Found] = []
    with contextlib.suppress(*((ClusterError,) if may_be_host else ())):
        found = [one for one in await browse(LOOK_SECONDS) if node in (one.name, one.id)]
    if not found and may_be_host:
        return parse_peer(node)
    if len(found) > 1:
        raise InputError(f"{len(found)} nodes are named {node!r}; give one of the ids {', '.join(f.id for f in found)}")
    if not found:
        raise InputError(f"no node named {node!r} was found in {LOOK_SECONDS:.0f} s; give its host:port")
    for host in found[0].addresses:
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(host, found[0].port + 1), 2)
        except (OSError, TimeoutError):
            continue
        writer.close()
        return host, found[0].port
    raise InputError(
        f"{node} announces {', '.join(found[0].addresses)}, none of which can be reached; see its firewall"
    )


@app.command()
def unpair(machine: Annotated[str, typer.Argument(help="Name or id of a paired machine.")]) -> None:
    """Trust a machine no more; a node that runs here refuses it at once."""
    from .ring import make_home

    peer = make_home(config.load({})).peers.remove(machine)
    print(f"{peer.name} ({peer.id}) is not trusted here any more; unpair this machine there too")


@app.command()
def cache(
    folder: Annotated[
        Path | None, typer.Option("--cache", exists=True, file_okay=False, help="The folder of a node's --cache.")
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Delete all window files.")] = False,
    is_json: Json = False,
) -> None:
    """Show the window files kept on this machine, or delete them."""
    from .ring import make_home

    store = make_home(config.load({"cluster_cache": str(folder) if folder else None})).store()
    freed = {"freed_bytes": store.clear()} if clear else {}
    entries = store.entries()
    n_bytes = sum(size for _, size, _ in entries)
    if is_json:
        files = [{"file": path.name, "bytes": size, "used": used} for path, size, used in entries]
        about = {"folder": str(store.folder), "limit_bytes": store.limit_bytes, "files": files}
        print(json.dumps(about | freed, indent=2))
    elif clear:
        print(f"{freed['freed_bytes']} bytes were freed")
    else:
        print(f"{store.folder}: {len(entries)} files, {_size(n_bytes)} of at most {_size(store.limit_bytes)}")
        for path, size, _ in entries:
            print(f"  {_size(size):>10}  {path.name}")


@app.command()
def status(peers: Peers = None, is_json: Json = False) -> None:
    """Show what the nodes are doing, and how long a message takes to them."""
    from ..cluster.errors import ClusterError
    from ..cluster.member import Member
    from .ring import LOOK_SECONDS, make_home
    from .say import tell

    settings = config.load({"peers": peers})
    home = make_home(settings)

    async def look() -> list[dict[str, Any]]:
        rows = []
        for one in await home.survey(LOOK_SECONDS, settings.settings.peers, tell=tell):
            row = _row(one)
            if one.reply is not None and one.address is not None:
                try:
                    async with Member(one.address, home.gate) as member:
                        seconds, width = await member.measure_link()
                    link = {
                        "round_trip_ms": round(2 * seconds * 1000, 2),
                        "megabytes_per_second": round(width / 1e6, 1),
                    }
                except ClusterError as error:
                    link = {"state": str(error).removeprefix(one.name).strip()}
                row |= link | {"version": one.reply.version}
            rows.append(row)
        return rows

    rows = asyncio.run(look())
    if is_json:
        print(json.dumps(rows, indent=2))
        return
    for row in rows:
        link = f"{row['round_trip_ms']} ms, {row['megabytes_per_second']} MB/s" if "round_trip_ms" in row else ""
        print(f"{row['name']:<20} {row['state']:<40} {link}")
    if not rows:
        print("no nodes are there")


@app.command()
def profile(
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again, even if that was done this week.")] = False,
    threads: Annotated[int | None, config.flag("threads")] = None,
    is_json: Json = False,
) -> None:
    """Measure this machine: speed for each type of weights, memory, disk, GPU.

    \b
    Example:
      localreason cluster profile --json > attic.json
    """
    from ..cluster.device import profile as measure
    from ..runtime.llama import physical_cores
    from .ring import make_home

    settings = config.load({"threads": threads})
    home = make_home(settings)
    n_threads = settings.settings.threads or physical_cores()
    device = measure(home.cache, n_threads, ["Q8_0", "Q4_K", "Q6_K", "F16"], home.identity.name, fresh)
    if is_json:
        print(json.dumps(json.loads(device.to_json()), indent=2))
        return
    for kind, speed in device.weight_speeds.items():
        print(f"{kind:<8} {speed / 1e9:7.2f} GB/s of weights a token, with {device.n_threads} thread(s)")
    print(f"memory   {device.memory_bandwidth / 1e9:7.2f} GB/s, {_size(device.memory_bytes)} free")
    print(f"disk     {device.disk_sequential / 1e9:7.2f} GB/s in order, {device.disk_random / 1e9:.2f} at random")
    print(f"GPU      {device.gpu_name or 'none in use'}")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A file, or a name of `localreason models list`.")],
    devices: Annotated[
        Path | None, typer.Option("--devices", help="Plan for the machines of this JSON file, the head first.")
    ] = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say what other machines, contexts, files change.")
    ] = False,
    compare: Annotated[
        list[Path] | None, typer.Option("--compare", help="Explain, with another file beside it.")
    ] = None,
    objective: Annotated[str | None, config.flag("objective")] = None,
    in_flight: Annotated[int, typer.Option("--in-flight", min=1, max=256, help="Samples at once.")] = 1,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens of the cache, 16 to 16777216; unset: the setting, or 4096.")
    ] = None,
    cache_type: Annotated[str | None, config.flag("cache_type")] = None,
    row_type: Annotated[str | None, config.flag("row_type")] = None,
    rounds: Annotated[int | None, config.flag("rounds")] = None,
    disk: Annotated[bool | None, config.flag("disk", "--disk/--no-disk")] = None,
    guess: Annotated[bool | None, config.flag("guess", "--guess/--no-guess")] = None,
    peers: Peers = None,
    is_json: Json = False,
) -> None:
    """Plan a model on the machines that are there, or on described ones, and say what to expect.

    \b
    Examples:
      localreason cluster plan qwen3-1.7b --explain
      localreason cluster plan model.gguf --devices home.json --in-flight 4 --json

    \b
    The file of --devices; a machine is what `localreason cluster profile --json` prints, and may stand alone:
      {"devices": [MACHINE, MACHINE, ...],
       "links": [{"from": NAME, "to": NAME, "seconds": 0.001, "bytes_per_second": 1e8}, ...]}
    """
    from ..quant.gguf import ModelFile
    from . import build, planning, ring

    others = compare or []
    explain = explain or bool(others)
    if devices and peers:
        raise typer.BadParameter("is for the machines that are there; leave out --devices", param_hint="--peer")
    cache = {"context": context, "cache_type": cache_type}
    ways = {"objective": objective, "rounds": rounds, "row_type": row_type, "disk": disk, "guess": guess}
    settings = config.load({**cache, **ways, "peers": peers, "model": model})
    chosen = settings.settings
    file = ModelFile(build.find_model(settings, build.HuggingFace))
    file.check_cut()
    wish = ring.wish_of(file, in_flight, chosen)
    machines, links = planning.read_devices(devices) if devices else ring.measure_home(file, settings)
    question = planning.Question(file, machines, links, wish, chosen.context or ring.N_CONTEXT, "f16", chosen.row_type)
    question, found = question.settled(chosen.cache_type)
    if is_json:
        print(json.dumps(planning.as_json(question, found, explain, others), indent=2))
        return
    print("\n".join(planning.table(question, found) + (planning.explain(question, found, others) if explain else [])))


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
