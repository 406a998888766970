import asyncio
import contextlib
import json
import re
import threading
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from localreason.cluster import identity
from localreason.cluster.errors import NodeLost, PairingFailed
from localreason.cluster.home import Home
from localreason.cluster.identity import Identity, Peers
from localreason.cluster.member import STRANGER, UNTRUSTED, Member
from localreason.cluster.pairing import PairingServer, pair
from tests.cluster.test_identity import forged, named_by_bits


class Machine:
    """An identity and its peers, apart from other machines'."""

    def __init__(self, folder, name):
        self.identity, self.peers = Identity.load(folder, name), Peers(folder)

    @property
    def trusted(self):
        return [peer.id for peer in self.peers.list()]


class Screen:
    """What the person at the node sees."""

    def __init__(self):
        self.lines = []
        self.changed = asyncio.Event()

    def show(self, line):
        self.lines.append(line)
        self.changed.set()

    async def until(self, pattern):
        while True:
            self.changed.clear()
            if any(re.search(pattern, line) for line in self.lines):
                return
            await asyncio.wait_for(self.changed.wait(), 5)

    @property
    def codes(self):
        return [match[1] for line in self.lines if (match := re.match(r"code (\d{3} \d{3}) ", line))]


@pytest.fixture
def node(tmp_path):
    return Machine(tmp_path / "node", "tower")


@pytest.fixture
def head(tmp_path):
    return Machine(tmp_path / "head", "laptop")


@contextlib.asynccontextmanager
async def pairing(node, **options):
    screen = Screen()
    server = PairingServer(node.identity, node.peers, screen.show, **options)
    port = await server.start(["127.0.0.1"], 0)
    try:
        yield port, screen
    finally:
        await server.stop()


def attempt(head, port, ask, **options):
    return pair("127.0.0.1", port, head.identity, head.peers, ask, **{"timeout": 5.0, **options})


def wrong(code):
    return f"{(int(code.replace(' ', '')) + 1) % 10**6:06}"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_both_sides_store_each_other(node, head):
    async def run():
        async with pairing(node) as (port, screen):
            prompts = []
            peer = await attempt(head, port, lambda prompt: prompts.append(prompt) or screen.codes[-1])
            assert (peer.name, peer.id, peer.address) == ("tower", node.identity.id, f"127.0.0.1:{port}")
            assert peer.certificate == node.identity.certificate
            assert "tower" in prompts[0]
            await screen.until("paired with laptop")
            said = r"code \d{3} \d{3} \(valid 120 s\), asked for by a machine that calls itself 'laptop'"
            assert re.fullmatch(said, screen.lines[0])
            await attempt(head, port, lambda prompt: screen.codes[-1])

    asyncio.run(run())
    assert (head.trusted, node.trusted) == ([node.identity.id], [head.identity.id])
    assert node.peers.list()[0].certificate == head.identity.certificate


def test_a_wrong_code_stores_nothing_and_the_old_code_is_dead(node, head):
    async def run():
        clock = Clock()
        async with pairing(node, clock=clock) as (port, screen):
            with pytest.raises(PairingFailed, match="the code is wrong"):
                await attempt(head, port, lambda prompt: wrong(screen.codes[-1]))
            await screen.until("pairing with 'laptop' failed")
            with pytest.raises(PairingFailed, match="try again in 1 s"):
                await attempt(head, port, lambda prompt: screen.codes[0])
            clock.now += 1.1
            with pytest.raises(PairingFailed, match="the code is wrong"):
                await attempt(head, port, lambda prompt: screen.codes[0])
            assert screen.codes[0] != screen.codes[1]
            assert head.trusted == node.trusted == []
            clock.now += 10
            await attempt(head, port, lambda prompt: screen.codes[-1])

    asyncio.run(run())


def test_failures_make_the_wait_double_up_to_an_hour(node, head):
    async def run():
        clock, waits = Clock(), []
        async with pairing(node, clock=clock) as (port, screen):
            for _ in range(14):
                with pytest.raises(PairingFailed, match="the code is wrong"):
                    await attempt(head, port, lambda prompt: wrong(screen.codes[-1]))
                with pytest.raises(PairingFailed, match="try again in") as caught:
                    await attempt(head, port, lambda prompt: "")
                waits.append(int(re.search(r"in (\d+) s", str(caught.value))[1]))
                clock.now += waits[-1] + 0.01
            assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3600, 3600]
            assert len(screen.codes) == 14

    asyncio.run(run())


