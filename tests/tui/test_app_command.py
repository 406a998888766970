"""The command, its models and its ring, each as real as it can be without a terminal."""

import hashlib
import queue
import sys

import pytest

from localreason.cli.build import Wiring, make_recipe
from localreason.cli.chat_models import ChatBackend
from localreason.cli.config import load
from localreason.cli.main import main
from localreason.cli.ring_states import RingStates
from localreason.cluster.errors import ClusterError
from localreason.cluster.formation import Assignment, Placement
from localreason.runtime.errors import EngineError, ModelNotFound
from localreason.runtime.template import Message
from localreason.tui.delta import Ended, Failed
from localreason.tui.widgets.nodes import NodeState
from tests.cli.fake import FakeHub
from tests.gguf_models import write_model


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.delenv("LOCALREASON_CONFIG", raising=False)


def test_without_a_terminal_the_command_says_so(capsys):
    assert main(["chat"]) == 4
    assert "needs a terminal" in capsys.readouterr().err


def test_a_history_that_cannot_be_is_one_sentence(capsys, monkeypatch, tmp_path):
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    (tmp_path / "file").write_text("")
    assert main(["chat", "--history", str(tmp_path / "file" / "chats.sqlite3")]) == 5
    assert "give another --history" in capsys.readouterr().err


def test_a_model_is_fetched_with_progress_and_talks(tmp_path):
    data = write_model(tmp_path / "Qwen3-0.6B-Q8_0.gguf", "qwen3").read_bytes()
    files = {"Qwen/Qwen3-0.6B-GGUF": {"Qwen3-0.6B-Q8_0.gguf": data}}
    hub = FakeHub(files, lambda blob: hashlib.sha256(blob).hexdigest())
    config = load({"store": str(tmp_path / "store"), "max_tokens": 8, "threads": 1, "format": "none"})
    backend = ChatBackend(config, make_recipe(config), Wiring(hub=lambda: hub))
    assert not next(one for one in backend.suggestions() if one.offer.name == "qwen3-0.6b").offer.is_here
    events, told = queue.SimpleQueue(), []
    opened = backend.open("qwen3-0.6b", events.put, lambda *progress: told.append(progress))
    try:
        assert hub.downloads == ["Qwen3-0.6B-Q8_0.gguf"]
        assert told[0][0] == "fetching qwen3-0.6b"
        assert opened.name == "qwen3-0.6b"
        opened.streamer.start([Message("user", "hello")], make_recipe(config))
        while not isinstance(event := events.get(timeout=20), Ended):
            assert not isinstance(event, Failed), event
        assert event.stats.n_sampled > 0
        assert next(one for one in backend.suggestions() if one.offer.name == "qwen3-0.6b").offer.is_here
        assert backend.nodes() == ()
    finally:
        backend.close()


def test_a_model_is_not_closed_under_a_decode_that_still_runs(tmp_path):
    config = load({"store": str(tmp_path / "store"), "threads": 1, "format": "none"})
    write_model(tmp_path / "tiny.gguf", "qwen2")
    backend = ChatBackend(config, make_recipe(config), Wiring())
    opened = backend.open(str(tmp_path / "tiny.gguf"), print, print)
    model, ends = opened.streamer._model, opened.streamer.close
    opened.streamer.close = lambda seconds: False
    with pytest.raises(EngineError, match="still busy"):
        backend.close()
    assert model.tokenizer.encode("alive"), "nothing was freed"
    opened.streamer.close = ends
    backend.close()
    backend.close()


def test_a_model_that_is_nowhere_is_told_of(tmp_path):
    config = load({"store": str(tmp_path / "store")})
    backend = ChatBackend(config, make_recipe(config), Wiring())
    with pytest.raises(ModelNotFound):
        backend.open("no such model", print, print)


class Ring:
    """A ring whose placement the test changes."""

    def __init__(self, *windows):
        self.place(*windows)
        self.busy_seconds = {}
        self.failure = None

    @property
    def placement(self):
        if self.failure is not None:
            raise self.failure
        return self._placement

    def place(self, *windows):
        self._placement = Placement(tuple(Assignment(*window) for window in windows))


def test_the_ring_tells_which_machines_are_there_lost_and_back():
    ring = Ring(("attic", 0, 9), ("", 9, 18), ("attic", 18, 22), ("", 22, 28))
    states = RingStates(ring, {"attic": 0.001})
    attic = NodeState("attic", ((0, 9), (18, 22)), 0.001)
    head = NodeState("head", ((9, 18), (22, 28)))
    assert states.now() == (attic, head)
    ring.place(("", 0, 28))
    alone = NodeState("head", ((0, 28),))
    for _ in range(2):
        assert states.now() == (alone, NodeState("attic", state="lost"))
    ring.place(("attic", 0, 9), ("", 9, 28))
    for _ in range(2):
        assert states.now()[0] == NodeState("attic", ((0, 9),), 0.001, None, "recovered")


def test_the_ring_tells_when_its_layers_are_placed_anew():
    ring = Ring(("attic", 0, 9), ("", 9, 28))
    states = RingStates(ring, {})
    seen = []
    for change in (None, ClusterError("the ring is closed"), [("", 0, 28)], None):
        if isinstance(change, ClusterError):
            ring.failure = change
        elif change:
            ring.failure = None
            ring.place(*change)
        states.now()
        seen.append(states.is_placing)
    assert seen == [False, True, True, False]


def test_the_load_of_a_node_is_its_share_of_the_time_since_the_last_look():
    ring, now = Ring(("attic", 0, 9), ("", 9, 28)), [100.0]
    states = RingStates(ring, {}, lambda: now[0])
    loads = []
    for seconds, busy in ((1, 5.0), (2, 6.5), (0.1, 6.55), (1, 5.0)):  # the third look comes before the node says more
        now[0] += seconds
        ring.busy_seconds = {"attic": busy}
        loads.append(states.now()[0].load)
    assert loads == [0, 0.75, 0.75, 0]
