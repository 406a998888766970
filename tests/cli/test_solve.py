"""`localreason solve` with a scripted model: what is shown, what is saved, how it ends, how it goes on."""

import errno
import io
import json
import math
import os
import pty
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest

from localreason.cli.main import ExitCode, main
from localreason.cli.render import Stream
from localreason.cli.results import Results, Row, problem_hash
from localreason.cli.say import tell
from localreason.runtime.errors import OutputError
from tests.cli.conftest import rows
from tests.cli.fake import FakeModel, wiring
from tests.cluster.processes import RUN

Start = Callable[..., "subprocess.Popen[str]"]
Problems = Callable[..., str]


def solve(*args: str, models: list[FakeModel] | None = None) -> int:
    return main(["solve", *args], wiring(models))


def test_a_question_streams_thinking_then_answer_without_markup_or_escapes(
    model: str, capfd: pytest.CaptureFixture[str]
):
    assert solve("What is 3 + 4?", "--model", model) == ExitCode.OK
    out, err = capfd.readouterr()
    assert out == "Let me think.\n\nIt is [bold]7[/bold].\n"
    assert "[budget: thinking cut after 3 tokens]" in err
    assert "stopped: end; answer: 7" in err
    assert "3 prompt, 3 thinking, 2 answer" in err
    assert "ignored 2" in err


def test_quiet_leaves_the_answer_only(model: str, capfd: pytest.CaptureFixture[str]):
    assert solve("What is 3 + 4?", "--model", model, "--quiet") == ExitCode.OK
    assert capfd.readouterr() == ("It is [bold]7[/bold].\n", "")


def test_json_of_a_question_is_one_row_of_the_schema(model: str, capfd: pytest.CaptureFixture[str]):
    assert solve("What is 3 + 4?", "--model", model, "--json", "--seed", "5") == ExitCode.OK
    row = json.loads(capfd.readouterr().out)
    assert list(row) == [item.name for item in fields(Row)]
    assert (row["answer"], row["seed"], row["correct"], row["schema"]) == ("7", 5, None, 1)


def test_ctrl_c_asks_for_the_answer_now(model: str, capfd: pytest.CaptureFixture[str]):
    models: list[FakeModel] = []
    assert solve("press once", "--model", model, models=models) == ExitCode.OK
    assert models[0].is_hurried
    assert "It is" in capfd.readouterr().out


def test_ctrl_c_again_stops(model: str, capfd: pytest.CaptureFixture[str]):
    assert solve("press twice", "--model", model) == ExitCode.INTERRUPTED
    assert "It is" not in capfd.readouterr().out


def test_ctrl_c_stops_at_once_where_no_budget_can_cut(model: str):
    assert solve("press once", "--model", model, "--preset", "none") == ExitCode.INTERRUPTED


def test_a_file_gives_a_row_for_each_problem(model: str, problems: Problems, capfd: pytest.CaptureFixture[str]):
    models: list[FakeModel] = []
    name = problems("one", "two")
    assert solve(name, "--model", model, "--parallel", "2", "-c", "search:n=3", models=models) == ExitCode.OK
    row = rows("problems.results.jsonl")[0]
    assert row["problem_hash"] == problem_hash("one")
    assert row["correct"] is True
    assert row["tokens"] == {"prompt": 3, "thinking": 3, "answer": 2, "forced": 0, "hint": 0, "probe": 0}
    assert (row["ignored_ends"], row["suppressed_steps"], row["error"]) == (2, 5, None)
    assert models[0].options.n_sequences >= 6
    out = capfd.readouterr().out
    assert "p0  right  7" in out
    assert "2/2 right (100%)" in out


def test_a_dash_for_the_results_is_standard_output(model: str, problems: Problems, capfd: pytest.CaptureFixture[str]):
    assert solve(problems("one"), "--model", model, "-o", "-") == ExitCode.OK
    assert json.loads(capfd.readouterr().out)["id"] == "p0"
    assert not Path("-").exists()


