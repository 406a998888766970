"""`localreason quant measure` and `quant choose`: results, files, and mistakes that are told in a sentence."""

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from localreason.cli.build import Wiring
from localreason.cli.main import ExitCode, main
from localreason.quant.imatrix import read_importance
from tests.cli.fake import wiring
from tests.gguf_models import write_model

TEXT = "the theory in the thing and a thin other " * 40
DEVICE = {
    "name": "attic",
    "memory_bytes": 1 << 30,
    "weight_speeds": {"F32": 5e9, "Q8_0": 5e9},
    "prefill_speeds": {"F32": 5e10, "Q8_0": 5e10},
    "memory_bandwidth": 1e10,
    "disk_sequential": 1e9,
    "disk_random": 1e8,
    "gpu_name": "",
    "gpu_memory_bytes": 0,
    "gpu_speed": 0.0,
    "n_threads": 2,
    "system": "Linux",
    "measured_at": 0.0,
    "version": "0",
    "notes": [],
}


@pytest.fixture
def text(home: Path) -> str:
    (home / "text.txt").write_text(TEXT)
    return "text.txt"


def run(capsys: pytest.CaptureFixture[str], *args: object, wired: Wiring | None = None) -> tuple[int, str, str]:
    code = main(["quant", *map(str, args)], wired)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_a_file_against_itself_and_against_its_own_4_bit_cache(tiny_model, text, capsys):
    common = ("measure", tiny_model, tiny_model, "--text", text, "--context", 64, "--threads", 1)
    code, printed, _ = run(capsys, *common, "--json")
    found = json.loads(printed)
    assert code == ExitCode.OK
    assert found["drift"]["divergence"] == {"value": 0, "error": 0}
    assert found["drift"]["same_top"]["value"] == 1
    assert found["candidate"]["bits_per_weight"] == 32
    code, printed, _ = run(capsys, *common, "--cache-type-candidate", "q4_0", "--tokens", 200, "--out", "q4.json")
    written = json.loads(Path("q4.json").read_text())
    assert written["drift"]["divergence"]["value"] > 0
    assert written["drift"]["n_chunks"] == 3
    assert (written["reference"]["cache_type"], written["candidate"]["cache_type"]) == ("f16", "q4_0")
    assert "KL divergence" in printed


def test_traces_are_results_of_solve(tiny_model, home, capsys):
    (home / "results.jsonl").write_text(json.dumps({"thinking": TEXT, "text": "\\boxed{7}"}) + "\n")
    code, printed, _ = run(
        capsys, "measure", tiny_model, tiny_model, "--traces", "results.jsonl", "--context", 64, "--json"
    )
    assert code == ExitCode.OK
    assert json.loads(printed)["on"]["kind"] == "traces"


def test_problems_are_solved_by_both_with_the_same_seed(tiny_model, problems, capsys):
    models = []
    name = problems("one", "two", "this is too long")
    args = ("measure", tiny_model, tiny_model, "--problems", name, "--seed", 3, "--json")
    code, printed, _ = run(capsys, *args, wired=wiring(models))
    found = json.loads(printed)
    assert code == ExitCode.OK
    assert [one.asked for one in models] == [[], ["p0", "p1", "p2"], ["p0", "p1", "p2"]]  # the candidate is tried first
    assert (found["problems"]["n_problems"], found["problems"]["n_failed"]) == (2, 1)
    bound = 1 - 0.025**0.5  # of two problems on which both are right
    assert found["problems"]["accuracy"] == pytest.approx({"mean": 0, "low": -bound, "high": bound})
    assert found["on_problems"]["recipe"]["seed"] == 3


def test_what_is_read_is_not_written_over(tiny_model, text, home, capsys):
    copy = home / "copy.gguf"
    copy.write_bytes(tiny_model.read_bytes())
    for out in (copy, home / text):
        before = out.read_bytes()
        code, _, errors = run(capsys, "measure", tiny_model, copy, "--text", text, "--context", 64, "--out", out)
        assert (code, out.read_bytes()) == (ExitCode.OUTPUT, before)
        assert "is what is read" in errors


