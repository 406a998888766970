"""`localreason eval` with a scripted model: what is saved, how it goes on, what is refused."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from localreason.cli import config
from localreason.cli.evaluation.configuration import make_configurations
from localreason.cli.evaluation.run import Plan
from localreason.cli.evaluation.run import run as run_plan
from localreason.cli.evaluation.tasks import Loaded
from localreason.cli.main import ExitCode, main
from localreason.cli.problems import Problem
from tests.cli.conftest import rows
from tests.cli.fake import FakeModel, wiring
from tests.gguf_models import TEMPLATE, write_model

Start = Callable[..., "subprocess.Popen[str]"]
Problems = Callable[..., str]


def run(*args: str, models: list[FakeModel] | None = None) -> int:
    return main(["eval", *args], wiring(models))


def keys(path: str) -> list[tuple[object, object, object]]:
    return [(row["id"], row["repeat"], row["seed"]) for row in rows(path)[1:]]


def test_each_configuration_gets_the_same_problems_and_seeds(
    model: str, problems: Problems, capfd: pytest.CaptureFixture[str]
):
    name = problems("one", "two")
    models: list[FakeModel] = []
    args = (
        "--model",
        model,
        "-p",
        "safe",
        "--config",
        "short=safe+budget:max=9+search:n=3,m=2",
        "-k",
        "2",
        "--seed",
        "5",
    )
    assert run(name, *args, models=models) == ExitCode.OK
    assert keys("problems.eval/safe.jsonl") == [("p0", 0, 5), ("p1", 0, 5), ("p0", 1, 69), ("p1", 1, 69)]
    assert keys("problems.eval/short.jsonl") == keys("problems.eval/safe.jsonl")
    header = rows("problems.eval/short.jsonl")[0]["header"]
    assert header["recipe"]["controls"][0]["max"] == 9
    assert header["recipe"]["controls"][1]["n"] == 3
    assert header["seeds"] == {"first": 5, "step": 64}
    assert len(header["model"]["sha256"]) == len(header["task"]["sha256"]) == 64
    assert "llama-cpp-python" in header["versions"]
    assert models[0].options.n_sequences >= 6
    row = rows("problems.eval/safe.jsonl")[1]
    assert (row["correct"], row["problem"], row["gold"], row["trace"]) == (False, "one", "7", None)
    assert "accuracy" in capfd.readouterr().out


def test_the_reply_is_graded_not_what_the_runtime_read(model: str, problems: Problems):
    # The fake writes "It is [bold]7[/bold]." and says that its answer is 7; no formula is marked there.
    assert run(problems("one"), "--model", model, "--grader", "number", "-q") == ExitCode.OK
    row = rows("problems.eval/safe.jsonl")[1]
    assert (row["answer"], row["correct"]) == ("7", True)


def test_a_killed_evaluation_goes_on_with_no_row_lost_and_none_twice(model: str, problems: Problems, start: Start):
    name = problems("one", "two", "wait here", "four")
    args = ("eval", name, "--model", model, "-p", "safe", "-p", "fast", "--grader", "number", "-q", "-o", "out")
    with start(*args) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        assert process.stdout.readline() == "READY\n"
        process.kill()
    with Path("out/safe.jsonl").open("a") as file:
        file.write('{"schema": 1, "id": "p2", "probl')
    with start(*args) as process:
        process.communicate("\n\n")
    assert process.returncode == ExitCode.OK
    for one in ("safe", "fast"):
        assert keys(f"out/{one}.jsonl") == [(f"p{i}", 0, 0) for i in range(4)]


def test_half_a_header_is_written_anew(model: str, problems: Problems):
    name = problems("one")
    Path("out").mkdir()
    Path("out/safe.jsonl").write_text('{"schema": 1, "header": {"confi')
    assert run(name, "--model", model, "-o", "out", "-q") == ExitCode.OK
    assert list(rows("out/safe.jsonl")[0]) == ["schema", "header"]
    assert keys("out/safe.jsonl") == [("p0", 0, 0)]


def test_more_repeats_and_problems_go_on_where_it_stopped(model: str, problems: Problems):
    name = problems("one", "two")
    assert run(name, "--model", model, "--limit", "1") == ExitCode.OK
    models: list[FakeModel] = []
    assert run(name, "--model", model, "-k", "2", models=models) == ExitCode.OK
    assert models[0].asked == ["p1", "p0", "p1"]


@pytest.mark.parametrize(("args", "n"), [(("--limit", "1", "-k", "2"), "1 (2 rows)"), (("-k", "1"), "2"), ((), "2")])
def test_the_table_is_of_what_was_asked_for_though_the_file_holds_more(
    model: str, problems: Problems, capfd: pytest.CaptureFixture[str], args: tuple[str, ...], n: str
):
    name = problems("one", "two")
    assert run(name, "--model", model, "-k", "2", "-q") == ExitCode.OK
    capfd.readouterr()
    assert run(name, "--model", model, *args, "-q") == ExitCode.OK
    assert f"\nn               {n}\n" in capfd.readouterr().out
    assert len(keys("problems.eval/safe.jsonl")) == 4


def test_ctrl_c_saves_and_says_how_to_go_on(model: str, problems: Problems, capfd: pytest.CaptureFixture[str]):
    name = problems("one", "press once", "three")
    assert run(name, "--model", model, "-o", "out") == ExitCode.INTERRUPTED
    assert "1 rows are saved in out, 2 are left" in capfd.readouterr().err
    assert keys("out/safe.jsonl") == [("p0", 0, 0)]


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("--grader", "exact"), 'grader was "math" and is now "exact"'),
        (("--template", "{problem}?"), 'template was "{problem}"'),
        (("-c", "budget:max=9"), "max was 4096 and is now 9"),
        (("--seed", "3"), "seed was 0 and is now 3"),
    ],
)
def test_results_of_another_evaluation_are_left_alone(
    model: str, problems: Problems, capfd: pytest.CaptureFixture[str], args: tuple[str, ...], reason: str
):
    name = problems("one")
    assert run(name, "--model", model) == ExitCode.OK
    before = Path("problems.eval/safe.jsonl").read_text()
    if "--template" in args:
        assert run(name, "--model", model, *args) == ExitCode.OUTPUT
        assert "the text or the right answer of problem 'p0' has changed" in capfd.readouterr().err
    else:
        assert run(name, "--model", model, *args) == ExitCode.OUTPUT
        assert reason in capfd.readouterr().err
    assert Path("problems.eval/safe.jsonl").read_text() == before
    assert run(name, "--model", model, *args, "--force") == ExitCode.OK


def test_seeds_that_no_file_could_hold_are_refused_before_anything_is_solved(
    model: str, problems: Problems, capfd: pytest.CaptureFixture[str]
):
    models: list[FakeModel] = []
    args = ("--model", model, "-k", "2", "--seed")
    assert run(problems("one"), *args, str(2**63 - 1), models=models) == ExitCode.USAGE
    assert f"give at most {2**63 - 65}" in "".join(capfd.readouterr().err.replace("│", "").split("\n"))
    assert models == []
    assert run(problems("one"), *args, str(2**63 - 65)) == ExitCode.OK


@pytest.mark.parametrize("args", [("--grader", "number"), ("--max-tokens", "25"), ("-c", "budget:max=9")])
def test_force_runs_anew_what_was_run_otherwise(
    model: str, problems: Problems, capfd: pytest.CaptureFixture[str], args: tuple[str, ...]
):
    name = problems("one", "two")
    assert run(name, "--model", model) == ExitCode.OK
    models: list[FakeModel] = []
    assert run(name, "--model", model, *args, "--limit", "1", "--force", models=models) == ExitCode.OK
    assert models[0].asked == ["p0"]
    assert "2 rows of problems.eval/safe.jsonl were of another run" in capfd.readouterr().err
    [header, row] = rows("problems.eval/safe.jsonl")
    assert row["recipe"] == header["header"]["recipe"]
    assert row["correct"] is ("number" in args)


def test_force_runs_anew_what_has_another_right_answer_and_keeps_the_rest(
    model: str, problems: Problems, home: Path, capfd: pytest.CaptureFixture[str]
):
    name = problems("one", "two")
    assert run(name, "--model", model, "--grader", "number") == ExitCode.OK
    lines = (home / name).read_text().splitlines(keepends=True)
    (home / name).write_text("".join([lines[0].replace('"7"', '"8"'), *lines[1:], '{"problem": "x", "answer": 7}\n']))
    assert run(name, "--model", model, "--grader", "number") == ExitCode.OUTPUT
    assert "the text or the right answer of problem 'p0' has changed" in capfd.readouterr().err
    models: list[FakeModel] = []
    assert run(name, "--model", model, "--grader", "number", "--force", models=models) == ExitCode.OK
    assert models[0].asked == ["p0", "3"]
    graded = {row["id"]: (row["gold"], row["correct"]) for row in rows("problems.eval/safe.jsonl")[1:]}
    assert graded == {"p0": ("8", False), "p1": ("7", True), "3": ("7", True)}


def test_results_of_solve_are_not_gone_on_with(model: str, problems: Problems, capfd: pytest.CaptureFixture[str]):
    name = problems("one")
    Path("out").mkdir()
    assert main(["solve", name, "--model", model, "-o", "out/safe.jsonl"], wiring()) == ExitCode.OK
    assert run(name, "--model", model, "-o", "out") == ExitCode.OUTPUT
    assert "a run of `localreason solve`" in capfd.readouterr().err
    assert run(name, "--model", model, "-o", "mine") == ExitCode.OK
    assert main(["solve", name, "--model", model, "-o", "mine/safe.jsonl"], wiring()) == ExitCode.OUTPUT
    assert "results of an evaluation" in capfd.readouterr().err
    assert main(["solve", name, "--model", model, "-o", "mine/safe.jsonl", "--force"], wiring()) == ExitCode.OUTPUT


def test_rows_without_a_gold_answer_and_double_ids_are_told_and_left_out(
    model: str, home: Path, capfd: pytest.CaptureFixture[str]
):
    lines = [{"id": 1, "problem": "a", "answer": "x{"}, {"id": 1, "problem": "b", "answer": 7}, {"problem": "c"}]
    (home / "mine.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("mine.jsonl", "--model", model, "-q") == ExitCode.SOME_FAILED
    err = capfd.readouterr().err
    assert "line 2: the id '1' stands in line 1 already" in err
    assert "line 3: there is no gold answer" in err
    assert "1 gold answers are no formulas and are compared as text: 1 in line 1\n" in err
    assert keys("mine.eval/safe.jsonl") == [("1", 0, 0)]


def test_letters_that_are_none_cannot_be_graded(model: str, problems: Problems, capfd: pytest.CaptureFixture[str]):
    assert run(problems("one"), "--model", model, "--grader", "choice") == ExitCode.INPUT
    assert "none of the 1 rows of problems can be graded" in capfd.readouterr().err


def test_the_terms_of_a_task_are_told_when_it_is_fetched(model: str, capfd: pytest.CaptureFixture[str]):
    settings = config.load({"model": model})
    task = Loaded("sums", "0" * 64, "MIT", "math", [Problem("p0", "one", "7")], [])
    plan = Plan(
        settings,
        wiring(),
        task,
        "math",
        "{problem}",
        make_configurations(settings, ["safe"], (), False),
        1,
        Path("out"),
    )
    for is_new in (True, False):
        assert run_plan(replace(plan, task=replace(task, is_new=is_new))) == ExitCode.OK
        assert ("the task sums was fetched; its terms: MIT" in capfd.readouterr().err) is is_new


def test_choices_are_written_behind_the_question(model: str, home: Path):
    (home / "mine.jsonl").write_text('{"problem": "Which?", "choices": ["red", 7], "answer": "B"}\n')
    assert run("mine.jsonl", "--model", model, "--grader", "choice") == ExitCode.OK
    assert rows("mine.eval/safe.jsonl")[1]["problem"] == "Which?\n\nA. red\nB. 7"


def test_a_problem_that_cannot_be_run_is_told_and_tried_again(model: str, problems: Problems):
    name = problems("one", "too long")
    assert run(name, "--model", model) == ExitCode.SOME_FAILED
    models: list[FakeModel] = []
    assert run(name, "--model", model, models=models) == ExitCode.SOME_FAILED
    assert models[0].asked == ["p1"]


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (("gsm9k",), ExitCode.INPUT, "there is no task or file 'gsm9k'"),
        (("problems.jsonl", "-p", "quick"), ExitCode.USAGE, "there is no preset 'quick'"),
        (("problems.jsonl", "--config", "safe"), ExitCode.USAGE, "is not NAME=PRESET+CONTROL"),
        (("problems.jsonl", "--config", "../x=safe"), ExitCode.USAGE, "is not NAME=PRESET+CONTROL"),
        (("problems.jsonl", "-p", "safe", "-p", "safe"), ExitCode.USAGE, "two configurations are named 'safe'"),
        (("problems.jsonl", "--template", "solve"), ExitCode.USAGE, "write {problem}"),
        (("problems.jsonl", "--grader", "guess"), ExitCode.INPUT, "there is no grader 'guess'"),
        (("problems.jsonl", "-o", "problems.jsonl"), ExitCode.OUTPUT, "problems.jsonl"),
    ],
)
def test_mistakes_are_sentences(
    model: str,
    problems: Problems,
    capfd: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    code: ExitCode,
    reason: str,
):
    problems("one")
    assert run(*args, "--model", model) == code
    err = capfd.readouterr().err
    assert reason in err
    assert "bug" not in err


def test_a_model_without_a_template_ends_the_run_at_once(
    problems: Problems, home: Path, capfd: pytest.CaptureFixture[str]
):
    path = write_model(home / "bare.gguf", values={"tokenizer.chat_template": None})
    args = ["eval", problems("one", "two"), "--model", str(path), "--max-tokens", "8", "--context", "512", "-q"]
    assert main(args) == ExitCode.INPUT
    assert "template" in capfd.readouterr().err
    assert len(rows("problems.eval/safe.jsonl")) == 1


@pytest.fixture
def thinker(home: Path) -> Path:
    """A tiny model that begins in its thinking."""
    thinking = TEMPLATE.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
    return write_model(home / "tiny.gguf", values={"tokenizer.chat_template": thinking})


def test_a_search_counts_what_controls_wrote_into_every_sample(thinker: Path, problems: Problems):
    args = ["--model", str(thinker), "--config", "vote=safe+budget:max=12+search:n=3,rule=majority,guard=no"]
    args += ["--max-tokens", "40", "--context", "2048", "--trace", "-q", "--threads", "1"]
    assert main(["eval", problems("one"), *args]) == ExitCode.OK
    [row] = rows("problems.eval/vote.jsonl")[1:]
    steps = row["trace"]
    assert len({step[0] for step in steps if step[-1] == "forced"}) == 3
    assert row["counters"]["search"]["forced_tokens"] == sum(step[-1] == "forced" for step in steps)
    assert row["counters"]["search"]["forced_tokens"] > row["tokens"]["forced"] > 0


def test_a_real_model_that_goes_on_gives_the_same_rows_and_a_trace(
    thinker: Path, problems: Problems, capfd: pytest.CaptureFixture[str]
):
    name, path = problems("one", "two"), thinker
    args = [name, "--model", str(path), "-p", "safe", "-c", "budget:max=12", "--max-tokens", "40"]
    args += ["--context", "2048", "--trace", "-q", "--threads", "1"]
    assert main(["eval", *args, "-o", "a", "--limit", "1"]) == ExitCode.OK
    for folder in ("a", "b"):
        assert main(["eval", *args, "-o", folder]) == ExitCode.OK
    both = [rows(f"{folder}/safe.jsonl")[1:] for folder in "ab"]
    assert all(row["peak_bytes"] > path.stat().st_size / 2 for each in both for row in each)
    first, second = ([{**row, "seconds": 0, "wall_seconds": 0, "peak_bytes": 0} for row in each] for each in both)
    assert first == second
    steps = first[0]["trace"]
    assert "".join(step[2] for step in steps if step[1] == "token" and step[4] == "forced").count("</think>") == 1
    assert any(step[1] == "note" and step[2] == "budget" for step in steps)
