"""Graders on what models write, and on what would be code if anybody evaluated it."""

import json
import time
from pathlib import Path

import pytest

from localreason.cli.evaluation.graders import Grade, Reply, find_grader
from localreason.cli.evaluation.judge import Judge
from localreason.runtime.errors import InputError


def grade(name: str, text: str, gold: str) -> Grade:
    return find_grader(name).grade(Reply("", text, gold))


@pytest.mark.parametrize(
    ("name", "text", "gold", "answer", "is_correct"),
    [
        ("math", "so \\boxed{\\frac{1}{2}}", "0.5", "\\frac{1}{2}", True),
        ("math", "first \\boxed{3}, no: \\boxed{4}", "4", "4", True),
        ("math", "there are 12 left", "12", None, False),
        ("math", "", "12", None, False),
        ("math", "\\boxed{}", "12", None, False),
        ("math", "\\boxed{025}", "25", "025", True),
        (
            "math",
            "\\boxed{__import__('os').system('touch owned')}",
            "1",
            "__import__('os').system('touch owned')",
            False,
        ),
        ("number", "there are 1,234 apples, or so.", "1234", "1,234", True),
        ("number", "\\boxed{5} of 12", "5", "5", True),
        ("number", "They read pages 3-7", "7", "7", True),
        ("number", "They read pages (3)-7", "7", "7", True),
        ("number", "It fell from 3 to -7.", "-7", "-7", True),
        ("number", "It fell to −7", "-7", "−7", True),
        ("number", "Final Answer: 3\\sqrt{2}", "3", "3\\sqrt{2}", False),
        ("number", "none at all", "0", None, False),
        ("exact", "Thinking.\n\n Paris \n", "Paris", "Paris", True),
        ("exact", "paris", "Paris", "paris", False),
        ("exact", " \n", "Paris", None, False),
        ("choice", "It is \\boxed{\\text{(B)}}", "B", "B", True),
        ("choice", "Answer: C", "C", "C", True),
        ("choice", "\\boxed{B. 42}", "B", "B", True),
        ("choice", "\\boxed{42}", "B", None, False),
        ("choice", "A or B, who knows", "A", None, False),
        ("choice", "The correct answer is B.", "b", "B", True),
        ("choice", "The answer is B because it is red.", "B", "B", True),
        ("choice", "Answer: B) 42", "B", "B", True),
        ("choice", "The answer is (C) Mitochondria.", "C", "C", True),
        ("choice", "The answer is option B, not A.", "B", "B", True),
        ("choice", "Final Answer: B or C", "B", None, False),
        ("choice", "**B**", "B", "B", True),
        ("choice", "B. 42.5", "B", "B", True),
        ("choice", "(B) A red fox, perhaps.", "B", "B", True),
        ("choice", "A. I first thought so. Then I saw it is wrong.", "A", None, False),
        ("choice", "A. Perhaps,\nand perhaps not", "A", None, False),
        ("choice", "A: not; the right one is C", "A", None, False),
        ("choice", "A. No, (A) is wrong", "A", None, False),
        ("choice", "A good question", "A", None, False),
        ("regex:x=(\\d+)", "x=1, then x=22", "22", "22", True),
        ("regex:yes|no", "no, yes", "yes", "yes", True),
        ("regex:x=(\\d+)?", "x=", "22", None, False),
        ("regex:q", "x=1", "22", None, False),
    ],
)
def test_replies_are_read_and_compared(
    name: str, text: str, gold: str, answer: str | None, is_correct: bool, home: Path
):
    assert grade(name, text, gold) == Grade(answer, is_correct)
    assert not (home / "owned").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("maths", "there is no grader 'maths'"),
        ("regex:(", "no regular expression"),
        ("python:nowhere_to_be_found:f", "cannot be imported"),
        ("python:json", "cannot be imported"),
        ("python:json:__doc__", "no function"),
    ],
)
def test_a_grader_that_is_none_is_refused(name: str, words: str):
    with pytest.raises(InputError, match=words):
        find_grader(name)


def test_gold_answers_that_do_not_parse_are_told():
    assert find_grader("math").check("\\frac{1}{2}") is None
    assert "compared as text" in str(find_grader("math").check("{{{\\frac"))
    assert "no letter" in str(find_grader("choice").check("42"))
    assert find_grader("choice").check("b") is None
    assert find_grader("choice").is_fatal


def test_a_function_of_ones_own_grades_behind_a_deadline(home: Path, monkeypatch: pytest.MonkeyPatch):
    (home / "mine.py").write_text(
        "import time\n"
        "def f(problem, reply, gold):\n"
        "    if reply == 'slow':\n"
        "        time.sleep(3600)\n"
        "    if reply == 'bad':\n"
        "        raise ValueError('no such thing')\n"
        "    return len(reply) == int(gold)\n"
    )
    monkeypatch.syspath_prepend(str(home))
    with Judge("python:mine:f", seconds=1.0) as judge:
        assert judge.grade(Reply("", "abc", "3")).is_correct
        started = time.monotonic()
        verdict = judge.grade(Reply("", "slow", "3"))
        assert (verdict.is_correct, verdict.problem) == (False, "grading took more than 1 s")
        assert time.monotonic() - started < 60
        with pytest.raises(InputError, match="raised ValueError: no such thing"):
            judge.grade(Reply("", "bad", "3"))
        assert judge.grade(Reply("", "abc", "3")).is_correct  # it goes on behind both


def test_a_judge_of_an_unknown_grader_is_refused():
    with pytest.raises(InputError, match="there is no grader"):
        Judge("maths")


def test_a_pattern_that_explodes_ends_at_the_deadline():
    with Judge("regex:(a+)+b", seconds=0.5) as judge:
        assert judge.grade(Reply("", "a" * 60, json.dumps("x"))).problem == "grading took more than 0.5 s"