def test_a_wrong_answer_is_graded_wrong_and_an_unknown_one_not_at_all(model: str, problems: Problems):
    assert solve(problems("one", answer="8"), "--model", model) == ExitCode.OK
    assert solve(problems("one", answer=None, name="other.jsonl"), "--model", model) == ExitCode.OK
    assert rows("problems.results.jsonl")[0]["correct"] is False
    assert rows("other.results.jsonl")[0]["correct"] is None


def test_a_failed_problem_is_reported_and_tried_again_later(model: str, problems: Problems):
    name = problems("one", "too long", "three")
    assert solve(name, "--model", model) == ExitCode.SOME_FAILED
    assert "9000 tokens" in str(rows("problems.results.jsonl")[1]["error"])
    models: list[FakeModel] = []
    assert solve(name, "--model", model, models=models) == ExitCode.SOME_FAILED
    assert models[0].asked == ["p1"]
    assert sorted(str(row["id"]) for row in rows("problems.results.jsonl")) == ["p0", "p1", "p2"]


def test_a_killed_run_goes_on_with_no_row_lost_and_none_twice(model: str, problems: Problems, start: Start):
    name = problems("one", "two", "wait here", "four")
    with start("solve", name, "--model", model, "-o", "out.jsonl", "--quiet") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "READY\n"
        process.kill()
    with Path("out.jsonl").open("a") as file:
        file.write('{"schema": 1, "id": "p2", "probl')
    models: list[FakeModel] = []
    with start("solve", name, "--model", model, "-o", "out.jsonl") as process:
        out, _ = process.communicate("\n")
    assert process.returncode == ExitCode.OK
    assert "already there      2" in out
    assert [row["id"] for row in rows("out.jsonl")] == ["p0", "p1", "p2", "p3"]
    assert solve(name, "--model", model, "-o", "out.jsonl", models=models) == ExitCode.OK
    assert models == []


def test_ctrl_c_in_a_file_saves_and_says_how_to_go_on(
    model: str, problems: Problems, capfd: pytest.CaptureFixture[str]
):
    name = problems("one", "press once", "three")
    assert solve(name, "--model", model, "-o", "out.jsonl") == ExitCode.INTERRUPTED
    assert "1 rows are saved in out.jsonl, 2 are left" in capfd.readouterr().err
    assert [row["id"] for row in rows("out.jsonl")] == ["p0"]
    assert not Path("out.jsonl.lock").exists()


def test_two_writers_of_one_file_are_refused(
    model: str, problems: Problems, start: Start, capfd: pytest.CaptureFixture[str]
):
    name = problems("wait here")
    with start("solve", name, "--model", model, "-o", "out.jsonl") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "READY\n"
        assert solve(name, "--model", model, "-o", "out.jsonl") == ExitCode.OUTPUT
        assert "another run is writing out.jsonl" in capfd.readouterr().err
        process.communicate("\n")
    assert process.returncode == ExitCode.OK


def test_another_recipe_is_refused_by_name_unless_forced(
    model: str, problems: Problems, capfd: pytest.CaptureFixture[str]
):
    name = problems("one")
    assert solve(name, "--model", model) == ExitCode.OK
    assert solve(name, "--model", model, "-c", "budget:max=5") == ExitCode.OUTPUT
    assert "max was 4096 and is now 5" in capfd.readouterr().err
    models: list[FakeModel] = []
    assert solve(name, "--model", model, "-c", "budget:max=5", "--force", models=models) == ExitCode.OK
    assert models == []  # a row of solve tells its own recipe, and is kept


def test_another_cache_type_is_another_recipe(model: str, problems: Problems, capfd: pytest.CaptureFixture[str]):
    name = problems("one")
    assert solve(name, "--model", model) == ExitCode.OK
    assert solve(name, "--model", model, "--cache-type", "q8_0") == ExitCode.OUTPUT
    assert "q8_0" in capfd.readouterr().err


