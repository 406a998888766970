"""Tasks by name: how their rows become problems, and downloads that fail in every way."""

import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from localreason.cli.evaluation.download import Source, fetch
from localreason.cli.evaluation.tasks import TASKS, Task, load_task
from localreason.runtime.errors import InputError

ROWS = {
    "gsm8k": '{"question": "1 + 1?", "answer": "It is <<1+1=2>>2.\\n#### 1,002"}\n',
    "math500": '{"problem": "p", "solution": "s", "answer": "\\\\frac{1}{2}", "unique_id": "test/a/1.json"}\n',
    "aime24": '{"id": 60, "problem": "p", "answer": "025", "url": "u"}\n',
    "aime25": '{"question": "p", "answer": "70"}\n',
    "amc23": '{"id": 0, "answer": 27.0, "url": "u", "question": "p"}\n',
    "svamp": '[{"ID": "chal-1", "Body": "Five birds ", "Question": "How many?", "Answer": 5.0}]',
}


class Server(BaseHTTPRequestHandler):
    """What a path says: its content, at once or byte by byte, an error, or less than was promised."""

    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        data = self.files.get(self.path)
        self.send_response(200 if data is not None else 404)
        self.send_header("Content-Length", str(len(data or b"") + 10 * (self.path == "/short")))
        self.end_headers()
        with contextlib.suppress(OSError):  # the reader may have gone
            for each in data or b"":
                self.wfile.write(bytes([each]))
                time.sleep(0.02 * (self.path == "/slow"))

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    Server.files = {
        "/good": b'{"problem": "1 + 1?", "answer": "2"}\n',
        "/short": b"{}",
        "/odd": b"<html>",
        "/slow": bytes(500),
    }
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as found:
        thread = threading.Thread(target=found.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{found.server_address[1]}"
        found.shutdown()
        thread.join()


def lines(path: Path) -> Iterator[dict[str, str]]:
    for line in path.read_text().splitlines():
        yield json.loads(line)


def task(url: str, sha256: str | None = None) -> dict[str, Task]:
    return {"sums": Task("sums", "sums", (Source("test.jsonl", url, sha256),), "none", 1, lines)}


def test_a_task_is_fetched_once_and_its_checksum_kept(server: str, tmp_path: Path):
    found = load_task("sums", tmp_path, tasks=task(f"{server}/good"))
    assert [(p.id, p.text, p.answer) for p in found.problems] == [("sums-0000", "1 + 1?", "2")]
    digest = hashlib.sha256(Server.files["/good"]).hexdigest()
    assert found.sha256 == digest
    assert (tmp_path / "sums/test.jsonl.sha256").read_text().split()[0] == digest
    Server.files = {}
    again = load_task("sums", tmp_path, tasks=task(f"{server}/good"))
    assert again.problems == found.problems
    assert (found.is_new, again.is_new) == (True, False)


def test_a_task_with_other_problems_than_it_should_have_is_refused(server: str, tmp_path: Path):
    Server.files["/good"] *= 2
    with pytest.raises(InputError, match=r"hold 2 problems and not the 1 of the task sums; delete them"):
        load_task("sums", tmp_path, tasks=task(f"{server}/good"))


def test_a_file_that_has_changed_is_refused(server: str, tmp_path: Path):
    path = fetch(Source("f", f"{server}/good"), tmp_path, "sums")
    path.write_text("other")
    with pytest.raises(InputError, match="has changed since it was fetched; delete it"):
        fetch(Source("f", f"{server}/good"), tmp_path, "sums")
    path.unlink()
    Server.files["/good"] = b"another"
    with pytest.raises(InputError, match="which the first download had"):
        fetch(Source("f", f"{server}/good"), tmp_path, "sums")
    assert not path.exists()


@pytest.mark.parametrize(
    ("path", "sha256", "words"),
    [
        ("/gone", None, "404.*--data FILE.jsonl"),
        ("/short", None, "broke off after 2 of 12 bytes|cannot be fetched"),
        ("/good", "0" * 64, "and not 0{64}, which is known for it; nothing was kept"),
        ("/odd", None, "is not what the task sums should be.*delete it"),
    ],
)
def test_a_broken_download_is_a_sentence_and_leaves_nothing(
    server: str, tmp_path: Path, path: str, sha256: str | None, words: str
):
    with pytest.raises(InputError, match=words):
        load_task("sums", tmp_path, tasks=task(f"{server}{path}", sha256))
    if path != "/odd":
        assert not (tmp_path / "sums/test.jsonl").exists()


def test_a_download_that_drips_ends_at_the_deadline(server: str, tmp_path: Path):
    started = time.monotonic()
    with pytest.raises(InputError, match=r"cannot be fetched from .*/slow \(only \d+ bytes came in time\); check"):
        fetch(Source("f", f"{server}/slow"), tmp_path, "sums", seconds=0.3)
    assert time.monotonic() - started < 5


def test_a_task_out_of_reach_says_what_to_do(tmp_path: Path):
    with pytest.raises(InputError, match=r"cannot be fetched from http://127.0.0.1:9/x.*put it at .*or give --data"):
        load_task("sums", tmp_path, tasks=task("http://127.0.0.1:9/x"))


@pytest.mark.parametrize("name", sorted(TASKS))
def test_the_rows_of_every_task_become_problems(name: str, tmp_path: Path):
    path = tmp_path / "file"
    path.write_text(ROWS[name])
    [row] = TASKS[name].rows(path)
    answers = {"gsm8k": "1002", "math500": "\\frac{1}{2}", "aime24": "025", "aime25": "70", "amc23": "27", "svamp": "5"}
    assert row["answer"] == answers[name]
    assert row["problem"] == {"gsm8k": "1 + 1?", "svamp": "Five birds. How many?"}.get(name, "p")


def test_every_task_has_a_home_and_terms():
    for one in TASKS.values():
        assert one.licence
        assert all(source.url.startswith("https://") for source in one.sources)
        assert all(source.sha256 is None or len(source.sha256) == 64 for source in one.sources)
        assert all(re.search(r"/[0-9a-f]{40}/", source.url) for source in one.sources), "a branch moves"


def test_a_task_reads_its_problems_from_a_given_file(home: Path):
    Path("mine.jsonl").write_text('{"problem": "a", "answer": 1}\n{"problem": "b"}\n{"problem": "a", "id": "1"}\n')
    found = load_task("gsm8k", home, Path("mine.jsonl"), limit=1)
    assert (found.name, found.licence, len(found.problems), len(found.bad)) == ("gsm8k", "MIT", 1, 1)
    assert "stands in line 1 already" in found.bad[0].reason


@pytest.mark.parametrize("name", ["gsm9k", "-", "no.jsonl"])
def test_what_is_no_task_is_refused(name: str, home: Path):
    with pytest.raises(InputError, match=r"there is no (task or )?file"):
        load_task(name, home)
