"""`localreason trace`: the steps of one reply, and what it says where there are none."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from localreason.cli.evaluation.trace import Recorder
from localreason.cli.main import ExitCode, main
from localreason.runtime.events import Noted, Token
from localreason.runtime.sequence import Origin, Phase, Sequence
from tests.cli.evaluation.samples import row, write
from tests.cli.fake import wiring

STEPS = [
    [0, "token", "So \x1b[31m", "think", "sampled"],
    [0, "note", "budget", "thinking cut"],
    [0, "token", "</think>", "think", "forced"],
    [0, "token", "make it", "think", "hint"],
    [0, "token", " short", "think", "hint"],
    [1, "token", "other", "answer", "sampled"],
    [0, "token", "[bold]7", "answer", "sampled"],
]


@pytest.fixture
def results(home: Path) -> str:
    return write(home / "r.jsonl", [row("p0", trace=STEPS), row("p1"), row("p0", False, repeat=1, trace=STEPS)])


def test_what_each_control_did_stands_in_its_place(results: str, capsys: pytest.CaptureFixture[str]):
    assert main(["trace", results, "p0"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert "So \n[budget: thinking cut]\n«</think>»‹hint: make it short›[bold]7\n" in out
    assert out.startswith("the problem p0\n")
    assert out.endswith("right; the right answer is 7\n")
    assert main(["trace", results, "p0", "--tokens", "--repeat", "1"]) == ExitCode.OK
    assert "make it· short" in capsys.readouterr().out


def test_another_sample_and_json(results: str, capsys: pytest.CaptureFixture[str]):
    assert main(["trace", results, "p0", "--sample", "1", "--json"]) == ExitCode.OK
    assert json.loads(capsys.readouterr().out) == [["token", "other", "answer", "sampled"]]


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("p9",), "has no problem 'p9'; it has p0, p1"),
        (("p0", "--repeat", "2"), "has no repeat 2 of 'p0'; it has 0, 1"),
        (("p9", "--repeat", "2"), "has no problem 'p9'; it has p0, p1"),
        (("p1",), "has no steps of 'p1'; run it again with --trace"),
        (("p0", "--sample", "7"), "has no sample 7; it has 0, 1"),
    ],
)
def test_what_is_not_there_is_told(
    results: str, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], reason: str
):
    assert main(["trace", results, *args]) == ExitCode.INPUT
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("content", ["my notes\n", '{"schema": 9}\n', "{}\n"])
def test_a_file_that_holds_no_results_is_a_mistake_of_the_input(
    home: Path, capsys: pytest.CaptureFixture[str], content: str
):
    (home / "notes.txt").write_text(content)
    assert main(["trace", "notes.txt", "p0"]) == ExitCode.INPUT
    assert "give a results file" in capsys.readouterr().err


def test_solve_keeps_the_steps_where_it_is_asked_to(
    model: str, problems: Callable[..., str], capsys: pytest.CaptureFixture[str]
):
    assert main(["solve", problems("one"), "--model", model, "-o", "out.jsonl", "--trace"], wiring()) == ExitCode.OK
    capsys.readouterr()
    assert main(["trace", "out.jsonl", "p0"]) == ExitCode.OK
    assert "Let me think.\n[budget: thinking cut after 3 tokens]\nIt is [bold]7[/bold]." in capsys.readouterr().out


def test_hidden_text_is_recorded_apart_and_across_tokens():
    pieces = {1: b"\xc3", 2: b"\xa4", 3: b"x"}
    recorder = Recorder(pieces.__getitem__)
    sequence = Sequence([], id="a")
    for token, origin in ((1, Origin.HINT), (3, Origin.SAMPLED), (2, Origin.HINT)):
        recorder.add(Token(sequence, token, "", Phase.THINK, origin))
    recorder.add(Token(sequence, 3, "more", Phase.THINK, Origin.SAMPLED, is_continued=True))
    recorder.add(Noted(sequence, "hint", "put in"))
    assert recorder.take("a") == [
        [0, "token", "", "think", "hint"],
        [0, "token", "x", "think", "sampled"],
        [0, "token", "ä", "think", "hint"],
        [0, "note", "hint", "put in"],
    ]
    assert recorder.take("a") == []
