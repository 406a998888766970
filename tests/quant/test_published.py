"""Models on the Hub: their headers are read, and nothing else is fetched."""

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from localreason.cli.main import ExitCode
from localreason.quant.choose import describe
from localreason.quant.source import read_remote
from localreason.runtime.errors import ModelBroken
from localreason.runtime.header import read_table
from localreason.runtime.parts import join, read_local
from tests.gguf_models import write_large, write_split

MIB = 1 << 20


def test_a_remote_header_is_read_in_few_growing_ranges(home: Path):
    path = write_large(home / "m.gguf", "Q8_0", n_tokens=150_000)
    asked: list[tuple[int, int]] = []

    def fetch(start: int, n_bytes: int) -> bytes:
        asked.append((start, n_bytes))
        with path.open("rb") as file:
            file.seek(start)
            return file.read(n_bytes)

    piece = read_remote("m", path.stat().st_size, fetch)
    end = piece.header.data_offset
    assert piece.header.tensors == read_table(path).tensors
    assert end > 5 * MIB
    assert [start + n for start, n in asked[:-1]] == [start for start, _ in asked[1:]]
    assert sum(n for _, n in asked) < 2.1 * end
    assert len(asked) < 8
    with pytest.raises(ModelBroken, match="of 262144 bytes came"):
        read_remote("m", path.stat().st_size, lambda start, n: b"GGUF")


class Published(BaseHTTPRequestHandler):
    """The two requests of the Hub that are needed: the files of a repository, and a range of one."""

    files: dict[str, Path]
    n_sent: int
    has_ranges: bool

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/a/b"):
            siblings = [{"rfilename": name, "size": path.stat().st_size} for name, path in self.files.items()]
            return self._send(200, json.dumps({"id": "a/b", "siblings": siblings}).encode())
        path = self.files.get(self.path.removeprefix("/a/b/resolve/main/"))
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if path is None or wanted is None:
            return self._send(404, b"")
        if not self.has_ranges:
            self.send_response(200)
            self.send_header("Content-Length", str(path.stat().st_size))
            return self.end_headers()
        with path.open("rb") as file:
            file.seek(int(wanted[1]))
            return self._send(206, file.read(int(wanted[2]) - int(wanted[1]) + 1))

    def _send(self, status: int, body: bytes) -> None:
        type(self).n_sent += len(body)
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(home: Path) -> Iterator[type[Published]]:
    """A server in place of the Hub; its class holds what it serves and counts what it sent."""
    handler = type("Handler", (Published,), {"files": {}, "n_sent": 0, "has_ranges": True, "url": ""})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        handler.url = f"http://127.0.0.1:{server.server_address[1]}"  # pyright: ignore[reportAttributeAccessIssue]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield handler
        server.shutdown()
        thread.join()


def run(hub: type[Published], command: str, *args: str) -> "subprocess.CompletedProcess[str]":
    """The command in a process of its own: huggingface_hub reads the address of the Hub once."""
    url: str = hub.url  # pyright: ignore[reportAttributeAccessIssue]
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", "from localreason.cli.main import run; run()", "quant", command, *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "HF_ENDPOINT": url, "NO_PROXY": "*", "HF_HUB_DISABLE_TELEMETRY": "1"},
    )


def test_a_published_file_is_inspected_and_not_downloaded(hub: type[Published], home: Path):
    large = write_large(home / "large.gguf", "Q8_0", n_tokens=50_000)
    hub.files = {"m-Q8_0.gguf": large, "m-Q4_0.gguf": large, "README.md": large}
    done = run(hub, "inspect", "a/b:Q8_0", "--json")
    assert not done.returncode, done.stderr
    row = json.loads(done.stdout)
    assert row["name"] == "hf://a/b/m-Q8_0.gguf"
    assert row["n_bytes"] == large.stat().st_size > 100 * MIB
    assert row["precision"]["scheme"] == "Q8_0"
    assert hub.n_sent < 8 * MIB


def test_a_published_split_model_is_read_by_one_reference(hub: type[Published], home: Path):
    hub.files = {f"UD/{path.name}": path for path in write_split(home)}
    done = run(hub, "inspect", "hf://a/b/UD/tiny-00001-of-00003.gguf", "--json")
    assert not done.returncode, done.stderr
    assert json.loads(done.stdout)["n_files"] == 3


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("a/b:Q4_0", "has no Q4_0; it has m-Q8_0"),
        ("hf://nothing", "names no published model"),
        ("a/b:Q8_0", "sends whole files only"),
    ],
)
def test_what_cannot_be_read_from_afar_is_one_sentence(hub: type[Published], home: Path, reference: str, words: str):
    hub.files, hub.has_ranges = {"m-Q8_0.gguf": write_large(home / "m.gguf", "Q8_0")}, False
    done = run(hub, "inspect", reference)
    assert done.returncode == ExitCode.MODEL
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_choose_among_published_models_reads_one_header(hub: type[Published], home: Path):
    large, small = (write_large(home / f"{name}.gguf", name, n_layers=n) for name, n in (("F16", 2), ("Q8_0", 2)))
    parts = {f"m-Q4_K_M-0000{i}-of-00002.gguf": large for i in (1, 2)}
    hub.files = {"m-F16.gguf": large, "m-Q8_0.gguf": small, "mmproj-F16.gguf": small, **parts}
    hub.files["m-Q2_K-00001-of-00002.gguf"] = small  # half a model
    done = run(hub, "choose", "--hf", "a/b", "--context", "512", "--json")
    assert not done.returncode, done.stderr
    sizes = {one["candidate"]["name"]: one["candidate"]["n_bytes"] for one in json.loads(done.stdout)["options"]}
    n, half = large.stat().st_size, small.stat().st_size
    assert sizes == {"a/b/m-Q8_0": half, "a/b/m-F16": n, "a/b/m-Q4_K_M": 2 * n}
    assert hub.n_sent < 2 * MIB


def test_choose_takes_the_headers_of_all_parts(hub: type[Published], home: Path):
    paths = write_split(home)
    hub.files = {path.name.replace("tiny", "tiny-F32"): path for path in paths}
    done = run(hub, "choose", "--hf", "a/b", "--context", "512", "--json")
    assert not done.returncode, done.stderr
    [option] = json.loads(done.stdout)["options"]
    assert option["candidate"]["n_parameters"] == describe(join(read_local(paths[0])), "").n_parameters
