import asyncio
import contextlib
import socket
import time
from types import SimpleNamespace

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import NonUniqueNameException, ServiceInfo
from zeroconf.asyncio import AsyncServiceInfo, AsyncZeroconf

from localreason.cli import node
from localreason.cli.cluster import _find, _row
from localreason.cli.doctor import _network
from localreason.cluster import discovery
from localreason.cluster.discovery import (
    SERVICE,
    Announcement,
    Found,
    Lost,
    announce,
    browse,
    parse_peer,
    read,
    usability,
    useful_addresses,
    watch,
    write_peer,
)
from localreason.cluster.errors import ClusterError
from localreason.cluster.gate import target
from localreason.cluster.home import Home, Seen, _told_apart
from localreason.cluster.identity import Identity, Peer
from localreason.cluster.member import Address, Member
from localreason.cluster.wire.ring_pb2 import DescribeReply, Failure, FromNode
from localreason.runtime.errors import InputError

ID, OTHER = "0123456789abcdef", "fedcba9876543210"


def test_nodes_are_found_and_lost():
    async def run():
        async with contextlib.aclosing(watch(is_loopback=True)) as events, asyncio.timeout(8):
            async with announce(Announcement("büro", ID, 7411, 3), is_loopback=True) as addresses:
                assert addresses[0] == "127.0.0.1"
                assert await anext(events) == Found("büro", ID, tuple(addresses), 7411, 3)
                assert await browse(0.3, is_loopback=True) == [Found("büro", ID, tuple(addresses), 7411, 3)]
                [found] = await browse(600, is_loopback=True, wanted=[ID])
                assert found.id == ID
            assert await anext(events) == Lost(ID)

    asyncio.run(run())


def test_garbage_records_are_passed_over():
    async def run():
        stranger = AsyncZeroconf(interfaces=["127.0.0.1"])
        async with contextlib.aclosing(watch(is_loopback=True)) as events, asyncio.timeout(8), stranger as zeroconf:
            for i, properties in enumerate([{}, {"v": b"\xff", "id": "x"}, {"v": "1", "id": OTHER, "name": "\x1b[2J"}]):
                name = f"{OTHER if i == 2 else i}.{SERVICE}"
                info = AsyncServiceInfo(SERVICE, name, 1, 0, 0, properties, "x.local.", addresses=[b"\x7f\0\0\1"])
                await zeroconf.async_register_service(info, strict=False, cooperating_responders=True)
            async with announce(Announcement("tower", ID, 7411, 1), is_loopback=True):
                assert (await anext(events)).id == ID

    asyncio.run(run())


def test_nobody_there():
    assert asyncio.run(browse(0.05, is_loopback=True)) == []


def record(properties=None, name=f"{ID}.{SERVICE}", port=7411, addresses=("192.168.1.7",)):
    properties = {"v": "1", "id": ID, "name": "tower"} if properties is None else properties
    return ServiceInfo(SERVICE, name, port, properties=properties, server="x.local.", parsed_addresses=list(addresses))


def test_a_sound_record_is_read():
    assert read(record()) == Found("tower", ID, ("192.168.1.7",), 7411, 1)


@pytest.mark.parametrize(
    "bad",
    [
        record({}),
        record({"v": "1", "id": OTHER, "name": "tower"}),
        record({"v": "1", "id": ID.upper(), "name": "tower"}, name=f"{ID.upper()}.{SERVICE}"),
        record({"v": "1", "id": ID[:-1], "name": "tower"}, name=f"{ID[:-1]}.{SERVICE}"),
        record({"v": "one", "id": ID, "name": "tower"}),
        record({"v": "١", "id": ID, "name": "tower"}),
        record({"v": "9" * 200, "id": ID, "name": "tower"}),
        record({"v": "1", "id": ID, "name": "x" * 65}),
        record({"v": "1", "id": ID, "name": "a\nb"}),
        record({"v": "1", "id": ID, "name": b"\xff\xfe"}),
        record({"v": "1", "id": ID, "name": None}),
        record(port=0),
        record(port=None),
        record(port=65535),  # pairing would listen one above
        record(port=65536),
        record(addresses=()),
    ],
)
def test_an_unsound_record_is_none(bad):
    assert read(bad) is None


@given(st.binary(max_size=400))
def test_random_texts_never_raise(text):
    read(record(text))


