"""Finding nodes in the home network by zeroconf: announces this one, yields those found and lost.

What is announced is no secret and what is found is not proven: trust comes from pairing alone.
"""

import asyncio
import contextlib
import ipaddress
import re
import shlex
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
from zeroconf import Error, IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from ..runtime.errors import InputError
from .errors import ClusterError
from .identity import Peer, is_name

SERVICE = "_localreason._tcp.local."
DEFAULT_PORT = 7411
"""Of the ring; pairing listens one above."""
_REQUEST_SECONDS = 3.0
_MOST_REQUESTS = 64
_MOST_NODES = 256
_MOST_ADDRESSES = 16
_ID = re.compile(r"[0-9a-f]{16}")
_VIRTUAL = re.compile(
    r"(docker|podman|br-[0-9a-f]{12}$|veth|virbr|incusbr|vmnet|vmware|vboxnet|virtualbox|lxc|lxd|cni|flannel|kube"
    r"|tun|tap|wg|utun|tailscale|zt|ham|ppp|ipsec|nebula|outline|vpn|openvpn|protonvpn|cscotun|gpd|awdl|llw|loopback"
    r"|lo\d*$)",
    re.IGNORECASE,
)
"""Interfaces of containers, virtual machines, VPNs and of this machine alone: no other machine at home is behind."""


@dataclass(frozen=True, slots=True)
class Announcement:
    """What a node tells everybody in the network."""

    name: str
    id: str
    port: int
    version: int  # of the ring's protocol


@dataclass(frozen=True, slots=True)
class Found:
    """A node that announces itself, or somebody who pretends to be one."""

    name: str
    id: str
    addresses: tuple[str, ...]
    port: int
    version: int


@dataclass(frozen=True, slots=True)
class Lost:
    """A node that was found is announced no more."""

    id: str


def useful_addresses(is_loopback: bool = False) -> list[str]:
    """Addresses at which others at home reach this machine, IPv4 first; with `is_loopback` those of itself alone."""
    states = psutil.net_if_stats()
    found: list[str] = []
    for name, rows in psutil.net_if_addrs().items():
        state = states.get(name)
        if state is None or not state.isup or not (is_loopback or _is_of_home(name, state.flags)):
            continue
        texts = [row.address for row in rows if row.family in (socket.AF_INET, socket.AF_INET6)]
        addresses = [ipaddress.ip_address(text) for text in texts]
        addresses = [address for address in addresses if address.is_loopback == is_loopback]
        # A link-local address needs a zone, which is another on every machine: only where there is nothing else.
        addresses = [address for address in addresses if not address.is_link_local] or addresses
        found += [str(address) for address in addresses]
    return sorted(dict.fromkeys(found), key=lambda text: ":" in text)


def _is_of_home(name: str, flags: str) -> bool:
    """Whether other machines at home may be behind an interface; Windows tells no flags."""
    told = flags.split(",") if flags else ["multicast"]
    return "multicast" in told and "pointopoint" not in told and not _VIRTUAL.match(name)


def _open(addresses: Sequence[str]) -> AsyncZeroconf:
    v4, v6 = ([text for text in addresses if (":" in text) == is_v6] for is_v6 in (False, True))
    version = IPVersion.All if v4 and v6 else IPVersion.V6Only if v6 else IPVersion.V4Only
    try:
        return AsyncZeroconf(interfaces=[*v4, *v6], ip_version=version)
    except (OSError, RuntimeError) as error:
        if v4 and v6:  # IPv6 is there, but multicast over it is not
            return _open(v4)
        raise ClusterError(
            f"zeroconf cannot use {', '.join(addresses)}: {error}; give addresses as HOST:PORT"
        ) from error


def _reachable(is_loopback: bool) -> list[str]:
    addresses = useful_addresses(is_loopback)
    if not addresses:
        raise ClusterError("no network interface is up that other machines reach; connect one or give HOST:PORT")
    return addresses


@contextlib.asynccontextmanager
async def announce(announcement: Announcement, is_loopback: bool = False) -> AsyncIterator[list[str]]:
    """Be found while the context lasts; gives the addresses announced. Raises ClusterError."""
    addresses = _reachable(is_loopback)
    info = AsyncServiceInfo(
        SERVICE,
        f"{announcement.id}.{SERVICE}",  # a name may be given twice, an id not
        port=announcement.port,
        properties={"v": str(announcement.version), "id": announcement.id, "name": announcement.name},
        server=f"{announcement.id}.local.",
        parsed_addresses=[address.partition("%")[0] for address in addresses],
    )
    async with _open(addresses) as zeroconf:
        try:
            await zeroconf.async_register_service(info)
        except (Error, OSError) as error:
            raise ClusterError(
                f"{announcement.name} cannot be announced: {str(error) or type(error).__name__}; stop another node of "
                "this machine, if one runs"
            ) from error
        yield addresses