def test_a_link_to_a_results_file_stays_one(model: str, problems: Problems):
    name = problems("one", "two")
    assert solve(name, "--model", model, "-o", "out.jsonl") == ExitCode.OK
    twice = Path("out.jsonl").read_text() * 2
    Path("out.jsonl").write_text(twice)
    Path("link.jsonl").symlink_to("out.jsonl")
    assert solve(name, "--model", model, "-o", "link.jsonl") == ExitCode.OK
    assert Path("link.jsonl").is_symlink()
    assert len(rows("out.jsonl")) == 2


def test_a_closed_standard_input_is_told(
    model: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "stdin", None)
    assert solve("-", "--model", model) == ExitCode.INPUT
    assert "standard input is closed" in capfd.readouterr().err


def test_another_model_is_refused(model: str, problems: Problems, capfd: pytest.CaptureFixture[str]):
    name = problems("one")
    assert solve(name, "--model", model) == ExitCode.OK
    Path(model).write_bytes(b"GGUF of another kind")
    assert solve(name, "--model", model) == ExitCode.OUTPUT
    assert "of the model fake" in capfd.readouterr().err


def test_a_changed_problem_is_refused_and_redone_by_force(model: str, problems: Problems):
    assert solve(problems("one"), "--model", model) == ExitCode.OK
    assert solve(problems("uno"), "--model", model) == ExitCode.OUTPUT
    assert solve(problems("uno"), "--model", model, "--force") == ExitCode.OK
    assert [row["problem_hash"] for row in rows("problems.results.jsonl")] == [problem_hash("uno")]


def test_a_changed_right_answer_is_refused_and_graded_anew_by_force(
    model: str, problems: Problems, capfd: pytest.CaptureFixture[str]
):
    assert solve(problems("one"), "--model", model) == ExitCode.OK
    assert solve(problems("one", answer="8"), "--model", model) == ExitCode.OUTPUT
    assert "the right answer of problem 'p0' has changed" in capfd.readouterr().err
    assert solve(problems("one", answer="8"), "--model", model, "--force") == ExitCode.OK
    assert [row["correct"] for row in rows("problems.results.jsonl")] == [False]


@pytest.mark.parametrize("content", ["my notes\n", "my notes", '{"id": 1}\n', '{"schema": 9}\n', "[1]\n{}\n"])
def test_a_file_that_holds_no_results_is_left_alone(model: str, problems: Problems, content: str):
    Path("out.jsonl").write_text(content)
    assert solve(problems("one"), "--model", model, "-o", "out.jsonl") == ExitCode.OUTPUT
    assert Path("out.jsonl").read_text() == content


@pytest.mark.parametrize("tail", ["{", '{"schema": 1, "id": "p1", "tex', "\0\0\0\0"])
def test_a_half_written_line_is_cut_off(model: str, problems: Problems, tail: str):
    assert solve(problems("one"), "--model", model) == ExitCode.OK
    with Path("problems.results.jsonl").open("a") as file:
        file.write(tail)
    assert solve(problems("one", "two"), "--model", model) == ExitCode.OK
    assert [row["id"] for row in rows("problems.results.jsonl")] == ["p0", "p1"]


def test_a_last_line_without_its_end_is_kept(model: str, problems: Problems):
    assert solve(problems("one"), "--model", model) == ExitCode.OK
    path = Path("problems.results.jsonl")
    path.write_text(path.read_text().rstrip("\n"))
    assert solve(problems("one", "two"), "--model", model) == ExitCode.OK
    assert [row["id"] for row in rows(str(path))] == ["p0", "p1"]


@pytest.mark.parametrize("output", ["no/such/folder/out.jsonl", ".", "/dev/full"])
def test_an_output_that_cannot_be_written_is_an_output_error(model: str, problems: Problems, output: str):
    assert solve(problems("one"), "--model", model, "-o", output) == ExitCode.OUTPUT