def test_many_addresses_are_cut():
    assert len(read(record(addresses=[f"10.0.0.{i}" for i in range(200)])).addresses) == 16


def interfaces(monkeypatch, table):
    """A machine of these interfaces: name -> (is up, flags, addresses)."""

    def row(address):
        return SimpleNamespace(family=socket.AF_INET6 if ":" in address else socket.AF_INET, address=address)

    mac = SimpleNamespace(family=psutil.AF_LINK, address="02:fc:00:00:00:01")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {name: [*map(row, t[2]), mac] for name, t in table.items()})
    states = {name: SimpleNamespace(isup=t[0], flags=t[1]) for name, t in table.items()}
    monkeypatch.setattr(psutil, "net_if_stats", lambda: states)


CAST = "up,broadcast,running,multicast"


def test_only_interfaces_of_the_home_are_used(monkeypatch):
    virtual = [
        "docker0",
        "br-1f2e3d4c5b6a",
        "veth12",
        "vEthernet (WSL)",
        "virbr0",
        "vmnet8",
        "vboxnet0",
        "tun0",
        "tap0",
        "wg0",
    ]
    virtual += ["utun3", "tailscale0", "ztabc", "ham0", "ppp0", "awdl0", "llw0", "lo0"]
    virtual += ["cscotun0", "gpd0", "ipsec0", "nebula1", "outline-tun0", "vpn0", "OpenVPN Wintun", "ProtonVPN"]
    virtual += ["incusbr0", "flannel.1", "kube-bridge"]
    table = {name: (True, CAST, [f"10.9.{i}.1"]) for i, name in enumerate(virtual)}
    table |= {
        "lo": (True, "up,loopback", ["127.0.0.1", "::1"]),
        "eth0": (True, CAST, ["fe80::1%eth0", "fd00::2", "192.168.1.7"]),
        "wlan0": (True, CAST, ["192.168.1.8", "192.168.1.7"]),
        "eth1": (False, "broadcast,multicast", ["192.168.2.1"]),
        "eth2": (True, "up,pointopoint", ["192.168.3.1"]),
        "eth3": (True, "up,pointopoint,running,noarp,multicast", ["192.168.3.2"]),
        "br-lan": (True, CAST, ["192.168.6.1"]),
        "Local Area Connection": (True, "", ["192.168.4.1"]),
        "br0": (True, CAST, ["192.168.5.1"]),
        "usb0": (True, CAST, ["fe80::2%usb0"]),
    }
    interfaces(monkeypatch, table)
    home = ["192.168.1.7", "192.168.1.8", "192.168.6.1", "192.168.4.1", "192.168.5.1", "fd00::2", "fe80::2%usb0"]
    assert useful_addresses() == home
    assert useful_addresses(is_loopback=True) == ["127.0.0.1", "::1"]


def test_a_machine_without_a_network_says_so(monkeypatch):
    interfaces(monkeypatch, {"lo": (True, "up,loopback", ["127.0.0.1"])})
    assert useful_addresses() == []
    with pytest.raises(ClusterError, match="give HOST:PORT"):
        asyncio.run(browse(1))


def test_without_a_network_to_look_on_named_nodes_are_asked_all_the_same(monkeypatch, tmp_path):
    interfaces(monkeypatch, {"tailscale0": (True, "up,pointopoint", ["100.64.0.7"])})
    home = Home(tmp_path / "identity", tmp_path / "cache", name="laptop")
    [seen] = asyncio.run(home.survey(0.1, ["127.0.0.1:1"]))
    assert "is not paired" in seen.problem
    told = []
    assert asyncio.run(home.survey(0.1, tell=told.append)) == []
    assert "give HOST:PORT" in told[0]
    [multicast, nodes] = [row for row in asyncio.run(_network(home, ())) if not row["ok"]][1:]
    assert (multicast["found"], nodes["found"]) == (told[0], told[0])


def test_a_node_is_announced_anew_when_the_network_comes_or_changes(monkeypatch, capsys):
    there, announced = [], asyncio.Queue()

    @contextlib.asynccontextmanager
    async def announce(announcement):
        if not there:
            announced.put_nowait(None)
            raise ClusterError("no network")
        announced.put_nowait(list(there))
        yield there

    monkeypatch.setattr(discovery, "announce", announce)
    monkeypatch.setattr(discovery, "useful_addresses", lambda: list(there))
    monkeypatch.setattr(node, "_AGAIN_SECONDS", 0.001)

    async def run():
        task = asyncio.create_task(node._announce("attic", ID, 7411))
        async with asyncio.timeout(10):
            assert await announced.get() is None
            assert await announced.get() is None  # asked again, told once
            for addresses in (["192.168.1.4"], ["192.168.1.4", "fd00::4"]):
                there[:] = addresses
                while (found := await announced.get()) is None:
                    pass
                assert found == addresses
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert capsys.readouterr().err.count("no network") == 1


