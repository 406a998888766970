"""What makes a reply right. Nothing that a model writes is ever evaluated as code.

math     the last boxed formula, or what follows a lead such as "Answer:"; compared by value with math-verify
number   as math; where nothing is marked, the last number of the reply (declared: it stands in the results)
exact    the same text, white space around it apart; without a marked answer the last line counts
choice   a letter from A to J; where nothing is marked, the reply has to be the letter, or one line of it and its option
regex:R  the last match of R, its first group where it has one, is the same text
python:M:F  the function F of the module M is given problem, reply and gold and returns true or false
"""

import importlib
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...runtime.answer import extract, is_equal, is_readable, normalise
from ...runtime.errors import InputError

_CHOICE = re.compile(r"\(?([A-J])(?:[).:].*)?", re.DOTALL)
"""`B`, `(B)`, `B. 42`, but not `A or B`."""
_ONLY_CHOICE = re.compile(r"\W*([A-J])\b(?:\W*|[).:*]+ (?!.*(?:\b[B-HJ]\b|\([A-J]\)|[.:;!?]\s)).*)")
"""A line that is a letter, perhaps with its option: with no second sentence and no other letter."""
_NUMBER = re.compile(r"(?:(?<![\d)])[-−])?\$?\d+(?:,\d{3})*(?:\.\d+)?")
"""The dash of a range such as `pages 3-7` is no sign."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What is graded: the visible reply, never the thinking."""

    problem: str
    text: str
    gold: str


@dataclass(frozen=True, slots=True)
class Grade:
    """The answer that was read in a reply, None without one, and whether it is right."""

    answer: str | None
    is_correct: bool


@dataclass(frozen=True, slots=True)
class Grader:
    """Reads and compares answers. `check` says what is wrong with a gold answer, None where nothing is; `is_fatal`
    tells whether its problem cannot be graded at all."""

    grade: Callable[[Reply], Grade]
    check: Callable[[str], str | None] = lambda gold: None
    is_fatal: bool = False


def find_grader(name: str) -> Grader:
    """The grader of that name. Raises InputError."""
    kind, _, rest = name.partition(":")
    if kind == "regex" and rest:
        return _by_pattern(rest)
    if kind == "python" and rest:
        return _by_function(rest)
    if name in _GRADERS:
        return _GRADERS[name]
    raise InputError(
        f"there is no grader {name!r}; give one of {', '.join(_GRADERS)}, regex:PATTERN, python:MODULE:NAME"
    )


def _by(read: Callable[[str], str | None], is_same: Callable[[str, str], bool]) -> Callable[[Reply], Grade]:
    def grade(reply: Reply) -> Grade:
        answer = read(reply.text)
        return Grade(answer, answer is not None and is_same(answer, reply.gold))

    return grade


def _check_formula(gold: str) -> str | None:
    return None if is_readable(gold) else f"the gold answer {gold!r} is no formula; it is compared as text"


def _check_letter(gold: str) -> str | None:
    return None if _letter(gold.upper()) else f"the gold answer {gold!r} is no letter from A to J"


def _or_last_number(text: str) -> str | None:
    found = extract(text)
    return found if found is not None else next(reversed(_NUMBER.findall(text)), None)


def _or_last_line(text: str) -> str | None:
    found = extract(text)
    return (
        found
        if found is not None
        else next((line.strip() for line in reversed(text.splitlines()) if line.strip()), None)
    )


def _letter(answer: str) -> str | None:
    found = _CHOICE.fullmatch(normalise(answer).strip("*"))
    return found[1] if found else None


def _choice(text: str) -> str | None:
    marked = extract(text)
    if marked is not None:
        return _letter(marked)
    found = _ONLY_CHOICE.fullmatch(text.strip())
    return found[1] if found else None


def _is_same_text(one: str, other: str) -> bool:
    return one.strip() == other.strip()


_GRADERS: dict[str, Grader] = {
    "math": Grader(_by(extract, is_equal), _check_formula),
    "number": Grader(_by(_or_last_number, is_equal), _check_formula),
    "exact": Grader(_by(_or_last_line, _is_same_text)),
    "choice": Grader(_by(_choice, lambda answer, gold: answer == _letter(gold.upper())), _check_letter, is_fatal=True),
}


def _by_pattern(pattern: str) -> Grader:
    try:
        found = re.compile(pattern, re.MULTILINE)
    except re.error as error:
        raise InputError(f"the grader's pattern {pattern!r} is no regular expression: {error}") from error

    def read(text: str) -> str | None:
        last = deque(found.finditer(text), maxlen=1)
        return last[0][1 if found.groups else 0] if last else None

    return Grader(_by(read, _is_same_text))


@lru_cache(maxsize=8)
def _by_function(name: str) -> Grader:
    module, _, attribute = name.rpartition(":")
    try:
        function: Any = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(
            f"the grader {name!r} cannot be imported ({error}); give python:MODULE:FUNCTION of a module on PYTHONPATH"
        ) from error
    if not callable(function):
        raise InputError(f"the grader {name!r} is no function but {type(function).__name__}; name a function")

    def grade(reply: Reply) -> Grade:
        return Grade(extract(reply.text), bool(function(reply.problem, reply.text, reply.gold)))

    return Grader(grade)