async def watch(is_loopback: bool = False) -> AsyncGenerator[Found | Lost, None]:
    """Nodes as they come, change and go, until the generator is closed. Raises ClusterError."""
    events: asyncio.Queue[Found | Lost] = asyncio.Queue()
    known: dict[str, Found] = {}
    requests: dict[str, asyncio.Task[None]] = {}

    async def look(zeroconf: Zeroconf, name: str) -> None:
        info = AsyncServiceInfo(SERVICE, name)
        with contextlib.suppress(Error, OSError, ValueError):  # a record that cannot be read is no node
            if await info.async_request(zeroconf, _REQUEST_SECONDS * 1000):
                found = read(info)
                if found and known.get(name) != found and len(known) < _MOST_NODES:
                    known[name] = found
                    events.put_nowait(found)

    def change(zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange) -> None:
        if request := requests.pop(name, None):
            request.cancel()
        if state_change is ServiceStateChange.Removed:
            if found := known.pop(name, None):
                events.put_nowait(Lost(found.id))
        elif len(requests) < _MOST_REQUESTS:  # whoever floods the network shall not fill the memory
            task = asyncio.get_running_loop().create_task(look(zeroconf, name))
            requests[name] = task
            task.add_done_callback(lambda done: requests.get(name) is done and requests.pop(name))

    async with _open(_reachable(is_loopback)) as zeroconf:
        browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[change])
        try:
            while True:
                yield await events.get()
        finally:
            await browser.async_cancel()
            tasks = list(requests.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def browse(seconds: float, is_loopback: bool = False, wanted: Collection[str] = ()) -> list[Found]:
    """The nodes that are there after so long a look, by name; it ends before where all `wanted`, ids, are. Raises
    ClusterError."""
    found: dict[str, Found] = {}
    with contextlib.suppress(TimeoutError):
        async with contextlib.aclosing(watch(is_loopback)) as events, asyncio.timeout(seconds):
            async for event in events:
                if isinstance(event, Found):
                    found[event.id] = event
                else:
                    found.pop(event.id, None)
                if wanted and found.keys() >= set(wanted):
                    break
    return sorted(found.values(), key=lambda node: (node.name, node.id))


def read(info: Any) -> Found | None:
    """The node that a zeroconf record tells of; None where it is not such as `announce` sends."""
    properties: dict[bytes, bytes | None] = info.properties
    id, name, version = (_text(properties.get(key)) for key in (b"id", b"name", b"v"))
    addresses = tuple(info.parsed_scoped_addresses()[:_MOST_ADDRESSES])
    is_sound = (
        _ID.fullmatch(id)
        and info.name == f"{id}.{SERVICE}"
        and is_name(name)
        and re.fullmatch("[0-9]{1,5}", version)
        and isinstance(info.port, int)
        and 0 < info.port < 65535  # pairing listens one above
        and addresses
    )
    return Found(name, id, addresses, info.port, int(version)) if is_sound else None


def _text(data: bytes | None) -> str:
    try:
        return (data or b"").decode()
    except UnicodeDecodeError:
        return ""


def parse_peer(text: str) -> tuple[str, int]:
    """Host and port of `host`, `host:port`, `[v6]:port` or `v6`; without a port the ring's. Raises InputError."""
    problem = f"{text[:80]!r} is not HOST, HOST:PORT or [IPv6]:PORT with a port from 1 to 65535; e.g. 192.168.1.7:7411"
    if text.count(":") > 1 and not text.startswith("["):
        host, port = text, str(DEFAULT_PORT)
    else:
        match = re.fullmatch(r"(\[[^\[\]]+\]|[^\s:\[\]]+)(?::([0-9]{1,5}))?", text)
        if not match:
            raise InputError(problem)
        host, port = match[1], match[2] or str(DEFAULT_PORT)
    if ":" in host or host.startswith("["):
        host = host.strip("[]")
        try:
            ipaddress.IPv6Address(host)
        except ValueError as error:
            raise InputError(problem) from error
    elif not _is_host(host):
        raise InputError(problem)
    if not 0 < int(port) < 65536:
        raise InputError(problem)
    return host, int(port)


def is_address(text: str) -> bool:
    """Whether this is a number of IPv4 or IPv6, with or without a port, and so nobody's name."""
    try:
        ipaddress.ip_address(parse_peer(text)[0])
    except (InputError, ValueError):
        return False
    return True


def _is_host(text: str) -> bool:
    """Whether a system can be asked for this name: it has labels of at most 63 bytes, and none is empty."""
    try:
        return len(text) <= 253 and text.isprintable() and bool(text.encode("idna"))
    except UnicodeError:
        return False


def write_peer(host: str, port: int) -> str:
    """Host and port as `parse_peer` reads them."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def usability(found: Found, version: int, peers: Sequence[Peer], own_id: str = "") -> str | None:
    """Why a ring cannot use this node, None if it can as far as is known here."""
    if found.id == own_id:
        return "is this machine"
    if found.version != version:
        where = "there" if found.version < version else "here"
        return f"speaks protocol {found.version}, this is {version}: update localreason {where}"
    if any(peer.id == found.id for peer in peers):
        return None
    name = shlex.quote(found.name)  # a stranger chose it, and the command will be copied into a shell
    if any(peer.name == found.name for peer in peers):
        return (
            f"not paired: the machine paired as {name} has another id than {found.id}; if it was set up anew, "
            f"run `localreason cluster unpair {name}` and `localreason cluster pair {name}`"
        )
    return f"not paired: run `localreason cluster pair {name}`"
