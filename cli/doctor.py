"""`localreason doctor`: what this machine and its network can do, and what that means in tokens a second."""

import asyncio
import json
import secrets
import shutil
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.errors import OutputError
from . import config

if TYPE_CHECKING:
    from ..cluster.costs import ModelCosts
    from ..cluster.device import Device
    from ..cluster.home import Home

app = typer.Typer(rich_markup_mode=None, add_completion=False)
_MODELS = ((1.5, "Q8_0", 1.06), (8, "Q4_K", 0.57), (32, "Q4_K", 0.57))
"""Billions of weights, type, bytes a weight: what people ask about."""
_N_LAYERS = 32


@app.command()
def doctor(
    peers: Annotated[list[str] | None, config.flag("peers", "--peer", show="HOST:PORT")] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again, even if that was done this week.")] = False,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure this machine and look at its network: memory, disk, GPU, ports, multicast, nodes and their clocks.

    Takes some seconds, needs no other rights than yours.

    \b
    Example:
      localreason doctor --fresh
    """
    from ..cluster.device import profile
    from ..runtime.llama import physical_cores
    from .ring import make_home

    settings = config.load({"peers": peers})
    home = make_home(settings)
    n_threads = settings.settings.threads or physical_cores()
    try:
        machine = _machine(profile(home.cache, n_threads, ["Q8_0", "Q4_K"], "head", fresh), home)
    except OutputError as error:  # the network can be looked at all the same
        machine = [_row("cache", str(error), "without it no speed can be measured, and no ring formed", ok=False)]
    report = {"machine": machine, "network": asyncio.run(_network(home, settings.settings.peers))}
    if is_json:
        print(json.dumps(report, indent=2))
        return
    for part in report.values():
        for row in part:
            print(f"{'ok ' if row['ok'] else 'NOT'}  {row['what']:<14} {row['found']}")
            if row["means"]:
                print(f"     {'':<14} {row['means']}")


def _row(what: str, found: str, means: str = "", ok: bool = True) -> dict[str, Any]:
    return {"what": what, "found": found, "means": means, "ok": ok}


def _model(n_bytes: float, kind: str) -> "ModelCosts":
    """Weights alone, of layers that are alike: a GPU may hold some of them."""
    from ..cluster.costs import ModelCosts

    return ModelCosts((int(n_bytes / _N_LAYERS),) * _N_LAYERS, (kind,) * _N_LAYERS, 0, 1, 0, kind, 1)


def _machine(device: "Device", home: "Home") -> list[dict[str, Any]]:
    from ..cluster.errors import PlanImpossible
    from ..cluster.plan import plan

    gib = 2**30
    rows = [_row("memory", f"{device.memory_bytes / gib:.1f} GiB free for weights and cache")]
    speeds = ", ".join(f"{kind} {speed / 1e9:.1f} GB/s" for kind, speed in device.weight_speeds.items())
    rows.append(
        _row("weights", f"{speeds} with {device.n_threads} thread(s) ({device.memory_bandwidth / 1e9:.0f} GB/s raw)")
    )
    for billions, kind, n_bytes in _MODELS:
        size = billions * 1e9 * n_bytes
        try:
            rate = 1 / plan(_model(size, kind), [device]).token_seconds
            rows.append(_row("", f"{billions:g}B {kind}", f"about {rate:.1f} tokens a second, one answer at a time"))
        except PlanImpossible:
            need = f"{size / gib:.1f} GiB do not fit beside what runs here; share it with `--cluster`"
            rows.append(_row("", f"{billions:g}B {kind}", need))
    is_slow = 0 < device.disk_sequential < 0.2e9
    disk = f"{device.disk_sequential / 1e9:.2f} GB/s in order, {device.disk_random / 1e9:.2f} GB/s at random"
    worth = device.disk_sequential / (8e9 * 0.57) if device.disk_sequential else 0.0
    rows.append(
        _row("disk", disk, f"a model of 8B Q4_K read from disk for each token: {worth:.2f} a second", not is_slow)
    )
    free = shutil.disk_usage(home.cache).free
    rows.append(_row("disk space", f"{free / gib:.1f} GiB free at {home.cache}", ok=free > 2 * gib))
    gpu = f"{device.gpu_name}, {device.gpu_memory_bytes / gib:.1f} GiB free" if device.gpu_name else "none in use"
    means = "" if device.gpu_name else "a GPU needs llama-cpp-python built for it, such as CMAKE_ARGS=-DGGML_CUDA=on"
    rows.append(_row("GPU", gpu, means))
    rows += [_row("note", note) for note in device.notes]
    return rows


async def _network(home: "Home", named: tuple[str, ...]) -> list[dict[str, Any]]:
    from ..cluster.codec import PROTOCOL
    from ..cluster.discovery import DEFAULT_PORT, Announcement, announce, browse, useful_addresses
    from ..cluster.errors import ClusterError
    from .ring import LOOK_SECONDS

    addresses = useful_addresses()
    rows = [_row("addresses", ", ".join(addresses) or "none", "" if addresses else "no network is up", bool(addresses))]
    for port, what in ((DEFAULT_PORT, "ring port"), (DEFAULT_PORT + 1, "pairing port")):
        is_free = _is_free(port)
        rows.append(
            _row(what, f"{port} is {'free' if is_free else 'taken, by a node that runs here or by something else'}")
        )
    try:
        # Not this machine's id: a node that runs here has that.
        probe = Announcement("localreason doctor", secrets.token_hex(8), DEFAULT_PORT, PROTOCOL)
        async with announce(probe):
            is_heard = any(found.id == probe.id for found in await browse(LOOK_SECONDS))
        means = "" if is_heard else "nodes cannot be found by themselves; name them with --peer HOST:PORT"
        rows.append(
            _row("multicast", "heard its own announcement" if is_heard else "did not hear itself", means, is_heard)
        )
    except ClusterError as error:
        rows.append(_row("multicast", str(error), "name nodes with --peer HOST:PORT", False))
    return rows + await look_at_nodes(home, named)


async def look_at_nodes(home: "Home", named: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the nodes that announce themselves or are named: what they can be used for, their links, their clocks."""
    from ..cluster.errors import ClusterError
    from ..cluster.member import Member
    from .ring import LOOK_SECONDS

    rows: list[dict[str, Any]] = []
    reasons: list[str] = []
    seen = await home.survey(LOOK_SECONDS, named, tell=reasons.append)
    for one in seen:
        found, means = one.problem or "ready", ""
        if one.reply is not None and one.address is not None:
            try:
                async with Member(one.address, home.gate) as member:
                    seconds, width = await member.measure_link()
                found += f"; {2 * seconds * 1000:.1f} ms there and back, {width / 1e6:.0f} MB/s"
                means = f"at most {1 / max(2 * seconds, 1e-6):.0f} tokens a second of one answer through this link"
            except ClusterError as error:
                found = str(error).removeprefix(one.name).strip()
        rows.append(_row(f"node {one.name}", found, means, not one.problem))
        if one.reply is not None:
            rows.append(clock_row(one.name, one.clock_seconds))
    rows += [_row("nodes", reason, ok=False) for reason in reasons]
    if not seen and not reasons:
        rows.append(_row("nodes", "none", "run `localreason node` on another machine of the home"))
    return rows


def clock_row(name: str, seconds: float) -> dict[str, Any]:
    """What is said of a node's clock that is so far ahead of this machine's."""
    from ..cluster.home import MOST_CLOCK_SECONDS

    is_ok = abs(seconds) <= MOST_CLOCK_SECONDS
    amount = f"{abs(seconds):.1f} s" if abs(seconds) < 3600 else f"{abs(seconds) / 3600:.1f} hours"
    means = "certificates hold from a day before they are made: a new one may be refused; set the clock"
    return _row(
        f"clock {name}",
        f"{amount} {'ahead of' if seconds > 0 else 'behind'} this machine's; up to "
        f"{MOST_CLOCK_SECONDS // 3600} hours do no harm",
        "" if is_ok else means,
        is_ok,
    )


def _is_free(port: int) -> bool:
    try:
        with socket.create_server(("", port)):
            return True
    except OSError:
        return False