def test_what_the_system_refuses_is_an_output_error_with_the_place(
    model: str, problems: Problems, capfd: pytest.CaptureFixture[str]
):
    assert solve(problems("one"), "--model", model, "-o", "x" * 300) == ExitCode.OUTPUT
    assert f"{'x' * 300} cannot be used: File name too long" in capfd.readouterr().err
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*RUN, "config", "show"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == ExitCode.OUTPUT
    assert done.stderr.count("\n") == 1
    assert "standard output cannot be used: No space left on device" in done.stderr


def test_a_full_disk_ends_the_run_and_leaves_whole_rows(model: str, problems: Problems):
    name = problems("one", "two", "three", "four")
    assert solve(name, "--model", model, "-o", "whole.jsonl") == ExitCode.OK
    limit = Path("whole.jsonl").stat().st_size * 5 // 8
    code = (
        "import resource, sys; from tests.cli.fake import commands;"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY})); commands()"
    )
    root = Path(__file__).parents[2]
    arguments = [sys.executable, "-c", code, "solve", name, "--model", model, "-o", "cut.jsonl"]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert done.returncode == ExitCode.OUTPUT
    assert "cut.jsonl cannot be written" in done.stderr
    assert "2 rows are saved" in done.stderr
    assert [row["id"] for row in rows("cut.jsonl")] == ["p0", "p1"]


def test_standard_input_gives_rows_on_standard_output(model: str, start: Start):
    with start("solve", "-", "--model", model) as process:
        out, err = process.communicate('\ufeff{"problem": "one"}\r\n{"problem": "two"}\n')
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["1", "2"]
    assert "solved             2" in err


def test_a_reader_that_goes_away_is_no_error_message(model: str, start: Start):
    with start("solve", "wait here", "--model", model) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "READY\n"
        process.stdout.close()
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert "rror" not in process.stderr.read().replace("localreason:", "")


def test_interrupt_signal_in_a_process_of_its_own_exits_130(model: str, problems: Problems, start: Start):
    with start("solve", problems("wait here", "two"), "--model", model) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "READY\n"
        process.send_signal(signal.SIGINT)
        process.communicate("\n")
    assert process.returncode == ExitCode.INTERRUPTED


def test_a_terminal_sees_thinking_dimmed_and_no_escape_of_the_model(model: str):
    root = Path(__file__).parents[2]
    parent, child = pty.openpty()
    arguments = [sys.executable, str(root / "tests/cli/fake.py"), "solve", "x", "--model", model]
    environment = {**os.environ, "PYTHONPATH": str(root), "TERM": "xterm"}
    with subprocess.Popen(arguments, stdout=child, stderr=subprocess.PIPE, env=environment) as process:
        process.communicate()
    os.close(child)
    shown = os.read(parent, 10_000).decode()
    os.close(parent)
    assert "\x1b[2mLet me \x1b[0m" in shown
    assert "\x1b[31m" not in shown
    assert "\x1b[2;3m[budget: thinking cut after 3 tokens]" in shown
    assert "It is [bold]7[/bold]." in shown


def test_a_disk_that_fails_at_a_sync_is_said_of_the_results(home: Path, monkeypatch: pytest.MonkeyPatch):
    def fail(file: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    results = Results(home / "r.jsonl", [], {}, {})
    results._is_dirty, results._synced = True, -math.inf
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        with pytest.raises(OutputError, match=r"r\.jsonl cannot be written: .*quota"):
            results.tick()
    results.close()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_what_is_told_in_the_middle_of_a_reply_has_a_line_of_its_own(monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal)
    stream = Stream()
    stream.write("Tom has", "answer")
    tell("attic is lost")
    tell("going on without attic")
    stream.write(" 12 apples.\n", "answer")
    tell("done")
    told = [f"localreason: {text}\n" for text in ("attic is lost", "going on without attic", "done")]
    assert terminal.getvalue() == f"Tom has\n{told[0]}{told[1]} 12 apples.\n{told[2]}"
