"""What a head says to a node that it holds."""

import asyncio

import pytest

from localreason.cluster.errors import HeadLost, ProtocolError
from localreason.cluster.inlet import Inlet
from localreason.cluster.wire import ring_pb2 as wire

BEAT, OPEN = wire.ToNode(beat=wire.Beat()), wire.ToNode(open=wire.Open())


def said(*messages):
    async def say():
        for message in messages:
            yield message

    return Inlet(say(), lambda: True)


def test_a_head_that_ends_a_running_session_is_no_failure():
    asyncio.run(said(BEAT, BEAT).drain())


def test_nothing_but_beats_may_come_while_the_ring_runs():
    with pytest.raises(ProtocolError, match="open came"):
        asyncio.run(said(BEAT, OPEN).drain())


def test_a_head_that_ends_before_it_said_what_is_awaited_is_lost():
    with pytest.raises(HeadLost, match="ended the session"):
        asyncio.run(said(BEAT).next("open"))
