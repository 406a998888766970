"""The store against a Hub in memory."""

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import filelock
import gguf
import numpy as np
import pytest

from localreason.cli import store
from localreason.cli.checksum import sha256
from localreason.cli.hub import HuggingFace, RemoteFile
from localreason.cli.main import ExitCode, main
from localreason.runtime.errors import ModelBroken, ModelError, ModelNotFound, OutputError
from tests.cli.fake import FakeHub, wiring
from tests.gguf_models import write_model

QWEN = "Qwen/Qwen3-0.6B-GGUF"


@pytest.fixture
def hub() -> FakeHub:
    files = {
        QWEN: {"Qwen3-0.6B-Q8_0.gguf": b"eight", "Qwen3-0.6B-Q4_K_M.gguf": b"four", "README.md": b"#"},
        "a/split": {f"Q8/m-Q8_0-0000{i}-of-00003.gguf": bytes([i]) for i in (1, 2, 3)},
        "a/torn": {"m-Q8_0-00001-of-00002.gguf": b"1"},
        "a/one": {"one.gguf": b"1"},
    }
    return FakeHub(files, lambda data: hashlib.sha256(data).hexdigest())


@pytest.fixture
def folder(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOCALREASON_STORE", str(home / "store"))
    return home / "store"


def test_a_pulled_model_is_found_by_name_reference_and_path(hub: FakeHub, folder: Path):
    path = store.pull("qwen3-0.6b", folder, hub)
    assert path.read_bytes() == b"eight"
    assert hub.downloads == ["Qwen3-0.6B-Q8_0.gguf"]
    for reference in ("qwen3-0.6b", f"{QWEN}:Q8_0", f"{QWEN}:q8_0", f"{QWEN}/Qwen3-0.6B-Q8_0.gguf", str(path)):
        assert store.find(reference, folder) == path
    assert store.find(f"{QWEN}:Q4_K_M", folder) is None
    assert [item.name for item in store.list_stored(folder)] == ["qwen3-0.6b"]


def test_all_parts_of_a_split_model_are_pulled_and_removed(hub: FakeHub, folder: Path):
    path = store.pull("a/split:Q8_0", folder, hub)
    assert path.name == "m-Q8_0-00001-of-00003.gguf"
    assert len(store.parts(path)) == 3
    assert store.list_stored(folder)[0].n_bytes == 3
    assert len(store.remove("a/split:Q8_0", folder)) == 3
    assert store.list_stored(folder) == []


def test_a_damaged_download_never_reaches_the_store(hub: FakeHub, folder: Path):
    hub.is_corrupting = True
    with pytest.raises(ModelBroken, match="another SHA-256"):
        store.pull("qwen3-0.6b", folder, hub)
    assert store.list_stored(folder) == []
    hub.extra_bytes = 7
    with pytest.raises(ModelBroken, match="has 5 bytes instead of 12"):
        store.pull("qwen3-0.6b", folder, hub)


def test_a_disk_that_is_too_small_is_told_before_the_download(hub: FakeHub, folder: Path):
    hub.extra_bytes = 1 << 60
    with pytest.raises(OutputError, match="GB free"):
        store.pull("qwen3-0.6b", folder, hub)
    assert hub.downloads == []


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        (f"{QWEN}:Q2_K", "has no Q2_K; it has Qwen3-0.6B-Q4_K_M, Qwen3-0.6B-Q8_0"),
        (QWEN, "several models"),
        ("no/such:Q8_0", "no repository"),
        ("plain words", "cannot be pulled"),
        ("a/torn:Q8_0", "1 of its 2 parts"),
    ],
)
def test_a_reference_that_fits_nothing_is_refused(reference: str, words: str, hub: FakeHub, folder: Path):
    with pytest.raises(ModelError, match=words):
        store.pull(reference, folder, hub)


def test_what_is_outside_the_store_is_never_removed(model: str, folder: Path):
    with pytest.raises(ModelNotFound, match="not in the store"):
        store.remove(model, folder)
    assert Path(model).exists()


@pytest.mark.parametrize("reference", ["./missing.gguf", "missing.gguf", "bogus", "."])
def test_a_model_that_is_nowhere_is_told(reference: str, folder: Path):
    with pytest.raises(ModelNotFound):
        store.find(reference, folder)


def test_the_commands_pull_list_and_remove(hub: FakeHub, folder: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["models", "pull", "a/one"], wiring(hub=hub)) == ExitCode.OK
    assert capfd.readouterr().out == f"{folder / 'a/one/one.gguf'}\n"
    assert main(["models", "list", "--json"]) == ExitCode.OK
    rows = {row["name"]: row for row in json.loads(capfd.readouterr().out)}
    assert rows["a/one/one.gguf"]["path"]
    assert rows["qwen3-1.7b"]["path"] is None
    assert main(["models", "list"]) == ExitCode.OK
    assert main(["models", "rm", "a/one"]) == ExitCode.OK
    assert main(["models", "rm", "a/one"]) == ExitCode.MODEL
    assert main(["models", "show", "a/one"]) == ExitCode.MODEL


