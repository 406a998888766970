"""A ring of real node processes over mutual TLS: exact logits, lost nodes, hostile input."""

import asyncio
import contextlib
import secrets
import socket
import struct
import threading
import time
from dataclasses import replace
from itertools import pairwise

import grpc
import numpy as np
import pytest

from localreason.cluster.errors import ClusterError, NodeBusy, NodeLost, PlanImpossible
from localreason.cluster.formation import HEAD, Assignment, Formation, Placement
from localreason.cluster.link import LinkBook
from localreason.cluster.member import Member
from localreason.cluster.ring import RingEngine, RingOptions
from localreason.cluster.store import Store
from localreason.cluster.window import LayerWindow
from localreason.cluster.wire import ring_pb2 as wire
from localreason.cluster.wire import ring_pb2_grpc as service
from localreason.quant.gguf import ModelFile
from localreason.runtime.decode import Request, decode
from localreason.runtime.engine import Span
from localreason.runtime.errors import ContextFull, DecodeFailed, OutOfMemory
from localreason.runtime.events import Token
from localreason.runtime.formats import FORMATS
from localreason.runtime.llama import EngineOptions, load
from localreason.runtime.phase import PhaseTracker
from localreason.runtime.sequence import Sequence
from tests.cluster.conftest import N_LAYERS
from tests.cluster.processes import Head, NodeProcess, Relay
from tests.cluster.test_window import PROMPT, script
from tests.gguf_models import write_model


@pytest.fixture(scope="module")
def nodes(folder, head):
    with NodeProcess(folder, "attic", head) as attic, NodeProcess(folder, "phone", head) as phone:
        yield [attic, phone]


