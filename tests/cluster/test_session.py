"""A session's thread with windows that are played: nothing is left open, nothing waits for what nobody wants."""

import asyncio
import itertools
import threading
from pathlib import Path

import numpy as np
import pytest

from localreason.cluster import session as module
from localreason.cluster.codec import pack_rows, pack_spans
from localreason.cluster.errors import NodeLost, ProtocolError
from localreason.cluster.session import Session, Terms
from localreason.cluster.window import WindowOptions
from localreason.cluster.wire import ring_pb2 as wire
from localreason.runtime.engine import Span
from localreason.runtime.errors import OutOfMemory

N_EMBD = 4
SECONDS = 20
"""Deadline of every wait here."""


class Windows:
    """Plays the windows of a session: what was opened, run and closed; `before_open` and `before_run` may block."""

    n_embd = N_EMBD

    def __init__(self, monkeypatch):
        self.opened, self.closed, self.positions = [], [], []
        self.before_open = self.before_run = lambda: None
        monkeypatch.setattr(module, "LayerWindow", self._make)

    def _make(self, path, options, n_threads, n_gpu_layers, is_last, is_disk_used):
        self.before_open()
        self.opened.append(path.name)
        return _Window(self, path.name)


class _Window:
    n_embd = N_EMBD

    def __init__(self, windows, name):
        self._windows, self._name = windows, name

    def warm(self):
        pass

    def run(self, spans, rows):
        self._windows.positions.append(spans[0].position)
        self._windows.before_run()
        return rows

    def close(self):
        self._windows.closed.append(self._name)


@pytest.fixture
def windows(monkeypatch):
    return Windows(monkeypatch)


def session(is_disk_used=False):
    terms = Terms(bytes(16), "head", WindowOptions(256, 1, 8), wire.RowType.F32, is_disk_used)
    return Session(terms, 1)


def step(number):
    rows = pack_rows(np.zeros((1, N_EMBD), np.float32), wire.RowType.F32)
    return wire.Step(number=number, hop=0, spans=pack_spans([Span(0, number, [1])]), rows=rows)


FILES = {hop: (Path(f"w{hop}"), 0) for hop in range(3)}


async def close(held):
    await asyncio.wait_for(asyncio.to_thread(held.close), SECONDS)


def test_a_head_that_goes_away_while_windows_are_opened_leaves_none_open(windows):
    at_second, go_on = threading.Event(), threading.Event()

    def before_open():
        if windows.opened:
            at_second.set()
            go_on.wait(SECONDS)

    windows.before_open = before_open

    async def run():
        held = session()
        loading = asyncio.create_task(held.load(FILES))
        assert await asyncio.to_thread(at_second.wait, SECONDS)
        loading.cancel()
        closing = asyncio.create_task(close(held))
        while not held._is_over.is_set():  # the closing waits for the window that is being opened
            await asyncio.sleep(0)
        go_on.set()
        await closing

    asyncio.run(run())
    assert windows.opened == windows.closed == ["w0", "w1"], "the third is not even opened"


def test_a_window_that_cannot_be_opened_frees_the_ones_before_it(windows):
    def before_open():
        if windows.opened:
            raise OutOfMemory("no room for the second window")

    windows.before_open = before_open

    async def run():
        held = session()
        with pytest.raises(OutOfMemory, match="second window"):
            await asyncio.wait_for(held.load(FILES), SECONDS)
        await close(held)

    asyncio.run(run())
    assert windows.closed == ["w0"]


def test_steps_that_wait_are_not_computed_for_a_head_that_is_gone(windows):
    at_first, go_on = threading.Event(), threading.Event()

    def before_run():
        at_first.set()
        go_on.wait(SECONDS)

    windows.before_run = before_run

    async def run():
        held = session()
        await held.load(FILES)
        for number in range(5):
            held.take(step(number))
        assert await asyncio.to_thread(at_first.wait, SECONDS)
        closing = asyncio.create_task(close(held))
        while not held._is_over.is_set():
            await asyncio.sleep(0)
        go_on.set()
        await closing

    asyncio.run(run())
    assert windows.positions == [0]


def test_a_fault_of_our_own_is_told_to_the_head_too(windows):
    def before_run():
        raise ZeroDivisionError("by a window")

    windows.before_run = before_run

    async def run():
        held = session()
        await held.load(FILES)
        held.take(step(0))
        error = await asyncio.wait_for(held.failure, SECONDS)
        await close(held)
        return error

    assert "ZeroDivisionError: by a window" in str(asyncio.run(run()))


def test_a_step_is_refused_that_is_too_large_or_whose_head_takes_no_results(windows):
    async def run():
        held = session()
        await held.load(FILES)
        long = step(0)
        long.rows.scales = bytes(2 << 20)
        with pytest.raises(ProtocolError, match="a step of 2097"):
            held.take(long)
        for number in range(64):
            held.take(step(number))
            while held.results.qsize() <= number:
                await asyncio.sleep(0)
        with pytest.raises(ProtocolError, match="64 steps wait already"):
            held.take(step(64))
        await close(held)

    asyncio.run(asyncio.wait_for(run(), SECONDS))


@pytest.mark.parametrize("is_disk_used", [False, True])
def test_a_step_that_takes_far_longer_than_any_before_ends_the_session(windows, monkeypatch, is_disk_used):
    monkeypatch.setattr(module, "_HANG_SECONDS", 0.0)
    hangs, go_on = threading.Event(), threading.Event()

    def before_run():
        if windows.positions == [0, 1]:
            hangs.set()
            go_on.wait(SECONDS)

    windows.before_run = before_run

    async def run():
        held = session(is_disk_used)
        monkeypatch.setattr(_Window, "prefetch", lambda self: None, raising=False)
        await held.load(FILES)
        held.take(step(0))
        assert await asyncio.wait_for(held.results.get(), SECONDS)
        held.watch()
        assert not held.failure.done(), "nothing is running"
        held.take(step(1))
        assert await asyncio.to_thread(hangs.wait, SECONDS)
        monkeypatch.setattr(module, "page_faults", itertools.count(1000, 4).__next__)
        for _ in range(3):  # weights that were thrown out of memory are read again
            held.watch()
            assert not held.failure.done()
        monkeypatch.setattr(module, "page_faults", lambda: 2000)
        held.watch()
        if is_disk_used:  # a disk may take its time
            held.watch()
            assert not held.failure.done()
        else:
            while not held.failure.done():
                held.watch()
            assert isinstance(held.failure.result(), NodeLost)
            assert "hangs" in str(held.failure.result())
        go_on.set()
        await close(held)

    asyncio.run(asyncio.wait_for(run(), SECONDS))
