"""When a node is measured, and what a head is told of it."""

import asyncio
import contextlib
import functools
import threading
from dataclasses import replace

import pytest

from localreason.cluster.errors import NodeLost
from localreason.cluster.gate import PlainGate
from localreason.cluster.home import Home, Seen
from localreason.cluster.member import Address, Member
from localreason.cluster.node import Node, NodeOptions, serve
from localreason.cluster.session import Session, Terms
from localreason.cluster.store import Store
from localreason.cluster.window import WindowOptions
from localreason.cluster.wire import ring_pb2 as wire
from localreason.cluster.wire import ring_pb2_grpc as service
from localreason.cluster.wire.ring_pb2 import DescribeReply
from localreason.runtime.errors import OutputError
from tests.cluster.test_ring import opening

ID = "0123456789abcdef"


@contextlib.asynccontextmanager
async def member_of_node(folder, measure):
    """A node in this process, measured so, as a head sees it."""
    node = Node(NodeOptions("attic", 1, measure), Store(folder / "own", 1 << 20), PlainGate(), print)
    ports = asyncio.Queue()
    add_port = functools.partial(PlainGate().add_port, host="127.0.0.1", port=0)
    serving = asyncio.create_task(serve(node, add_port, ports.put))
    member = Member(Address("attic", "127.0.0.1", await ports.get()), PlainGate())
    try:
        yield member
    finally:
        await member.release()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


def test_a_profile_that_cannot_be_made_is_told_to_the_head(folder):
    def measure(types):
        raise OutputError("the cache folder cannot be written; give another --cache")

    async def ask():
        async with member_of_node(folder, measure) as member:
            await member.describe(["q8_0"])

    with pytest.raises(NodeLost, match="failed: the cache folder cannot be written"):
        asyncio.run(asyncio.wait_for(ask(), 20))


def test_a_node_is_not_measured_while_it_works_for_another_head(folder):
    measured = []

    async def ask():
        async with member_of_node(folder, lambda types: measured.append(types) or "{}") as member:

            async def say():
                part = wire.Part(sha256=bytes(32), n_bytes=4)
                yield wire.ToNode(open=opening(windows=[wire.WindowFile(header=bytes(32), parts=[part])]))
                await asyncio.Event().wait()

            async with PlainGate().channel(member.address.host, member.address.port, "") as channel:
                holding = service.RingStub(channel).Hold(say())
                while (await holding.read()).WhichOneof("message") == "beat":
                    pass
                busy = await member.describe(["Q8_0"])
                holding.cancel()
            return busy

    busy = asyncio.run(asyncio.wait_for(ask(), 20))
    assert (busy.held_by, busy.device, measured) == ("x", "", [])


def test_a_measurement_goes_on_without_its_caller_and_keeps_others_and_sessions_away(folder):
    begun, go_on, n_running, most = threading.Event(), threading.Event(), [], []

    def measure(types):
        n_running.append(1)
        most.append(len(n_running))
        begun.set()
        go_on.wait(20)
        n_running.pop()
        return "{}"

    async def ask():
        async with member_of_node(folder, measure) as member:
            first = asyncio.create_task(member.describe(["Q8_0"]))
            assert await asyncio.to_thread(begun.wait, 20)
            first.cancel()
            again = asyncio.create_task(member.describe(["Q8_0"]))

            async def say():
                yield wire.ToNode(open=opening(cache_type="none"))
                await asyncio.Event().wait()

            async with PlainGate().channel(member.address.host, member.address.port, "") as channel:
                holding = service.RingStub(channel).Hold(say())
                said = []
                while said[-1:] != ["failure"]:
                    message = await holding.read()
                    said.append(message.WhichOneof("message"))
                    if len(said) == 3:
                        assert said == ["beat"] * 3, "the opening is looked at after the measurement"
                        go_on.set()
                holding.cancel()
            assert (await again).device == ""

    asyncio.run(asyncio.wait_for(ask(), 20))
    assert most == [1]


def test_a_node_that_says_what_nobody_asked_is_let_go():
    async def words():
        for _ in range(100):
            yield wire.FromNode(want=wire.Want())

    async def listen():
        member = Member(Address("attic", "127.0.0.1", 1), PlainGate())
        await member._listen(words())
        return member.error

    assert "says what nobody asked" in str(asyncio.run(listen()))


def test_a_head_that_takes_no_results_loses_its_session(folder, monkeypatch):
    monkeypatch.setattr("localreason.cluster.node._STEP_SECONDS", 0.05)

    class Context:
        def invocation_metadata(self):
            return (("session-bin", b"x" * 16), ("role", "out"))

        async def write(self, step):
            await asyncio.Event().wait()

    async def flow():
        node = Node(NodeOptions("attic", 1), Store(folder / "own", 1 << 20), PlainGate(), print)
        terms = Terms(b"x" * 16, "head", WindowOptions(256, 1, 8), wire.RowType.F32, False, frozenset({""}))
        session = node._session = Session(terms, 1)
        session.results.put_nowait(wire.Step())
        await node.Flow(None, Context())
        return session.failure.result()

    assert "the head took no result" in str(asyncio.run(asyncio.wait_for(flow(), 20)))


def test_a_busy_node_is_measured_once_it_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr("localreason.cluster.home._AGAIN_SECONDS", 0)
    home = Home(tmp_path / "identity", tmp_path / "cache", name="laptop")
    address = Address("attic", "127.0.0.1", 7411)
    busy = Seen("attic-1", ID, address, "is busy with desk", DescribeReply())
    answers, asked = [busy, busy, replace(busy, problem="")], []

    async def ask(self, address, id, types):
        asked.append(types)
        return answers[0] if len(answers) == 1 else answers.pop(0)

    monkeypatch.setattr(Home, "_ask", ask)
    [seen] = asyncio.run(home.await_free([busy], 60, ["Q8_0"]))
    assert (seen.name, seen.problem) == ("attic-1", "")
    assert asked == [[], [], [], ["Q8_0"]]