def test_a_node_that_cannot_be_announced_says_so_and_how_it_is_reached(monkeypatch):
    interfaces(monkeypatch, {"tailscale0": (True, "up,pointopoint", ["100.64.0.7"])})

    async def run():
        lines = asyncio.Queue()
        monkeypatch.setattr(node, "_show", lines.put_nowait)
        task = asyncio.create_task(node._announce("attic", ID, 7411))
        async with asyncio.timeout(10):
            line = await lines.get()
        task.cancel()
        return line

    said = asyncio.run(run())
    assert "no network interface" in said
    assert "--peer HOST:7411" in said


@pytest.mark.parametrize(
    ("text", "peer"),
    [
        ("tower", ("tower", 7411)),
        ("tower.local:80", ("tower.local", 80)),
        ("192.168.1.7:65535", ("192.168.1.7", 65535)),
        ("[fd00::2]:7000", ("fd00::2", 7000)),
        ("[fe80::1%eth0]", ("fe80::1%eth0", 7411)),
        ("fd00::2", ("fd00::2", 7411)),
    ],
)
def test_addresses_of_peers(text, peer):
    assert parse_peer(text) == peer
    assert parse_peer(write_peer(*peer)) == peer


def test_grpc_takes_its_targets_for_uris():
    assert target("fe80::1%16", 7411) == "[fe80::1%2516]:7411"
    assert target("tower.local", 7411) == "tower.local:7411"


def test_a_node_that_is_named_by_ipv6_is_called_by_what_can_be_typed(tmp_path):
    home = Home(tmp_path / "identity", tmp_path / "cache", name="laptop")
    [seen] = asyncio.run(home.survey(0, ["[fd00::2]:7599"]))
    assert seen.problem.endswith("`localreason cluster pair '[fd00::2]:7599'`")
    seen = Seen("attic", ID, Address("attic", "fd00::2", 7599))
    assert _row(seen)["address"] == "[fd00::2]:7599"


def test_the_machine_that_was_met_at_an_address_is_tried_first_there(tmp_path, monkeypatch):
    home = Home(tmp_path / "identity", tmp_path / "cache", name="laptop")
    for name, address in (("attic", "192.168.1.7:7412"), ("desk", "[fd00::2]:7412"), ("phone", "")):
        home.peers.add(Identity.load(tmp_path / name, name).certificate, address)

    async def ask(self, address, id, types):
        return Seen(address.name, id, address, "", DescribeReply())

    monkeypatch.setattr(Home, "_ask", ask)
    assert asyncio.run(home.survey(0, ["[fd00::2]:7411"]))[0].name == "desk"
    assert asyncio.run(home.survey(0, ["192.168.1.7"]))[0].name == "attic"


BAD_PEERS = [
    "",
    ":",
    ":80",
    "a:",
    "a:0",
    "a:65536",
    "a:x",
    "a:-1",
    "a:٣",
    "a b",
    "a:1:2",
    "[a]:1",
    "[fd00::2",
    "x" * 254,
    "attic..lan:7411",
    f"{'a' * 64}.lan",
    "\0",
]


@pytest.mark.parametrize("text", BAD_PEERS)
def test_bad_addresses_of_peers(text):
    with pytest.raises(InputError, match="is not HOST, HOST:PORT or"):
        parse_peer(text)


@given(st.text())
def test_any_text_is_an_address_or_an_input_error(text):
    with contextlib.suppress(InputError):
        host, port = parse_peer(text)
        assert host
        assert 0 < port < 65536


