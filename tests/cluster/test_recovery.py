"""Losses that are none, and faults that must not spoil what comes after them: rings of real node processes."""

import asyncio
import contextlib
import os
import queue
import subprocess
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from localreason.cluster.background import Background
from localreason.cluster.formation import HEAD, Formation, Lost
from localreason.cluster.gate import PlainGate
from localreason.cluster.member import Address, Member
from localreason.cluster.roster import Roster
from localreason.cluster.window import LayerWindow
from localreason.cluster.wire import ring_pb2 as wire
from localreason.runtime.engine import Span
from localreason.runtime.errors import DecodeFailed
from localreason.runtime.llama import EngineOptions, load
from tests.cluster.processes import NodeProcess, Relay
from tests.cluster.test_ring import ring_of, tokens_of, whole
from tests.cluster.test_window import PROMPT, script


@pytest.fixture(scope="module")
def expected(model):
    with whole(model) as engine:
        return script(engine)


@pytest.mark.parametrize("fault", [DecodeFailed, KeyboardInterrupt])
@pytest.mark.parametrize("is_done", [False, True], ids=["before the step", "behind it"])
def test_an_exception_in_the_heads_own_window_does_not_spoil_the_next_answer(
    model, head, spare, folder, monkeypatch, fault, is_done
):
    engine, tokenizer = load(model, EngineOptions(512, 4, 1, n_batch=64))
    with contextlib.closing(engine):
        alone = tokens_of(engine, tokenizer)
    with ring_of(model, head, spare, folder) as ring:
        run, n_runs = LayerWindow.run, []

        def stumble(window, *arguments):
            n_runs.append(1)
            if len(n_runs) == 10:
                if is_done:
                    run(window, *arguments)
                raise fault("once")
            return run(window, *arguments)

        monkeypatch.setattr(LayerWindow, "run", stumble)
        with pytest.raises(fault):
            tokens_of(ring, tokenizer)
        assert tokens_of(ring, tokenizer) == alone
        assert ring.timing.recoveries == [], "nobody is to blame"
        assert len(ring.placement.windows) == 3


def test_a_head_that_stood_still_blames_nobody(model, head, spare, folder, expected):
    with ring_of(model, head, spare, folder) as ring:
        ring.decode([Span(0, 0, PROMPT)])
        ring._background.call(time.sleep, 3.5)  # no word is read for longer than a node may be silent
        ring.rewind(0, 0)
        assert np.array_equal(script(ring), expected)
        assert ring.timing.recoveries == []


def test_what_a_node_said_while_the_head_stood_still_counts():
    async def look(seconds):
        member = Member(Address("bed", "127.0.0.1", 1), PlainGate())
        member._looked = time.time() - seconds
        member._look()
        return time.monotonic() - member._heard < 10

    assert [asyncio.run(look(seconds)) for seconds in (0.5, 4.0)] == [False, True]


def test_a_node_that_ends_every_ring_is_done_without(model, head, spare, folder, expected, monkeypatch):
    name, send, told = spare[0].name, Formation.send, []

    def end(formation, step):
        if name in formation.members:
            formation.inbox.put(Lost(HEAD, f"{name} failed: the head said nothing", name))
        else:
            send(formation, step)

    monkeypatch.setattr(Formation, "send", end)
    with ring_of(model, head, spare, folder, tell=told.append) as ring:
        assert np.array_equal(script(ring), expected)
        assert [lost for lost, _ in ring.timing.recoveries] == [HEAD, HEAD, HEAD, name]
    assert any(f"{name} is lost: ends every ring" in text for text in told)


@pytest.mark.parametrize("is_cut", [False, True], ids=["connections stay", "connections break"])
def test_a_head_that_slept_for_longer_than_nodes_wait_goes_on_with_all(
    model, head, folder, expected, monkeypatch, is_cut
):
    monkeypatch.setattr("localreason.cluster.member._SLEEP_SECONDS", 0.5)
    prelude, told = "import localreason.cluster.inlet as inlet; inlet._SILENCE_SECONDS = 1.5", []
    with contextlib.ExitStack() as stack:
        nodes = [stack.enter_context(NodeProcess(folder, name, head, prelude=prelude)) for name in ("bed", "cot")]
        relays = [stack.enter_context(Relay(node.port)) for node in nodes]
        reached = [replace(node.address, port=relay.port) for node, relay in zip(nodes, relays, strict=True)]
        ring = stack.enter_context(ring_of(model, head, reached, folder, tell=told.append))
        ring.decode([Span(0, 0, PROMPT)])
        asleep = threading.Event()

        def sleep():
            asleep.set()
            for node in nodes:
                node.wait_for("the head said nothing")
            if is_cut:
                for relay in relays:
                    relay.cut()

        ring._background.call(sleep)
        assert asleep.wait(20)
        ring.rewind(0, 0)
        assert np.array_equal(script(ring), expected)
        assert [name for name, _ in ring.timing.recoveries] == [HEAD], told
        assert len(ring.placement.windows) == 3
    assert not any("is lost" in text for text in told)


def test_a_node_that_loads_for_long_does_not_cost_the_others_their_session(model, head, folder, expected, monkeypatch):
    send = Member._send_part

    async def send_late(member, *arguments):
        if member.name == "modem" and not member.n_sent_bytes:
            await asyncio.to_thread(fast.wait_for, "serving")
            await asyncio.sleep(1.2)  # past what the other one waits for a word, by two beats
        await send(member, *arguments)

    monkeypatch.setattr(Member, "_send_part", send_late)
    hasty = "from localreason.cluster.inlet import Inlet; Inlet.next.__defaults__ = (0.4,)"
    with (
        NodeProcess(folder, "cable", head, prelude=hasty) as fast,
        NodeProcess(folder, "modem", head) as slow,
        ring_of(model, head, [fast, slow], folder) as ring,
    ):
        assert [window.member for window in ring.placement.windows] == ["cable", "modem", HEAD]
        assert np.array_equal(script(ring), expected)
        assert ring.timing.recoveries == []