def test_a_result_is_printed_where_it_cannot_be_written(tiny_model, text, home, capsys, monkeypatch):
    out = home / "result.json"
    out.write_text("an earlier result")

    def full(path: Path, *_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    arguments = ("measure", tiny_model, tiny_model, "--text", text, "--context", 64, "--out", out)
    code, printed, errors = run(capsys, *arguments, "--json")
    assert code == ExitCode.OUTPUT
    assert json.loads(printed)["drift"]["divergence"]["value"] == 0
    assert "No space left" in errors
    assert out.read_text() == "an earlier result"


def test_everything_is_read_before_anything_is_measured(tiny_model, text, capsys):
    args = ("measure", tiny_model, tiny_model, "--text", text, "--context", 64, "--problems", "none.jsonl")
    code, printed, told = run(capsys, *args, "--out", "out.json")
    assert (code, printed) == (ExitCode.INPUT, "")
    assert "none.jsonl" in told
    assert not Path("out.json").exists()


def test_problems_that_were_solved_are_kept_beside_the_result(tiny_model, problems, home, capsys):
    name, models = problems("one", "press once", "three"), []
    args = ("measure", tiny_model, tiny_model, "--problems", name, "--parallel", 1, "--cache-type-candidate", "q8_0")
    code, _, said = run(capsys, *args, wired=wiring())
    assert code == ExitCode.INTERRUPTED
    assert "what was solved is not kept without --out" in said

    code, _, said = run(capsys, *args, "--out", "out.json", wired=wiring(models))
    assert code == ExitCode.INTERRUPTED
    assert "the same command goes on from here" in said
    assert [json.loads(line)["id"] for file in home.glob("out.*.jsonl") for line in file.read_text().splitlines()] == [
        "p0"
    ]

    (home / name).write_text((home / name).read_text().replace("press once", "two"))
    models.clear()
    assert run(capsys, *args, "--out", "out.json", wired=wiring(models))[0] == ExitCode.OK
    assert [one.asked for one in models] == [[], ["p1", "p2"], ["p0", "p1", "p2"]]
    models.clear()
    assert run(capsys, *args, "--out", "out.json", "--seed", 4, wired=wiring(models))[0] == ExitCode.OK
    assert [len(one.asked) for one in models] == [0, 3, 3], "another recipe has rows of its own"
    assert json.loads((home / "out.json").read_text())["problems"]["n_problems"] == 3
    assert len(list(home.glob("out.*.jsonl"))) == 4


def test_what_is_measured_is_written_although_a_later_part_fails(tiny_model, text, problems, capsys):
    args = ("--text", text, "--context", 64, "--problems", problems("this is too long"), "--out", "out.json", "--json")
    code, printed, _ = run(capsys, "measure", tiny_model, tiny_model, *args, wired=wiring([]))
    assert (code, printed) == (ExitCode.INPUT, "")
    written = json.loads(Path("out.json").read_text())
    assert written["drift"]["n_chunks"] > 0
    assert written["problems"] is None


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        ((), ExitCode.USAGE, "--text"),
        (("--text", "text.txt", "--traces", "text.txt"), ExitCode.USAGE, "one of --text and --traces"),
        (("--text", "none.txt"), ExitCode.INPUT, "there is no file none.txt"),
        (("--text", "."), ExitCode.INPUT, "cannot be read"),
        (("--text", "binary"), ExitCode.INPUT, "not UTF-8 at byte 3"),
        (("--text", "blank"), ExitCode.INPUT, "is empty"),
        (("--text", "short"), ExitCode.INPUT, "does not fill one chunk: 5 tokens"),
        (("--text", "text.txt", "--context", 1024), ExitCode.INPUT, "not fill|above the 512"),
        (("--text", "text.txt", "--cache-type-candidate", "q2"), ExitCode.USAGE, "choose one of"),
        (("--text", "text.txt", "--out", "no/where.json"), ExitCode.OUTPUT, "no such folder"),
        (("--traces", "text.txt"), ExitCode.INPUT, "line 1 is not a result"),
        (("--problems", "none.jsonl"), ExitCode.INPUT, "there is no file none.jsonl; check its name"),
        (("--text", "text.txt", "--limit", 3), ExitCode.USAGE, "--problems"),
        (("--text", "text.txt", "--cache-type-candidate", "q3"), ExitCode.USAGE, "--cache-type-candidate"),
    ],
)
def test_mistakes_are_sentences(tiny_model, text, home, capsys, args, code, reason):
    (home / "binary").write_bytes(b"ab\xff\xfe")
    (home / "blank").write_text("\n \n")
    (home / "short").write_text("short")
    found, _, told = run(capsys, "measure", tiny_model, tiny_model, *args)
    assert found == code, told
    assert any(part in told for part in reason.split("|"))
    assert "bug" not in told


