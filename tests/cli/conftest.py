"""A home of its own for each test, so that no configuration, cache or store of this machine is seen."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from localreason.cli.main import main

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("LOCALREASON_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def model(home: Path) -> str:
    """A path to give to --model; the fake model never reads it."""
    path = home / "fake.gguf"
    path.write_bytes(b"GGUF of a kind")
    return str(path)


@pytest.fixture
def problems(home: Path) -> Callable[..., str]:
    def write(*texts: str, answer: str | None = "7", name: str = "problems.jsonl") -> str:
        rows = [{"id": f"p{i}", "problem": text, "answer": answer} for i, text in enumerate(texts)]
        (home / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return name

    return write


@pytest.fixture
def start() -> Callable[..., "subprocess.Popen[str]"]:
    """Start the command line with the fake model in a process of its own."""

    def run(*args: str) -> "subprocess.Popen[str]":
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [sys.executable, "-W", "error", str(ROOT / "tests/cli/fake.py"), *args],
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )

    return run


def rows(path: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, str]]:
    """Runs a command line as the head of a home in a temporary folder; all nodes are named, so few are looked for."""
    monkeypatch.setenv("LOCALREASON_CONFIG", str(tmp_path / "config.toml"))
    (tmp_path / "config.toml").write_text("")
    monkeypatch.setenv("LOCALREASON_CLUSTER_FOLDER", str(tmp_path / "laptop"))
    monkeypatch.setenv("LOCALREASON_CLUSTER_CACHE", str(tmp_path / "laptop-cache"))
    monkeypatch.setenv("LOCALREASON_STORE", str(tmp_path / "store"))
    monkeypatch.setattr("localreason.cli.ring.LOOK_SECONDS", 0.1)

    def run(*words: object, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        found = main([str(word) for word in words])
        said = capsys.readouterr()
        assert found == code, said
        assert "Traceback" not in said.err
        return said.out, said.err

    return run