def test_nodes_that_missed_the_head_stay_in_the_ring(model, head, spare, folder, expected):
    told = []
    with ring_of(model, head, spare, folder, tell=told.append) as ring:
        ring.decode([Span(0, 0, PROMPT)])
        ring._background.call(ring._ring._losing("old"), "failed: the head said nothing for 10 s", wire.HEAD)
        ring.rewind(0, 0)
        assert np.array_equal(script(ring), expected)
        assert [name for name, _ in ring.timing.recoveries] == [HEAD]
        assert len(ring.placement.windows) == 3
    assert not any("is lost" in text for text in told)


def test_a_node_outlives_the_terminal_that_it_was_started_in(model, head, folder, expected):
    node = NodeProcess(folder, "shed", head)
    reader, writer = os.pipe()
    with (
        subprocess.Popen(node.command(), stdout=writer, stderr=writer) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.terminate)
        os.close(writer)
        with os.fdopen(reader) as terminal:
            node.port = next(int(line.rsplit(" ", 1)[1]) for line in terminal if "listening on port" in line)
            assert "is ready" in next(terminal)
        for _ in range(2):
            with ring_of(model, head, [node], folder) as ring:
                assert [window.member for window in ring.placement.windows] == ["shed", HEAD]
                assert np.array_equal(script(ring), expected)


def test_a_node_that_another_head_took_meanwhile_is_done_without(model, head, spare, folder, expected, monkeypatch):
    monkeypatch.setattr("localreason.cluster.assembly._BUSY_SECONDS", 1.0)
    back, told = threading.Event(), []

    def tell(text):
        told.append(text)
        if "answers again" in text:
            back.set()

    with ring_of(model, head, spare, folder, tell=tell) as ring:
        ring.decode([Span(0, 0, PROMPT)])
        port = spare[1].port
        spare[1].kill()
        ring.decode([Span(0, len(PROMPT), [1])])
        spare[1].start(port)
        assert back.wait(20)
        with ring_of(model, head, spare[1:], folder, name="desk"):
            ring.rewind(0, 0)
            ring.begin_request()
            assert np.array_equal(script(ring), expected)
            assert [window.member for window in ring.placement.windows] == ["old", HEAD]
    assert any(text.startswith("older is lost: older: older is busy with desk") for text in told), told


def test_a_node_that_fails_again_and_again_is_left_out_for_longer_each_time(monkeypatch):
    monkeypatch.setattr("localreason.cluster.roster._RETRY_SECONDS", 0.1)

    async def is_free(roster, name):
        return True

    monkeypatch.setattr(Roster, "_is_free", is_free)
    back, pauses = threading.Event(), []

    def tell(text):
        if "answers again" in text:
            back.set()

    background = Background()
    try:
        roster = Roster([Address("old", "127.0.0.1", 1)], None, background, tell)
        for _ in range(4):
            started = time.monotonic()
            roster.lose("old", "has no room")
            assert roster.present == []
            assert back.wait(20)
            back.clear()
            pauses.append(time.monotonic() - started)
            roster.readmit()
            assert roster.present == ["old"]
    finally:
        background.close()
    assert pauses[3] > 0.7, pauses  # 0.1, 0.2, 0.4, 0.8
    assert pauses[0] < 0.7


def test_a_node_that_is_lost_while_another_one_is_fed_is_named_at_once(model, head, folder, tmp_path, monkeypatch):
    send_part, fed, is_named = Member._send_part, threading.Event(), threading.Event()

    async def stall(member, *arguments):
        if member.name == "slow":
            fed.set()
            await asyncio.to_thread(is_named.wait, 30)
        await send_part(member, *arguments)

    def tell(text):
        if "is lost" in text:
            told.append(text)
            is_named.set()

    told = []
    monkeypatch.setattr(Member, "_send_part", stall)
    with NodeProcess(tmp_path, "slow", head) as slow, NodeProcess(tmp_path, "gone", head) as gone:
        killer = threading.Thread(target=lambda: fed.wait(30) and gone.kill())
        killer.start()
        started = time.monotonic()
        try:
            with ring_of(model, head, [slow, gone], folder, tell=tell) as ring:
                assert [window.member for window in ring.placement.windows] == ["slow", HEAD]
        finally:
            is_named.set()
            killer.join(30)
    assert told[0].startswith("gone is lost"), told
    assert time.monotonic() - started < 20


def test_steps_that_come_back_in_another_order_are_a_fault_of_the_last_node(model, head, spare, folder):
    with whole(model) as engine:
        first = np.array(engine.decode([Span(0, 0, PROMPT[:20])]))
        second = np.array(engine.decode([Span(1, 0, PROMPT[20:40])]))

    class Swapped(queue.SimpleQueue):
        """The first two in the other order."""

        def __init__(self):
            super().__init__()
            self._kept = []

        def put(self, item):
            if isinstance(item, Lost) or self._kept is None:
                super().put(item)
            elif not self._kept:
                self._kept.append(item)
            else:
                super().put(item)
                super().put(self._kept[0])
                self._kept = None

    with ring_of(model, head, spare, folder) as ring:
        ring._ring.inbox = Swapped()
        ring.submit([Span(0, 0, PROMPT[:20])])
        ring.submit([Span(1, 0, PROMPT[20:40])])
        assert np.array_equal(ring.collect(), first)
        assert np.array_equal(ring.collect(), second)
        assert [name for name, _ in ring.timing.recoveries] == ["older"]