def test_other_vocabularies_and_files_that_are_no_models_are_refused(tiny_model, text, home, capsys):
    (home / "other.gguf").write_bytes(Path(tiny_model).read_bytes().replace(b"<think>", b"<thank>"))
    code, _, told = run(capsys, "measure", tiny_model, "other.gguf", "--text", text, "--context", 64)
    assert code == ExitCode.MODEL
    assert "token 258 is '<thank>' and not '<think>'" in told
    (home / "page.gguf").write_text("<!doctype html>")
    code, _, told = run(capsys, "measure", tiny_model, "page.gguf", "--text", text)
    assert code == ExitCode.MODEL
    assert "not a GGUF" in told


def test_weights_that_are_no_numbers_are_reported(tiny_model, text, home, capsys):
    data = bytearray(Path(tiny_model).read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # the last weight of the last tensor
    (home / "broken.gguf").write_bytes(data)
    code, _, told = run(capsys, "measure", tiny_model, "broken.gguf", "--text", text, "--context", 64)
    assert code == ExitCode.MODEL
    assert "broken.gguf gives" in told


def test_choose_takes_measured_results_and_says_why(tiny_model, text, home, capsys):
    write_model(home / "deep.gguf", n_layers=9)
    run(capsys, "measure", tiny_model, "deep.gguf", "--text", text, "--context", 64, "--out", "m.json")
    code, printed, _ = run(capsys, "choose", tiny_model, "deep.gguf", "--context", 512, "--measured", "m.json")
    assert code == ExitCode.OK
    lines = printed.splitlines()
    assert lines[0].startswith("Take deep.gguf with 512 tokens of context and a f16 cache")
    assert "a larger model comes before more bits, so before tiny.gguf" in lines[1]
    assert lines[2].startswith("Measured here: KL ")
    assert "to tiny.gguf" in lines[2]


@pytest.mark.parametrize("n_part_tensors", [0, 8])
def test_choose_for_a_described_cluster_expects_seconds(home, capsys, n_part_tensors):
    model = write_model(home / "m.gguf", n_part_tensors=n_part_tensors)
    (home / "home.json").write_text(json.dumps({"devices": [DEVICE, {**DEVICE, "name": "cellar"}]}))
    code, printed, _ = run(capsys, "choose", model, "--devices", "home.json", "--context", 512, "--json")
    assert code == ExitCode.OK
    [option] = json.loads(printed)["options"]
    assert option["verdict"] == "fits"
    assert option["token_seconds"] > 0


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        ((), ExitCode.MODEL, "no models on this machine"),
        (("gone.gguf",), ExitCode.MODEL, "gone.gguf"),
        (("text.txt",), ExitCode.MODEL, "not a GGUF"),
        (("tiny", "--measured", "none.json"), ExitCode.INPUT, "none.json cannot be read"),
        (("tiny", "--measured", "text.txt"), ExitCode.INPUT, "not a result"),
        (("tiny", "--devices", "text.txt"), ExitCode.INPUT, "does not describe machines"),
    ],
)
def test_mistakes_in_choosing_are_sentences(tiny_model, text, capsys, args, code, reason):
    found, _, told = run(capsys, "choose", *(tiny_model if arg == "tiny" else arg for arg in args))
    assert found == code, told
    assert reason in told
    assert "bug" not in told


@pytest.mark.parametrize(
    ("args", "seen"),
    [
        ("measure tiny.gguf tiny.gguf --context 16 --text long.txt --json --out o", b"chunks"),
        ("imatrix tiny.gguf -o o --from long.txt", b"tokens"),
    ],
)
def test_what_was_read_before_ctrl_c_is_written(tiny_model, home, args, seen):
    (home / "tiny.gguf").write_bytes(tiny_model.read_bytes())
    (home / "long.txt").write_text("In the beginning there was the word. " * 4000)
    parent, child = pty.openpty()
    command = [sys.executable, "-c", "from localreason.cli.main import run; run()", "quant", *args.split()]
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=child, cwd=home, env=environment) as process:
        os.close(child)
        told = b""
        while seen not in told:
            told += os.read(parent, 1024)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(parent, 1024):
                told += data
        printed = process.stdout.read()
    os.close(parent)
    assert process.returncode == ExitCode.INTERRUPTED
    assert b"interrupted: " in told
    if args.startswith("measure"):
        assert json.loads(printed) == json.loads((home / "o").read_text())
        assert 0 < json.loads(printed)["drift"]["n_chunks"] < 4000 * 37 // 16
    else:
        assert read_importance(home / "o").entries