def evenly(names):
    """A window for each that is there, the head last."""
    all = [*names, HEAD]
    bounds = [N_LAYERS * i // len(all) for i in range(len(all) + 1)]
    return Placement(tuple(Assignment(name, *bounds[i : i + 2]) for i, name in enumerate(all)))


def ring_of(model, head, nodes, folder, place=evenly, tell=lambda text: None, links=None, **options):
    chosen = {"n_context": 512, "n_sequences": 4, "n_batch": 64, **options}
    store = Store(folder / "head-cache", 1 << 30, [model])
    addresses = [getattr(node, "address", node) for node in nodes]
    return RingEngine(ModelFile(model), addresses, head.gate, store, place, RingOptions(**chosen), tell, links)


def whole(model):
    return contextlib.closing(load(model, EngineOptions(512, 4, 1, n_batch=64))[0])


@pytest.fixture(scope="module")
def expected(model):
    with whole(model) as engine:
        return script(engine)


def rounds(*ends):
    """attic, phone, head, attic, phone, head ... with windows that end so."""
    names = ["attic", "phone", HEAD] * (len(ends) // 3)
    return lambda _: Placement(
        tuple(Assignment(name, first, end) for name, first, end in zip(names, [0, *ends], ends, strict=False))
    )


@pytest.mark.parametrize("place", [evenly, rounds(1, 2, 7), rounds(1, 2, 3, 5, 6, 7)], ids=["even", "7", "2 rounds"])
def test_a_ring_gives_the_whole_models_logits_bit_for_bit(model, head, nodes, folder, expected, place):
    with ring_of(model, head, nodes, folder, place) as ring:
        assert np.array_equal(script(ring), expected)


def test_neighbours_time_the_link_between_them(model, head, nodes, folder, tmp_path):
    book = LinkBook(tmp_path / "links.json")
    with ring_of(model, head, nodes, folder, links=book):
        pass
    found = book.read()
    assert set(found) == {("attic", "phone"), ("phone", "attic")}
    seconds, width = found["attic", "phone"]
    assert 0 < seconds < 1
    assert width > 1e6


def test_a_neighbour_that_the_heads_address_does_not_lead_to_is_reached_by_another(
    model, head, nodes, folder, expected, monkeypatch
):
    connect = Member.connect

    def cut_off(member, following):
        if following is not None:
            following = replace(following, host="127.0.0.9", other_hosts=("127.0.0.8", "127.0.0.1"))
        return connect(member, following)

    monkeypatch.setattr(Member, "connect", cut_off)
    with ring_of(model, head, nodes, folder) as ring:
        assert [window.member for window in ring.placement.windows] == ["attic", "phone", HEAD]
        assert np.array_equal(script(ring), expected)
        assert ring.timing.recoveries == []


def test_a_neighbour_that_answers_nowhere_is_lost_before_anything_is_asked(
    model, head, nodes, folder, expected, monkeypatch
):
    connect, told = Member.connect, []

    def cut_off(member, following):
        return connect(member, following and replace(following, host="127.0.0.9", other_hosts=("127.0.0.8",)))

    monkeypatch.setattr(Member, "connect", cut_off)
    with ring_of(model, head, nodes, folder, tell=told.append) as ring:
        assert [window.member for window in ring.placement.windows] == ["attic", HEAD]
        assert np.array_equal(script(ring), expected)
    assert any(text.startswith("phone is lost") and "does not answer at 127.0.0.9, 127.0.0.8" in text for text in told)


def test_a_head_with_the_first_window_too(model, head, nodes, folder, expected):
    windows = (Assignment(HEAD, 0, 2), Assignment("attic", 2, 5), Assignment(HEAD, 5, 7))
    with ring_of(model, head, nodes[:1], folder, lambda _: Placement(windows)) as ring:
        assert np.array_equal(script(ring), expected)


@pytest.mark.parametrize(("row_type", "most"), [("f16", 0.05), ("i8", 0.6)])
def test_smaller_activations_cost_a_little_exactness(model, head, nodes, folder, expected, row_type, most):
    with ring_of(model, head, nodes, folder, row_type=row_type) as ring:
        off = np.abs(script(ring) - expected).max()
    assert 0 < off < most


def test_a_second_start_sends_no_weights(model, head, nodes, folder):
    def place(names):
        return Placement((Assignment("attic", 0, 4), Assignment(HEAD, 4, 7)))

    with ring_of(model, head, nodes[:1], folder, place):
        pass
    with ring_of(model, head, nodes[:1], folder, place) as ring:
        assert ring.n_sent_bytes == 0

    def other(names):
        return Placement((Assignment("attic", 1 - 1, 3), Assignment(HEAD, 3, 7)))

    with ring_of(model, head, nodes[:1], folder, other) as ring:
        assert ring.n_sent_bytes == 0, "its layers lie in the other window"


def test_a_node_with_the_same_file_reads_its_own(model, head, folder, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / model.name).write_bytes(model.read_bytes())
    node = NodeProcess(tmp_path, "reader", head, "--store", str(tmp_path / "models"))
    with node, ring_of(model, head, [node], folder) as ring:
        stub = ring._ring.members["reader"].n_sent_bytes
        assert stub == 2 * 32 * 64 + 4 * 64, "only what stands in for the vocabulary is not in the file"


def test_a_model_in_several_files_is_a_ring_too(head, folder, tmp_path):
    parts = write_model(tmp_path / "split.gguf", "qwen2", 3, N_LAYERS, n_part_tensors=20)
    with whole(parts) as engine:
        logits = script(engine)
    with NodeProcess(tmp_path, "poor", head) as poor, ring_of(parts, head, [poor], folder) as ring:
        assert np.array_equal(script(ring), logits)
    with NodeProcess(tmp_path, "rich", head, "--store", str(tmp_path)) as rich:
        second = parts.with_name(parts.name.replace("00001", "00002"))
        with ring_of(second, head, [rich], folder) as ring:
            assert np.array_equal(script(ring), logits), "any of the parts stands for the model"
            assert ring.n_sent_bytes == 2 * 32 * 64 + 4 * 64, "only what stands in for the vocabulary is not there"


def sequences(n, n_tokens):
    for i in range(n):
        sequence = Sequence([*PROMPT, 65 + i], id=str(i), limit=n_tokens)
        yield Request(sequence, PhaseTracker(FORMATS["none"], ""), lambda row: int(row.argmax()), [])


def tokens_of(engine, tokenizer, n_tokens=24, on_token=lambda n: None):
    found, n = {}, 0
    for event in decode(engine, tokenizer, sequences(4, n_tokens)):
        if isinstance(event, Token) and not event.is_continued:
            found.setdefault(event.sequence.id, []).append(event.id)
            n += 1
            on_token(n)
    return found


def test_the_decode_loop_gives_the_same_tokens_with_samples_in_flight(model, head, nodes, folder):
    engine, tokenizer = load(model, EngineOptions(512, 4, 1, n_batch=64))
    with contextlib.closing(engine):
        alone = tokens_of(engine, tokenizer)
        with ring_of(model, head, nodes, folder) as ring:
            assert ring.n_in_flight > 4
            assert tokens_of(ring, tokenizer) == alone
            assert tokens_of(ring, tokenizer) == alone, "a ring serves many runs"
        for n_spread, n_in_flight in ((2, 6), (9, 9)):
            place = lambda names, n=n_spread: replace(evenly(names), n_spread=n)  # noqa: E731
            with ring_of(model, head, nodes, folder, place) as ring:
                assert (ring.n_spread, ring.n_in_flight) == (n_spread, n_in_flight), "as planned"
                assert tokens_of(ring, tokenizer) == alone


@pytest.mark.parametrize("harm", ["kill", "freeze"])
def test_a_lost_node_costs_no_token(model, head, spare, folder, harm):
    engine, tokenizer = load(model, EngineOptions(512, 4, 1, n_batch=64))
    told, times = {}, []
    with contextlib.closing(engine):
        alone = tokens_of(engine, tokenizer)

        def hurt(n):
            times.append(time.monotonic())
            if n == 30:
                getattr(spare[1], harm)()

        def tell(text):
            told[text.partition(":")[0]] = time.monotonic()

        with ring_of(model, head, spare, folder, tell=tell) as ring:
            assert tokens_of(ring, tokenizer, on_token=hurt) == alone
            assert [name for name, _ in ring.timing.recoveries] == ["older"]
    assert any("going on without older" in text for text in told), told
    noticed = told["older is lost"] - times[29]
    assert noticed < 3 + 2, f"noticed after {noticed:.1f} s; 3 are promised, and 2 are for a busy machine"
    pause = max(later - sooner for sooner, later in pairwise(times))
    assert pause < 10, f"{pause:.1f} s passed without a token"


def test_a_node_that_cannot_reach_the_next_one_is_not_the_one_that_is_lost(model, head, spare, folder, expected):
    old, older = spare
    said = []
    with Relay(older.port) as relay:
        addresses = [old.address, replace(older.address, port=relay.port)]
        with ring_of(model, head, addresses, folder, tell=said.append) as ring:
            assert np.array_equal(script(ring), expected)
            relay.cut(first=1)  # the head's own connection was made first
            for sequence_id in range(4):
                ring.rewind(sequence_id, 0)
            assert np.array_equal(script(ring), expected)
            assert [name for name, _ in ring.timing.recoveries] == ["older"]
    assert any(text.startswith("older is lost: old failed: the next node") for text in said), said


def test_a_long_answer_is_evaluated_again_in_more_steps_than_a_node_lets_wait(model, head, spare, folder):
    prompt = [(7 * i) % 256 for i in range(400)]
    with whole(model) as engine:
        for start in range(0, 400, 4):
            expected = np.array(engine.decode([Span(0, start, prompt[start : start + 4])]))
    with ring_of(model, head, spare, folder, n_batch=4) as ring:
        for start in range(0, 396, 4):
            ring.decode([Span(0, start, prompt[start : start + 4])])
        spare[1].kill()
        assert np.array_equal(ring.decode([Span(0, 396, prompt[396:])]), expected)
        assert [name for name, _ in ring.timing.recoveries] == ["older"], "one loss, not one after the other"


def test_pauses_are_not_measured_as_the_rings_speed(model, head, spare, folder):
    with ring_of(model, head, spare, folder) as ring:

        def write(n):
            ring.decode([Span(0, n, [n])])
            return ring.timing.n_tokens

        ring.decode([Span(0, 0, [1, 2, 3])])
        assert [write(3), write(4)] == [1, 2]
        ring.timing.since = -1e6  # as if the answer had waited long for whoever asks
        assert write(5) == 3
        assert ring.timing.seconds < 60
        spare[1].kill()
        assert write(6) == 0, "the ring is another one, and what came back first paid for that"
        assert write(7) == 1


def test_losing_all_nodes_leaves_the_head_alone(model, head, spare, folder, expected):
    with ring_of(model, head, spare, folder) as ring:
        ring.decode([Span(0, 0, PROMPT)])
        for node in spare:
            node.kill()
        ring.rewind(0, 0)
        assert np.array_equal(script(ring), expected)
        assert ring.placement.windows == (Assignment(HEAD, 0, N_LAYERS),)


def of_two(names):
    """A model that needs two nodes."""
    if len(names) < 2:
        raise PlanImpossible("the model takes 9 GiB and 4 are there; add a node")
    return evenly(names)


def test_a_model_that_fits_nowhere_any_more_is_a_clear_error_until_a_node_is_back(
    model, head, spare, folder, expected, monkeypatch
):
    monkeypatch.setattr("localreason.cluster.assembly._RETURN_SECONDS", 0.1)
    monkeypatch.setattr("localreason.cluster.roster._RETRY_SECONDS", 0.5)
    back, told = threading.Event(), []

    def tell(text):
        told.append(text)
        if "answers again" in text:
            back.set()

    with ring_of(model, head, spare, folder, of_two, tell=tell) as ring:
        ring.decode([Span(0, 0, PROMPT)])
        port = spare[0].port
        spare[0].kill()
        with pytest.raises(PlanImpossible, match="add a node"):
            ring.decode([Span(0, len(PROMPT), [1])])
        assert sum("waiting for" in text for text in told) == 1
        ring.discard()
        with pytest.raises(PlanImpossible, match="add a node"):
            ring.decode([Span(0, len(PROMPT) + 1, [1])])
        assert sum("waiting for" in text for text in told) == 1, "the next question is not kept waiting"
        ring.rewind(0, 0)
        spare[0].start(port)
        assert back.wait(20)
        assert np.array_equal(script(ring), expected)


def test_an_answer_waits_a_moment_for_a_node_without_which_the_model_does_not_fit(
    model, head, spare, folder, expected, monkeypatch
):
    monkeypatch.setattr("localreason.cluster.roster._RETRY_SECONDS", 0.2)
    port, told = spare[0].port, []

    def tell(text):
        told.append(text)
        if "does not fit without" in text:
            spare[0].start(port)

    with ring_of(model, head, spare, folder, of_two, tell=tell) as ring:
        ring.decode([Span(0, 0, PROMPT)])
        spare[0].kill()
        ring.rewind(0, 0)
        assert np.array_equal(script(ring), expected)
        assert [name for name, _ in ring.timing.recoveries] == [spare[0].name], told


def test_a_head_without_memory_for_its_new_share_leaves_the_other_node_free_for_the_next_attempt(
    model, head, spare, folder, expected, monkeypatch
):
    load_own, failures = Formation.load_own, []

    def load_once(formation, store, n_threads):
        if not failures:
            failures.append("")
            raise OutOfMemory("the window does not fit")
        load_own(formation, store, n_threads)

    told = []
    with ring_of(model, head, spare, folder, tell=told.append) as ring:
        ring.decode([Span(0, 0, PROMPT)])
        monkeypatch.setattr(Formation, "load_own", load_once)
        spare[1].kill()
        with pytest.raises(OutOfMemory):
            ring.decode([Span(0, len(PROMPT), [1])])
        ring.rewind(0, 0)
        assert np.array_equal(script(ring), expected)
        assert [window.member for window in ring.placement.windows] == [spare[0].name, HEAD]
        assert [text for text in told if " is lost" in text and not text.startswith(spare[1].name)] == []


def test_a_node_that_comes_back_is_used_for_the_next_request(model, head, spare, folder, monkeypatch):
    monkeypatch.setattr("localreason.cluster.roster._RETRY_SECONDS", 0.5)
    told, back = [], threading.Event()

    def tell(text):
        told.append(text)
        if "answers again" in text:
            back.set()

    with whole(model) as engine:
        for first in range(0, len(PROMPT) + 2, 16):  # as it is evaluated again, in pieces
            engine.decode([Span(0, first, [*PROMPT, 1, 1][first : first + 16])])
        engine.fork(0, 1, len(PROMPT))
        expected = np.array(engine.decode([Span(1, len(PROMPT), [2, 3])]))
    with ring_of(model, head, spare, folder, tell=tell) as ring:
        ring.decode([Span(0, 0, PROMPT)])
        port = spare[0].port
        spare[0].kill()
        ring.decode([Span(0, len(PROMPT), [1])])
        assert len(ring.placement.windows) == 2
        spare[0].start(port)
        assert back.wait(20)
        ring.decode([Span(0, len(PROMPT) + 1, [1])])
        assert len(ring.placement.windows) == 2, "not in the middle of an answer"
        ring.submit([Span(0, len(PROMPT) + 2, [1])])
        ring.begin_request()  # beside an answer, whose batch is under way
        assert len(ring.placement.windows) == 3
        assert ring.collect().shape == (1, ring.n_vocab)
        ring.fork(0, 1, len(PROMPT))  # a chat goes on from the prompt that it keeps
        assert np.array_equal(ring.decode([Span(1, len(PROMPT), [2, 3])]), expected)
        assert len(ring.placement.windows) == 3


def test_rows_that_nobody_wants_stay_unwanted_when_another_node_is_lost_in_the_recovery(model, head, spare, folder):
    with whole(model) as engine:
        expected = np.array(engine.decode([Span(1, 0, PROMPT[:4])]))
    losses = [spare[1]]

    def tell(text):
        if "layers" in text and "head" in text and is_armed:
            losses.pop().kill() if losses else None

    is_armed = False
    with ring_of(model, head, spare, folder, tell=tell, n_batch=4) as ring:
        for start in range(0, 200, 4):
            ring.decode([Span(0, start, [start % 250] * 4)])
        is_armed = True
        spare[0].kill()
        ring.submit([Span(0, 200, [1])])
        ring.discard()
        ring.submit([Span(1, 0, PROMPT[:4])])
        assert np.array_equal(ring.collect(), expected)
        assert len(ring.timing.recoveries) == 2


def test_the_head_opens_its_windows_while_the_nodes_open_theirs(model, head, nodes, folder, expected, monkeypatch):
    hold, is_open = Member.hold, threading.Event()

    class Opened(LayerWindow):
        def warm(self):
            super().warm()
            is_open.set()

    async def hold_until_open(member, *arguments):
        n_sent = await hold(member, *arguments)
        assert await asyncio.to_thread(is_open.wait, 20), "the head waited for the nodes"
        return n_sent

    monkeypatch.setattr("localreason.cluster.formation.LayerWindow", Opened)
    monkeypatch.setattr(Member, "hold", hold_until_open)
    with ring_of(model, head, nodes, folder) as ring:
        assert np.array_equal(script(ring), expected)


def test_a_second_head_waits_and_is_told_who_has_the_node(model, head, nodes, folder, monkeypatch):
    monkeypatch.setattr("localreason.cluster.assembly._BUSY_SECONDS", 0.0)
    with ring_of(model, head, nodes, folder, name="the laptop"), monkeypatch.context() as patch:
        patch.setattr("localreason.cluster.formation.LayerWindow", None)  # nothing is opened for a ring that waits
        with pytest.raises(NodeBusy, match="busy with the laptop"):
            ring_of(model, head, nodes, folder)
    with ring_of(model, head, nodes, folder):
        pass


def test_limits_of_the_cache_and_wrong_batches_are_errors(model, head, nodes, folder):
    with ring_of(model, head, nodes, folder, n_context=256) as ring:
        for start in range(0, 256, 64):
            ring.decode([Span(0, start, [1] * 64)])
        with pytest.raises(ContextFull):
            ring.decode([Span(1, 0, [1])])
        ring.fork(0, 1, 100)
        with pytest.raises(ContextFull):
            ring.decode([Span(1, 100, [1])])
        ring.rewind(0, 90)
        ring.decode([Span(1, 100, [1] * 64)])
        for batch in ([Span(0, 5, [1])], [Span(9, 0, [1])], [Span(0, 90, [10**6])], [Span(0, 90, [])], []):
            with pytest.raises(DecodeFailed):
                ring.decode(batch)
        assert ring.decode([Span(0, 90, [1])]).shape == (1, ring.n_vocab)


def describe(head, address):
    async def ask():
        async with Member(address, head.gate) as member:
            return await member.describe()

    return asyncio.run(ask())


class TestStrangers:
    def test_an_unpaired_machine_learns_nothing(self, nodes, folder):
        stranger = Head(folder, "stranger")
        with pytest.raises(NodeLost, match=r"trust|reached"):
            describe(stranger, nodes[0].address)

    def test_a_head_refuses_a_node_with_another_certificate(self, head, nodes):
        address = nodes[0].address
        swapped = type(address)(address.name, address.host, address.port, nodes[1].identity.certificate.decode())
        with pytest.raises(NodeLost):
            describe(head, swapped)

    @pytest.mark.parametrize("data", [b"", b"GET / HTTP/1.1\r\n\r\n", secrets.token_bytes(4096), b"\x16\x03\x01" * 99])
    def test_random_bytes_at_the_ports_harm_nothing(self, head, nodes, data):
        for port in (nodes[0].port, nodes[0].port + 1):
            with socket.create_connection(("127.0.0.1", port), 5) as line:
                line.sendall(data)
        assert describe(head, nodes[0].address).name == "attic"


async def _talk(head, node, use):
    channel = head.gate.channel("127.0.0.1", node.port, node.identity.certificate.decode())
    async with channel:
        return await use(service.RingStub(channel))


def opening(**changes):
    values = {"protocol": 1, "session": b"s" * 16, "head": "x", "n_context": 256, "n_sequences": 2, "n_batch": 8}
    return wire.Open(**{**values, "cache_type": "f16", "windows": [wire.WindowFile()], **changes})


def named(architecture):
    """A window's header of this architecture, with nothing else in it."""
    texts = [len(text).to_bytes(8, "little") + text.encode() for text in ("general.architecture", architecture)]
    number = struct.Struct("<I").pack
    header = b"GGUF" + number(3) + struct.pack("<QQ", 0, 1) + texts[0] + number(8) + texts[1]
    return header.ljust(-(-len(header) // 32) * 32, b"\0")


class TestHostileHeads:
    """A paired head that does not keep to the protocol ends its session and nothing else."""

    def failure(self, head, node, *words):
        async def use(stub):
            async def say():
                for word in words:
                    yield word
                await asyncio.Event().wait()

            call = stub.Hold(say(), timeout=20)
            async for message in call:
                if message.WhichOneof("message") == "failure":
                    call.cancel()
                    return message.failure.text
            return "ended"

        try:
            return asyncio.run(_talk(head, node, use))
        finally:
            assert not describe(head, node.address).held_by

    @pytest.mark.parametrize(
        ("word", "match"),
        [
            (wire.ToNode(open=opening(protocol=2)), "2 is spoken by the head and 1 here"),
            (wire.ToNode(open=opening(session=b"short")), "session is 5"),
            (wire.ToNode(open=opening(n_context=0)), "n_context is 0"),
            (wire.ToNode(open=opening(n_sequences=100000)), "n_sequences is 100000"),
            (wire.ToNode(open=opening(windows=[])), "windows is 0"),
            (wire.ToNode(open=opening(cache_type="q9")), "cache type 'q9'"),
            (wire.ToNode(open=opening(neighbours=["x"])), "certificate"),
            (wire.ToNode(open=opening(windows=[wire.WindowFile(header=bytes(33))])), "33 bytes of header"),
            (wire.ToNode(open=opening(windows=[wire.WindowFile(source_name="../x")])), "names have no folders"),
            (wire.ToNode(open=opening(windows=[wire.WindowFile(header=b"GGUF" + bytes(60))])), "GGUF"),
            (
                wire.ToNode(open=opening(windows=[wire.WindowFile(header=named("\x1b[2J"))])),
                "windows of a  [2J are",
            ),
            (wire.ToNode(open=opening(windows=[wire.WindowFile(header=secrets.token_bytes(64))])), "GGUF"),
            (wire.ToNode(chunk=wire.Chunk()), "chunk came where open was awaited"),
            (wire.ToNode(), "came where open was awaited"),
        ],
    )
    def test_an_impossible_opening_is_refused(self, head, nodes, word, match):
        assert match in self.failure(head, nodes[0], word)

    def test_weights_that_are_not_what_their_digest_says_are_refused(self, head, nodes):
        part = wire.Part(sha256=bytes(32), n_bytes=5)
        window = wire.WindowFile(header=bytes(32), parts=[part])
        text = self.failure(
            head,
            nodes[0],
            wire.ToNode(open=opening(windows=[window])),
            wire.ToNode(chunk=wire.Chunk(data=b"12345")),
        )
        assert "is not what its SHA-256 says" in text

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"number": 7}, "step 7 came to window 0, which awaits 1"),
            ({"number": 0}, "step 0 came to window 0, which awaits 1"),
            ({"hop": 3}, "a step for window 3 came"),
            ({"spans": []}, "a step without rows"),
            ({"spans": [wire.Span(sequence=9, n_tokens=1)]}, "sequence 9"),
            ({"spans": [wire.Span(n_tokens=4000)]}, "4000 rows"),
            ({"spans": [wire.Span(position=9, n_tokens=1)]}, "does not continue"),
            ({"rows": wire.Rows(data=b"123")}, "activations of 3 bytes"),
            ({"rows": wire.Rows(type=wire.I8, data=bytes(64))}, "came for 1 rows"),
            ({"operations": [wire.Operation(source=200)]}, "no sequence 200"),
            ({"operations": [wire.Operation(source=0, target=0, n_tokens=1)]}, "cannot share"),
        ],
    )
    def test_a_step_out_of_order_or_shape_ends_the_session(self, model, head, nodes, folder, change, match):
        with ring_of(model, head, nodes[:1], folder) as ring:
            ring.decode([Span(0, 0, [1])])
            good = {"number": 1, "spans": [wire.Span(position=1, n_tokens=1)], "rows": wire.Rows(data=bytes(256))}
            ring._background.call(ring._ring.send, wire.Step(**{**good, **change}))
            lost = ring._ring.inbox.get(timeout=20)
            assert match in lost.reason
        with ring_of(model, head, nodes[:1], folder) as ring:  # the node is free as soon as its windows are
            assert ring.decode([Span(0, 0, [1])]).shape == (1, ring.n_vocab)

    def test_a_message_over_the_limit_is_not_read(self, head, nodes):
        async def use(stub):
            await stub.Echo(wire.EchoRequest(data=bytes(40 << 20)), timeout=20)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            asyncio.run(_talk(head, nodes[0], use))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert describe(head, nodes[0].address).name == "attic"

    def test_a_flow_without_its_session_is_refused(self, model, head, nodes, folder):
        async def use(stub):
            async for _ in stub.Flow(metadata=(("session-bin", b"x" * 16), ("role", "out")), timeout=20):
                pass

        with ring_of(model, head, nodes[:1], folder), pytest.raises(grpc.aio.AioRpcError) as caught:
            asyncio.run(_talk(head, nodes[0], use))
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED

    def test_a_head_that_vanishes_leaves_the_node_idle(self, model, head, nodes, folder):
        async def vanish(stub):
            async def say():
                yield wire.ToNode(open=opening(windows=[wire.WindowFile(header=bytes(32), parts=[wire.Part()])]))
                await asyncio.Event().wait()

            call = stub.Hold(say())
            await call.read()

        asyncio.run(_talk(head, nodes[0], vanish))
        with ring_of(model, head, nodes[:1], folder) as ring:
            assert ring.decode([Span(0, 0, [1])]).shape == (1, ring.n_vocab)


def test_a_placement_that_is_no_ring_is_refused(model, head, nodes, folder):
    for windows in (
        (Assignment("attic", 0, 3), Assignment(HEAD, 4, 7)),
        (Assignment(HEAD, 0, 3), Assignment("attic", 3, 7)),
        (Assignment("attic", 0, 3), Assignment(HEAD, 3, 6)),
        tuple(
            Assignment(name, i, i + 1)
            for i, name in enumerate(["attic", "phone", "attic", HEAD, "attic", "phone", HEAD])
        ),
    ):
        with pytest.raises((PlanImpossible, ClusterError)):
            ring_of(model, head, nodes, folder, lambda _, windows=windows: Placement(windows))
