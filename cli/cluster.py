"""`localreason cluster`: which machines there are, whom this one trusts, what a plan would be."""

import asyncio
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.errors import InputError
from . import config

if TYPE_CHECKING:
    from ..cluster.home import Seen

app = typer.Typer(
    rich_markup_mode=None, add_completion=False, no_args_is_help=True, help="Pair, list and plan the home's machines."
)

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

    settings = config.load({"peers": peers})
    home = make_home(settings)
    seen = asyncio.run(home.survey(LOOK_SECONDS, settings.settings.peers))
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
    address = f"{seen.address.host}:{seen.address.port}" if seen.address else None
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
    from ..cluster.pairing import pair as pair_with
    from .ring import make_home

    home = make_home(config.load({}))
    host, port = asyncio.run(_find(node))

    def ask(prompt: str) -> str:
        return code if code is not None else typer.prompt(prompt)

    peer = asyncio.run(pair_with(host, port + 1, home.identity, home.peers, ask))
    print(f"paired with {peer.name} ({peer.id})")


async def _find(node: str) -> tuple[str, int]:
    """Host and port of a node by its name or address. Raises InputError."""
    from ..cluster.discovery import browse, parse_peer
    from .ring import LOOK_SECONDS

    if ":" in node or "." in node:
        return parse_peer(node)
    found = [one for one in await browse(LOOK_SECONDS) if node in (one.name, one.id)]
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
    clear: Annotated[bool, typer.Option("--clear", help="Delete all window files.")] = False, is_json: Json = False
) -> None:
    """Show the window files kept on this machine, or delete them."""
    from .ring import make_home

    store = make_home(config.load({})).store()
    entries = store.entries()
    n_bytes = sum(size for _, size, _ in entries)
    if clear:
        print(f"{store.clear()} bytes were freed")
    elif is_json:
        files = [{"file": path.name, "bytes": size, "used": used} for path, size, used in entries]
        print(json.dumps({"folder": str(store.folder), "limit_bytes": store.limit_bytes, "files": files}, indent=2))
    else:
        print(f"{store.folder}: {len(entries)} files, {_size(n_bytes)} of at most {_size(store.limit_bytes)}")
        for path, size, _ in entries:
            print(f"  {_size(size):>10}  {path.name}")


@app.command()
def status(peers: Peers = None, is_json: Json = False) -> None:
    """Show what the nodes are doing, and how long a message takes to them."""
    from ..cluster.member import Member
    from .ring import LOOK_SECONDS, make_home

    settings = config.load({"peers": peers})
    home = make_home(settings)

    async def look() -> list[dict[str, Any]]:
        rows = []
        for one in await home.survey(LOOK_SECONDS, settings.settings.peers):
            row = _row(one)
            if one.reply is not None and one.address is not None:
                member = Member(one.address, home.gate)
                try:
                    seconds, width = await member.measure_link()
                finally:
                    await member.release()
                row |= {"round_trip_ms": round(seconds * 1000, 2), "megabytes_per_second": round(width / 1e6, 1)}
                row["version"] = one.reply.version
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


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:.1f} MiB"
