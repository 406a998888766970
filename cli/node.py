"""`localreason node`: lend this machine to a ring until stopped."""

import asyncio
import contextlib
import logging
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.errors import InputError
from . import config

if TYPE_CHECKING:
    from ..cluster.home import Home

_AGAIN_SECONDS = 5.0
"""Between two looks at this machine's addresses."""
app = typer.Typer(rich_markup_mode=None, add_completion=False)

Loopback = Annotated[bool, typer.Option("--loopback", help="Listen on this machine only and announce nothing.")]
Plain = Annotated[bool, typer.Option("--plaintext", help="No encryption and no pairing; only with --loopback.")]
Folder = Annotated[Path | None, typer.Option("--folder", help="Folder of identity and pairings.")]
Cache = Annotated[Path | None, typer.Option("--cache", help="Folder of received weights.")]
Limit = Annotated[
    float | None,
    typer.Option("--cache-limit", min=0.01, max=1e6, help="GiB of weights to keep; unset: half the free disk."),
]


@app.command()
def node(
    name: Annotated[
        str | None, typer.Option("--name", help="Name, at the first start; unset: that of the system.")
    ] = None,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65534, help="Port; pairing takes the next one. 0 takes a free one.")
    ] = 7411,
    threads: Annotated[int | None, config.flag("threads")] = None,
    loopback: Loopback = False,
    plaintext: Plain = False,
    folder: Folder = None,
    cache: Cache = None,
    cache_limit: Limit = None,
    store: Annotated[str | None, config.flag("store")] = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log refused calls.")] = False,
) -> None:
    """Lend this machine to the models of paired machines, until Ctrl-C.

    It needs no model file: weights are sent once, checked, and kept. Pair it once: run `localreason cluster pair` on
    the machine that asks questions and type the code that is shown here.

    \b
    Examples:
      localreason node
      localreason node --name attic --port 7500 --cache-limit 20
    """
    if plaintext and not loopback:
        raise InputError("--plaintext lets anybody in who reaches the port; give --loopback with it, or leave it out")
    settings = config.load({"threads": threads, "store": store})
    logging.basicConfig(level=logging.WARNING if verbose else logging.ERROR, format="%(asctime)s %(message)s")
    if not verbose:  # it tells of a network that went away by a traceback
        logging.getLogger("zeroconf").setLevel(logging.CRITICAL)
    from ..cluster.home import Home

    limit = int(cache_limit * 2**30) if cache_limit else None
    home = Home(folder, cache, plaintext, limit, name)
    known = home.identity.name
    if not plaintext and name not in (None, known):
        _show(
            f"this machine stays {known}, as its certificate and the machines paired with it have it, and not {name}; "
            f"to rename it, delete {home.identity.folder / 'identity.pem'} and pair again"
        )
    try:
        asyncio.run(_run(home, name if name and plaintext else known, port, settings, loopback))
    except KeyboardInterrupt:
        _show("stopped")


async def _run(home: "Home", name: str, port: int, settings: config.Config, is_loopback: bool) -> None:
    from ..cluster.device import profile
    from ..cluster.node import Node, NodeOptions, serve
    from ..cluster.pairing import PairingServer
    from ..runtime.llama import physical_cores

    n_threads = settings.settings.threads or physical_cores()

    def measure(types: list[str]) -> str:
        return profile(home.cache, n_threads, types, name).to_json()

    node = Node(NodeOptions(name, n_threads, measure), home.store([settings.store]), home.gate, _show)
    pairing = PairingServer(home.identity, home.peers, _show)

    async def ready(port: int) -> None:
        print(f"listening on port {port}", flush=True)
        if home.is_plain:
            _show(f"{name} is ready without encryption, for this machine alone")
            return
        await pairing.start([host] if is_loopback else ["0.0.0.0", "::"], port + 1)
        paired = ", ".join(peer.name for peer in home.peers.list()) or "nobody yet"
        _show(f"{name} ({home.identity.id}) is ready; paired with: {paired}")
        if not is_loopback:
            stack.append(asyncio.create_task(_announce(name, home.identity.id, port)))

    # On most systems :: takes IPv4 too; where there is no IPv6 it cannot be had.
    host = "127.0.0.1" if is_loopback else "::" if _has_ipv6() else "0.0.0.0"
    stack: list[asyncio.Task[None]] = []
    try:
        await serve(node, lambda server: home.gate.add_port(server, host, port), ready)
    finally:
        for task in stack:
            task.cancel()
        await asyncio.gather(*stack, return_exceptions=True)
        await pairing.stop()


def _has_ipv6() -> bool:
    try:
        with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True):
            return True
    except (OSError, ValueError):
        return False


async def _announce(name: str, id: str, port: int) -> None:
    """Be found for as long as the node serves, by the addresses that this machine has at the time: a network may come
    up later, or be another one. Told is why it cannot be found, once for each reason."""
    from ..cluster.codec import PROTOCOL
    from ..cluster.discovery import Announcement, announce, useful_addresses
    from ..cluster.errors import ClusterError

    told = ""
    while True:
        addresses = useful_addresses()
        try:
            async with announce(Announcement(name, id, port, PROTOCOL)):
                told = ""
                while useful_addresses() == addresses:
                    await asyncio.sleep(_AGAIN_SECONDS)
        except ClusterError as error:
            if told != (told := str(error)):
                _show(f"{error}; others reach this node by --peer HOST:{port}")
            await asyncio.sleep(_AGAIN_SECONDS)


def _show(line: str) -> None:
    with contextlib.suppress(OSError):  # a node outlives the terminal that it was started in
        print(line, file=sys.stderr, flush=True)