def test_who_stops_a_pull_is_told_that_it_goes_on(
    hub: FakeHub, folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def stopped(*_: object) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(hub, "download", stopped)
    assert main(["models", "pull", "qwen3-0.6b"], wiring(hub=hub)) == ExitCode.INTERRUPTED
    assert "what has arrived is kept" in capfd.readouterr().err


def test_solve_pulls_a_reference_that_is_not_here(hub: FakeHub, folder: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["solve", "x", "--model", "a/one", "--quiet"], wiring(hub=hub)) == ExitCode.OK
    assert "pulling it" in capfd.readouterr().err


def test_show_reads_the_header(folder: Path, home: Path, capfd: pytest.CaptureFixture[str]):
    writer = gguf.GGUFWriter(home / "tiny.gguf", "llama")
    writer.add_context_length(512)
    writer.add_chat_template("{{ '<think>' }}")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert main(["models", "show", "tiny.gguf", "--json"]) == ExitCode.OK
    row = json.loads(capfd.readouterr().out)
    assert (row["architecture"], row["context_length"], row["thinking_format"]) == ("llama", 512, "deepseek")
    assert row["sha256"] == hashlib.sha256((home / "tiny.gguf").read_bytes()).hexdigest()


@pytest.mark.parametrize("data", [b"", b"GGUF", b"no model at all, but long enough to have a header"])
def test_show_of_a_file_that_is_no_model_is_a_model_error(data: bytes, folder: Path, home: Path):
    (home / "bad.gguf").write_bytes(data)
    assert main(["models", "show", "bad.gguf"]) == ExitCode.MODEL


def test_the_real_hub_out_of_reach_is_one_sentence(folder: Path):
    with pytest.raises(ModelError, match="cannot be reached"):
        store.pull("qwen3-0.6b", folder, HuggingFace("http://127.0.0.1:9"))


DATA = hashlib.shake_128(b"weights").digest(24_000_000)
"""More than huggingface_hub writes at once, 10 MiB."""


class Sender(BaseHTTPRequestHandler):
    """A file of the Hub; as long as `is_torn`, the connection ends in the middle of it and then only errors come."""

    is_torn: ClassVar[bool]
    ranges: ClassVar[list[str | None]]

    def do_GET(self) -> None:
        assert self.path == "/a/b/resolve/main/Q8/m-Q8_0.gguf"
        wanted = self.headers["Range"]
        self.ranges.append(wanted)
        if self.is_torn and wanted:
            self.send_response(500)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(DATA) - start))
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(DATA) - 1}/{len(DATA)}")
        self.end_headers()
        self.wfile.write(DATA[start : 15_000_000 if self.is_torn else None])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def sender() -> Iterator[tuple[type[Sender], HuggingFace]]:
    handler: type[Sender] = type("Handler", (Sender,), {"is_torn": False, "ranges": []})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield handler, HuggingFace(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
        thread.join()


def test_a_download_goes_on_where_it_stopped(sender: tuple[type[Sender], HuggingFace], tmp_path: Path):
    handler, real = sender
    file = RemoteFile("Q8/m-Q8_0.gguf", len(DATA), hashlib.sha256(DATA).hexdigest())
    handler.is_torn = True
    with pytest.raises(ModelError, match="cannot be reached for a/b"):
        real.download("a/b", file, tmp_path)
    handler.is_torn = False
    handler.ranges.clear()
    assert real.download("a/b", file, tmp_path).read_bytes() == DATA
    assert handler.ranges == [f"bytes={10 << 20}-"]
    assert [path.name for path in (tmp_path / "Q8").iterdir()] == ["m-Q8_0.gguf"]


@pytest.mark.parametrize("n_bytes", [0, len(DATA) + 1])
def test_what_is_left_of_other_contents_is_not_gone_on_with(
    n_bytes: int, sender: tuple[type[Sender], HuggingFace], tmp_path: Path
):
    handler, real = sender
    sha256 = hashlib.sha256(DATA).hexdigest()
    (tmp_path / "Q8").mkdir()
    (tmp_path / "Q8" / "m-Q8_0.gguf.0123456789abcdef.part").write_bytes(DATA[:7])
    (tmp_path / "Q8" / f"m-Q8_0.gguf.{sha256[:16]}.part").write_bytes(bytes(n_bytes))
    file = RemoteFile("Q8/m-Q8_0.gguf", len(DATA), sha256)
    assert real.download("a/b", file, tmp_path).read_bytes() == DATA
    assert handler.ranges == [None]


def test_a_file_that_the_hub_does_not_send_is_refused(tmp_path: Path):
    with pytest.raises(ModelError, match=r"m\.gguf has 51 GB .* 50 GB at most"):
        HuggingFace("http://127.0.0.1:9").download("a/b", RemoteFile("m.gguf", 51_000_000_000, "0" * 64), tmp_path)


def test_parts_that_were_fetched_are_not_fetched_again(hub: FakeHub, folder: Path):
    incoming = folder / ".incoming" / "a" / "split" / "Q8"
    incoming.mkdir(parents=True)
    (incoming / "m-Q8_0-00001-of-00003.gguf").write_bytes(bytes([1]))
    (incoming / "m-Q8_0-00002-of-00003.gguf").write_bytes(b"x")  # of the right length only
    (incoming / "other-Q4_0.gguf.0123456789abcdef.part").write_bytes(b"half of another")
    store.pull("a/split:Q8_0", folder, hub)
    assert hub.downloads == ["Q8/m-Q8_0-00002-of-00003.gguf", "Q8/m-Q8_0-00003-of-00003.gguf"]
    assert [path.name for path in incoming.iterdir()] == ["other-Q4_0.gguf.0123456789abcdef.part"]


@pytest.mark.parametrize("name", ["m-Q4_0-00002-of-00002.gguf", "m-mmproj-Q4_0.gguf"])
def test_what_is_no_whole_model_is_not_found(name: str, folder: Path):
    (folder / "o" / "r").mkdir(parents=True)
    (folder / "o" / "r" / name).write_bytes(b"x")
    assert store.find("o/r:Q4_0", folder) is None
    assert store.list_stored(folder) == []


def test_a_name_that_fits_two_models_is_refused(folder: Path):
    for owner in ("a", "b"):
        (folder / owner / "x").mkdir(parents=True)
        (folder / owner / "x" / "m-Q4_0.gguf").write_bytes(b"x")
    with pytest.raises(ModelNotFound, match=r"fits several models; name one of a/x/m-Q4_0.gguf, b/x/m-Q4_0.gguf"):
        store.remove("m-Q4_0", folder)
    assert store.remove("b/x/m-Q4_0.gguf", folder) == [folder / "b" / "x" / "m-Q4_0.gguf"]


def test_a_link_to_nowhere_hides_no_other_model(hub: FakeHub, folder: Path):
    path = store.pull("qwen3-0.6b", folder, hub)
    (folder / "gone.gguf").symlink_to(folder / "nowhere")
    assert store.find("qwen3-0.6b", folder) == path
    with pytest.raises(ModelNotFound, match="cannot be looked for"):
        store.find("a" * 300, folder)


def test_what_a_file_says_of_itself_does_nothing_to_the_terminal(
    folder: Path, home: Path, capfd: pytest.CaptureFixture[str]
):
    path = write_model(home / "x.gguf", values={"general.name": "red\x1b[31m\x1b]0;title\x07"})
    assert main(["models", "show", str(path)]) == ExitCode.OK
    shown = capfd.readouterr().out
    assert "\x1b" not in shown
    assert shown.splitlines()[0].split() == ["name", str(path)]
    broken = write_model(home / "y.gguf", values={"general.architecture": "a\x1b[2Jb"})
    assert main(["solve", "hi", "-m", str(broken)]) == ExitCode.MODEL
    assert "\x1b" not in capfd.readouterr().err


def test_a_checksum_that_cannot_be_kept_is_made_all_the_same(model: str, home: Path, monkeypatch: pytest.MonkeyPatch):
    (home / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "file"))
    assert sha256(Path(model)) == hashlib.sha256(Path(model).read_bytes()).hexdigest()


def test_a_model_is_fetched_by_one_at_a_time(hub: FakeHub, folder: Path):
    (folder / ".incoming" / "Qwen").mkdir(parents=True)
    with (
        filelock.FileLock(folder / ".incoming" / f"{QWEN}.lock"),
        pytest.raises(OutputError, match="is being fetched already"),
    ):
        store.pull("qwen3-0.6b", folder, hub)
    assert hub.downloads == []
    assert store.pull("qwen3-0.6b", folder, hub).is_file()


@pytest.mark.parametrize("name", ["../../out.gguf", "/out.gguf", "a/../../../out.gguf"])
def test_a_name_that_leaves_the_store_is_no_model(name: str, folder: Path):
    hostile = FakeHub({"a/b": {name: b"x"}}, lambda data: hashlib.sha256(data).hexdigest())
    with pytest.raises(ModelNotFound):
        store.pull("a/b", folder, hostile)
    assert hostile.downloads == []


def test_a_checksum_is_remembered_until_the_file_changes(model: str):
    path = Path(model)
    first = sha256(path)
    assert sha256(path) == first
    path.write_bytes(b"other")
    assert sha256(path) == hashlib.sha256(b"other").hexdigest()