def test_a_code_expires(node, head):
    async def run():
        async with pairing(node, code_seconds=0.05) as (port, screen):
            typed = threading.Event()
            with pytest.raises(PairingFailed, match="not valid any more"):
                await attempt(head, port, lambda prompt: str(typed.wait(5)))
            typed.set()
            await screen.until("failed")

    asyncio.run(run())
    assert head.trusted == node.trusted == []


def test_a_slip_in_typing_is_asked_again(node, head):
    async def run():
        async with pairing(node) as (port, screen):
            answers = iter(["12", "hello!", None])
            await attempt(head, port, lambda prompt: next(answers) or screen.codes[-1].replace(" ", "-"))
        assert len(screen.codes) == 1

    asyncio.run(run())


def no_code(prompt):
    raise EOFError


def test_no_code_at_all(node, head):
    async def run():
        clock = Clock()
        async with pairing(node, clock=clock) as (port, screen):
            with pytest.raises(PairingFailed, match="no code of six digits"):
                await attempt(head, port, lambda prompt: "12")
            await screen.until("failed")
            clock.now += 100
            with pytest.raises(PairingFailed, match="no code was given"):
                await attempt(head, port, no_code)

    asyncio.run(run())


@contextlib.asynccontextmanager
async def between(port, change):
    """Somebody between head and node, who changes lines: change(is_from_head, object) -> object."""

    async def pump(reader, writer, is_from_head):
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                writer.write(json.dumps(change(is_from_head, json.loads(line))).encode() + b"\n")
        writer.close()

    tasks = []

    async def meet(reader, writer):
        there = await asyncio.open_connection("127.0.0.1", port)
        tasks.append(asyncio.create_task(pump(reader, there[1], True)))
        tasks.append(asyncio.create_task(pump(there[0], writer, False)))

    server = await asyncio.start_server(meet, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await asyncio.gather(*tasks)


@pytest.mark.parametrize("sides", [(True,), (False,), (True, False)])
def test_swapped_certificates_are_detected(tmp_path, node, head, sides):
    spy = Machine(tmp_path / "spy", "laptop")

    def swap(is_from_head, value):
        if is_from_head in sides and "certificate" in value:
            value["certificate"] = spy.identity.certificate.decode()
        return value

    async def run():
        async with pairing(node) as (port, screen), between(port, swap) as middle:
            with pytest.raises(PairingFailed, match="somebody sits between"):
                await attempt(head, middle, lambda prompt: screen.codes[-1])

    asyncio.run(run())
    assert head.trusted == node.trusted == []


def test_a_proof_of_the_node_that_is_changed_is_detected(node, head):
    def change(is_from_head, value):
        if not is_from_head and "proof" in value:
            value["proof"] = "00" * 32
        return value

    async def run():
        async with pairing(node) as (port, screen), between(port, change) as middle:
            with pytest.raises(PairingFailed, match="somebody sits between"):
                await attempt(head, middle, lambda prompt: screen.codes[-1])

    asyncio.run(run())
    assert head.trusted == []


async def talk(port, *lines):
    """What the node answers to raw lines, until it hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.suppress(ConnectionError):
        for line in lines:
            writer.write(line)
        await writer.drain()
    answers = []
    with contextlib.suppress(ConnectionError):
        while line := await asyncio.wait_for(reader.readline(), 5):
            answers.append(json.loads(line))
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
    return answers


KNOCK = b'{"version": 1, "name": "laptop"}\n'


def test_replayed_lines_are_refused(node, head):
    recorded = []

    def record(is_from_head, value):
        if is_from_head:
            recorded.append(json.dumps(value).encode() + b"\n")
        return value

    async def run():
        async with pairing(node) as (port, screen):
            async with between(port, record) as middle:
                await attempt(head, middle, lambda prompt: screen.codes[-1])
            node.peers.remove("laptop")
            answers = await talk(port, *recorded)
            assert answers[-1]["error"] == "code"
            assert not any("proof" in answer for answer in answers)

    asyncio.run(run())
    assert node.trusted == []


@pytest.mark.parametrize("n", range(6))
def test_a_second_line_that_is_not_sound_gets_no_proof(node, head, n):
    pem = head.identity.certificate.decode()
    zero = "41" + "01" + "00" * 31  # the neutral element
    second = [
        {},
        {"message": zero, "certificate": pem, "proof": "00" * 32},
        {"message": "42" + "05" * 32, "certificate": pem, "proof": "00" * 32},
        {"message": "41" + "07" * 32, "certificate": pem, "proof": "00" * 32},
        {"message": 5, "certificate": None, "proof": []},
        {"message": zero, "certificate": "ü" * 2000, "proof": "zz"},
    ][n]

    async def run():
        async with pairing(node) as (port, screen):
            answers = await talk(port, KNOCK, json.dumps(second).encode() + b"\n")
            assert [answer.get("error") for answer in answers] == [None, "broken"] or answers[-1]["error"] == "code"
            await screen.until("failed")

    asyncio.run(run())
    assert node.trusted == []


@pytest.mark.parametrize("make", [lambda: forged(names=bytes.fromhex("3006a5040c026162")), named_by_bits])
def test_a_certificate_that_nobody_can_read_counts_as_an_attempt(node, make):
    second = {"message": "41" + "07" * 32, "certificate": make().decode(), "proof": "00" * 32}

    async def run():
        async with pairing(node) as (port, screen):
            assert (await talk(port, KNOCK, json.dumps(second).encode() + b"\n"))[-1]["error"] == "broken"
            assert (await talk(port, KNOCK))[-1]["error"] == "wait"
            assert len(screen.codes) == 1

    asyncio.run(run())


GARBAGE = [
    b"\x16\x03\x01\x02\x00\xff\xfe\n",
    b"x" * 20_000,
    b"[" * 8000 + b"\n",
    b"1\n",
    b"{}\n",
    b'{"version": 1}\n',
    b'{"version": 1, "name": "a\\u001b[2J"}\n',
    b'{"version": 1, "name": "' + b"x" * 65 + b'"}\n',
    b'{"version": ' + b"9" * 5000 + b"}\n",
    b"GET / HTTP/1.1\r\n\r\n",
]


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_shows_no_code_and_does_not_stop_the_next(node, head, garbage):
    async def run():
        async with pairing(node) as (port, screen):
            for answer in await talk(port, garbage):
                assert answer["error"] in ("broken", "version")
            assert screen.lines == []
            await attempt(head, port, lambda prompt: screen.codes[-1])

    asyncio.run(run())
    assert node.trusted == [head.identity.id]


def test_silence_and_early_close_do_not_stop_the_next(node, head):
    async def run():
        clock = Clock()
        async with pairing(node, line_seconds=0.05, clock=clock) as (port, screen):
            assert (await talk(port))[0]["error"] == "broken"  # silence
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            await writer.wait_closed()
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(KNOCK)
            await screen.until("asked for by")
            writer.close()
            await writer.wait_closed()
            await screen.until("failed")
            clock.now += 10
            await attempt(head, port, lambda prompt: screen.codes[-1])

    asyncio.run(run())


def test_one_pairing_at_a_time(tmp_path, node, head):
    other = Machine(tmp_path / "other", "phone")

    async def run():
        async with pairing(node) as (port, screen):
            typed = threading.Event()
            first = asyncio.create_task(attempt(head, port, lambda prompt: typed.wait(5) and screen.codes[-1]))
            await screen.until("itself 'laptop'")
            with pytest.raises(PairingFailed, match="pairing with another machine"):
                await attempt(other, port, lambda prompt: "000000")
            assert len(screen.codes) == 1
            typed.set()
            await first
            await attempt(other, port, lambda prompt: screen.codes[-1])

    asyncio.run(run())
    assert sorted(node.trusted) == sorted([head.identity.id, other.identity.id])


def test_connections_are_limited(node):
    async def run():
        async with pairing(node) as (port, _):
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
            assert (await talk(port, KNOCK))[0]["error"] == "busy"
            for _, writer in silent:
                writer.close()

    asyncio.run(run())


def test_stopping_tells_the_waiting_head(node, head):
    async def run():
        async with pairing(node) as (port, screen):
            typed = threading.Event()
            waiting = asyncio.create_task(attempt(head, port, lambda prompt: str(typed.wait(5))))
            await screen.until("asked for by")
        with pytest.raises(PairingFailed, match="stopped pairing"):
            await waiting
        typed.set()

    asyncio.run(run())


def test_a_head_gives_up_in_time(node, head):
    async def run():
        async with pairing(node) as (port, _):
            typed = threading.Event()
            with pytest.raises(PairingFailed, match=r"not paired within 0.2 s"):
                await attempt(head, port, lambda prompt: str(typed.wait(5)), timeout=0.2)
            typed.set()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"version": 2}\n', "speaks pairing version 2, this one 1"),
        (b'{"version": "\\u001b[2J"}\n', "speaks pairing version unknown"),
        (b'{"version": 1, "error": "\\u001b[2J"}\n', "the other side refused"),
        (b'{"version": 1, "error": "wait", "seconds": 1e400}\n', "try again in a few s"),
        (b'{"version": 1}\n', "sent no message"),
        (b"HTTP/1.1 400 Bad Request\r\n", "sent no JSON line"),
        (b"", "hung up"),
    ],
)
def test_a_node_that_answers_strangely(head, line, message):
    async def answer(reader, writer):
        await reader.readline()
        writer.write(line)
        writer.close()

    async def run():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            with pytest.raises(PairingFailed, match=message) as caught:
                await attempt(head, server.sockets[0].getsockname()[1], lambda prompt: "000000")
            assert str(caught.value).isprintable()

    asyncio.run(run())


@contextlib.contextmanager
def ahead(days):
    """While it lasts, certificates are made by a clock so far ahead."""

    clock = SimpleNamespace(now=lambda tz: datetime.now(tz) + timedelta(days=days))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "datetime", SimpleNamespace(datetime=clock, timedelta=timedelta, UTC=UTC))
        yield


@pytest.mark.parametrize("is_head", [True, False])
def test_a_certificate_of_another_time_is_not_paired(tmp_path, is_head):
    with ahead(3 if is_head else 0):
        head = Machine(tmp_path / "head", "laptop")
    with ahead(0 if is_head else 3):
        node = Machine(tmp_path / "node", "tower")

    async def run():
        async with pairing(node) as (port, screen):
            with pytest.raises(PairingFailed, match="set the clock that is wrong"):
                await attempt(head, port, lambda prompt: screen.codes[-1])
            await screen.until("'laptop' failed")
            assert any("set the clock" in line for line in screen.lines) == is_head

    asyncio.run(run())
    assert head.trusted == node.trusted == []


@pytest.mark.parametrize(("is_ours", "why"), [(False, STRANGER), (True, UNTRUSTED)])
def test_a_clock_is_named_where_tls_only_refuses(tmp_path, monkeypatch, is_ours, why):
    async def describe(self, types=None):
        raise NodeLost(f"{self.name} at 127.0.0.1:7411 {why}")

    with ahead(3 if is_ours else 0):
        home = Home(tmp_path / "head", tmp_path / "cache", name="laptop")
    with ahead(0 if is_ours else 3):
        home.peers.add(Identity.load(tmp_path / "node", "tower").certificate)
    monkeypatch.setattr(Member, "describe", describe)
    [seen] = asyncio.run(home.survey(0, ["127.0.0.2:7411"]))
    said = "refuses this machine, which has" if is_ours else "may be tower, which has"
    assert seen.problem.startswith(f"{said} a certificate that holds from")
    assert "set the clock that is wrong" in seen.problem


def test_a_name_cannot_pass_for_a_code(node):
    knock = {"version": 1, "name": "code 123 456 (valid 120 s), asked for by 'laptop'"}

    async def run():
        async with pairing(node) as (port, screen):
            await talk(port, json.dumps(knock).encode() + b"\n", b"{}\n")
            await screen.until("failed")
            assert re.match(r"code \d{3} \d{3} \(valid 120 s\), asked for by a machine", screen.lines[0])
            assert all(
                line.endswith(("'code 123 456 (valid …'", "'code 123 456 (valid …' failed")) for line in screen.lines
            )

    asyncio.run(run())


def test_an_old_head_is_told_the_version(node):
    async def run():
        async with pairing(node) as (port, screen):
            assert await talk(port, b'{"version": 0, "name": "x"}\n') == [{"version": 1, "error": "version"}]
            assert screen.lines == []

    asyncio.run(run())


def test_addresses_of_a_kind_that_is_not_here_are_passed_over(head):
    async def run():
        server = PairingServer(head.identity, head.peers, print)
        port = await server.start(["2001:db8::1", "127.0.0.1", "192.0.2.1"], 0)  # of documents, on no machine
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()
        await writer.wait_closed()
        await server.stop()
        with pytest.raises(PairingFailed, match="cannot listen at port 0"):
            await server.start(["2001:db8::1", "192.0.2.1"], 0)

    asyncio.run(run())


def test_an_unreachable_node(head):
    async def run():
        server = await asyncio.start_server(lambda reader, writer: None, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(PairingFailed, match=f"cannot listen at port {port}, one above .* another --port"):
            await PairingServer(head.identity, head.peers, print).start(["127.0.0.1"], port)
        server.close()
        await server.wait_closed()
        with pytest.raises(PairingFailed, match=r"127\.0\.0\.1:\d+ cannot be reached"):
            await attempt(head, port, lambda prompt: "")

    asyncio.run(run())