def test_names_with_dots_and_colons_are_looked_for_before_they_are_addresses(monkeypatch):
    async def there(seconds):
        return [Found(name, ID, ("127.0.0.1",), port, 1) for name in ("attic.lan", "den:2")]

    async def nobody(seconds):
        raise ClusterError("no network")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1] - 1
        monkeypatch.setattr(discovery, "browse", there)
        assert asyncio.run(_find("attic.lan")) == ("127.0.0.1", port)
        assert asyncio.run(_find("den:2")) == ("127.0.0.1", port)
        assert asyncio.run(_find("attic.local:7500")) == ("attic.local", 7500)
    monkeypatch.setattr(discovery, "browse", nobody)
    assert asyncio.run(_find("attic.lan")) == ("attic.lan", 7411)
    assert asyncio.run(_find("127.0.0.1:7500")) == ("127.0.0.1", 7500)
    with pytest.raises(ClusterError, match="no network"):
        asyncio.run(_find("the attic"))


def test_a_stranger_takes_no_name_from_a_paired_machine():
    ours = _told_apart([Seen("attic", ID, None), Seen("head", OTHER, None)])
    assert [one.name for one in ours] == ["attic", "head-fedc"]
    strangers = [Seen("attic", "a" * 16, None), Seen("attic", "a" * 15 + "b", None), Seen("den", "c" * 16, None)]
    names = [one.name for one in _told_apart(strangers, {one.name for one in ours})]
    assert names == ["attic-" + "a" * 16, "attic-" + "a" * 15 + "b", "den"]
    plain = [Seen("pc", "127.0.0.1:7500", None), Seen("pc", "127.0.0.1:7600", None)]
    assert [one.name for one in _told_apart(plain)] == ["pc-127.0.0.1:75", "pc-127.0.0.1:76"]


def test_an_unpaired_machine_of_the_same_name_leaves_the_paired_one_its_own(tmp_path, monkeypatch):
    home = Home(tmp_path / "identity", tmp_path / "cache", name="laptop")
    peer = home.peers.add(Identity.load(tmp_path / "attic", "attic").certificate)

    async def there(seconds, wanted):
        return [Found("attic", id, ("127.0.0.1",), 7411, 1) for id in (peer.id[:4] + "0" * 12, peer.id)]

    async def ask(self, address, id, types):
        return Seen(address.name, id, address, "", DescribeReply())

    monkeypatch.setattr("localreason.cluster.home.browse", there)
    monkeypatch.setattr(Home, "_ask", ask)
    paired, stranger = asyncio.run(home.survey(1))
    assert (paired.name, paired.id) == ("attic", peer.id)
    assert stranger.name == f"attic-{peer.id[:4]}"


def test_an_announcement_that_fails_without_a_word_is_told_by_its_kind(monkeypatch):
    async def register(self, info):
        raise NonUniqueNameException

    monkeypatch.setattr(AsyncZeroconf, "async_register_service", register)

    async def run():
        async with announce(Announcement("attic", ID, 7411, 1), is_loopback=True):
            pass

    with pytest.raises(ClusterError, match="attic cannot be announced: NonUniqueNameException; stop another"):
        asyncio.run(run())


def test_the_doctor_announces_itself_beside_a_node_of_this_machine(tmp_path, monkeypatch):
    home = Home(tmp_path / "identity", tmp_path / "cache", name="laptop")
    said = []

    @contextlib.asynccontextmanager
    async def announce(announcement):
        said.append(announcement)
        yield

    async def there(seconds, wanted=()):
        return [Found(one.name, one.id, ("127.0.0.1",), one.port, 1) for one in said]

    monkeypatch.setattr(discovery, "announce", announce)
    monkeypatch.setattr(discovery, "browse", there)
    monkeypatch.setattr("localreason.cluster.home.browse", there)
    rows = {row["what"]: row for row in asyncio.run(_network(home, ()))}
    assert rows["multicast"]["ok"]
    assert said[0].id != home.identity.id


def test_what_other_machines_say_does_not_steer_the_terminal(tmp_path, monkeypatch):
    async def describe(self, types=None):
        return DescribeReply(name="any\x1b[2Jbody", held_by="\x1b[2Jall is well", unix_seconds=time.time())

    async def call():
        yield FromNode(failure=Failure(text="no\x1b[2J memory"))

    async def run():
        monkeypatch.setattr(Member, "describe", describe)
        home = Home(tmp_path / "identity", tmp_path / "cache", True)
        [seen] = await home.survey(0, ["127.0.0.1:7411"])
        assert (seen.name, seen.problem) == ("any [2Jbody", "is busy with  [2Jall is well")
        member, lost = Member(Address("attic", "127.0.0.1", 7411), home.gate), []
        member._on_loss = lambda reason, missed=0: lost.append(reason)
        await member._listen(call())
        assert (str(member.error), lost) == ("attic: no [2J memory", ["failed: no [2J memory"])

    asyncio.run(run())


def test_a_brief_survey_looks_until_all_paired_machines_were_met(tmp_path, monkeypatch):
    home = Home(tmp_path / "identity", tmp_path / "cache", name="laptop")
    attic, desk = (home.peers.add(Identity.load(tmp_path / name, name).certificate) for name in ("attic", "desk"))
    looks = []

    async def browse(seconds, wanted):
        looks.append(set(wanted))
        if not met:
            await asyncio.Event().wait()
        return [Found("attic", attic.id, ("127.0.0.1",), 7411, 1)]

    async def ask_named(self, host, port, types):
        return Seen(host, {"attic": attic.id, "desk": desk.id}[host], None, "is ill" if host in ill else "")

    async def ask_found(self, found, types):
        return Seen(found.name, found.id, None)

    monkeypatch.setattr("localreason.cluster.home.browse", browse)
    monkeypatch.setattr(Home, "_ask_named", ask_named)
    monkeypatch.setattr(Home, "_ask_found", ask_found)
    both = ["attic:7411", "desk:7411"]

    def survey(named, is_brief, seconds=5.0):
        seen = asyncio.run(asyncio.wait_for(home.survey(600, named, is_brief=is_brief), seconds))
        return [one.name for one in seen]

    met, ill = [], []
    assert survey(both, True) == ["attic", "desk"], "all that are paired are named and there"
    with pytest.raises(TimeoutError):
        survey(both[1:], True, 0.2)
    ill.append("desk")
    with pytest.raises(TimeoutError):
        survey(both, True, 0.2)
    met.append(attic)
    assert survey(both[1:], True) == ["attic", "desk"]
    assert survey([], False) == ["attic"]
    assert looks == [{attic.id, desk.id}] * 4 + [set()]


def test_addresses_that_swallow_what_is_sent_do_not_hold_up_the_one_that_answers(tmp_path, monkeypatch):
    home = Home(tmp_path / "identity", tmp_path / "cache", name="laptop")
    peer = home.peers.add(Identity.load(tmp_path / "attic", "attic").certificate)
    asked, given_up = [], []

    async def there(seconds, wanted):
        return [Found("attic", peer.id, (*(f"10.0.0.{i}" for i in range(1, 5)), "fe80::1%eth0"), 7411, 1)]

    async def ask(self, address, id, types):
        asked.append((address.host, types))
        if address.host == "10.0.0.2":
            return Seen(address.name, id, address, "cannot be reached")
        if address.host != "10.0.0.4":
            try:
                await asyncio.Event().wait()
            finally:
                given_up.append(address.host)
        return Seen(address.name, id, address, "", DescribeReply())

    monkeypatch.setattr("localreason.cluster.home.browse", there)
    monkeypatch.setattr(Home, "_ask", ask)
    [seen] = asyncio.run(asyncio.wait_for(home.survey(1, types=["F32"]), 5))
    assert seen.address is not None
    assert seen.address.host == "10.0.0.4"
    ways = [f"10.0.0.{i}" for i in range(1, 5)]
    assert asked == [*((host, []) for host in [*ways, "fe80::1%eth0"]), ("10.0.0.4", ["F32"])]
    assert given_up == ["10.0.0.1", "10.0.0.3", "fe80::1%eth0"]
    assert seen.address.other_hosts == tuple(ways), "a zone means nothing on another machine"


def test_why_a_node_cannot_be_used():
    found, peer = Found("tower", ID, ("10.0.0.1",), 7411, 2), Peer(ID, "tower", b"", "", "")
    assert usability(found, 2, [peer]) is None
    assert usability(found, 2, [peer], own_id=ID) == "is this machine"
    assert usability(found, 2, []) == "not paired: run `localreason cluster pair tower`"
    assert usability(found, 3, [peer]) == "speaks protocol 2, this is 3: update localreason there"
    assert usability(found, 1, [peer]) == "speaks protocol 2, this is 1: update localreason here"
    assert "has another id" in (usability(found, 2, [Peer(OTHER, "tower", b"", "", "")]) or "")


def test_a_name_cannot_smuggle_a_command_into_the_advice():
    found = Found("$(reboot)", ID, ("10.0.0.1",), 7411, 1)
    assert usability(found, 1, []) == "not paired: run `localreason cluster pair '$(reboot)'`"
