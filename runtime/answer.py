"""The final answer in a reply, and whether two answers are the same. Nothing here evaluates text as code."""

import logging
import re
from collections import deque
from collections.abc import Sequence
from decimal import Decimal
from functools import lru_cache
from itertools import accumulate
from math import comb, prod
from typing import Any

from .markup import find_boxed

_LONGEST = 400
"""Characters of an answer that are compared mathematically; longer ones are compared as text."""
_LEADS = re.compile(r"(?:final answer(?: is\b)?|answer(?: is\b)?)\**\s*[:=]?\s*\**\s*", re.IGNORECASE)
_NUMBER = re.compile(r"-?\$?\d+(?:,\d{3})*(?:\.\d+)?(?:\s*/\s*\d+)?")
_RESULT = re.compile(
    r"(?=[^\n=]*[-+*/×÷^])[^\n=]*+=(?:[^\n=]*+=)*+\s*+\**+\s*+(-?\$?\d+(?:,\d{3})*(?:\.\d+)?)(?=[.\s*$]*$)",
    re.MULTILINE,
)
"""A calculation up to the end of its line: `12 + 7 = 19`; nothing in it is tried in two ways."""
_MOST_LEADS = 32
_LONGEST_LINE = 200
"""A model that repeats itself for ever must not cost a look at the rest of its reply for each lead."""
_CHOICE = re.compile(
    r"\(?([A-J])\)?(?!,?\s+(?:or|and)\s+\(?[A-J]\b)"
    r"(?=[.,:*\s]*$|[.,:;]\s|\*\*|\s+(?:because|since|as)\b|(?<![AI])\s+[a-z]{2})",
    re.MULTILINE,
)
"""A letter at the end of its line, before a mark or before words; `A` and `I` may be words themselves."""
_FORMULA = re.compile(r"\$([^$\n]+)\$(?!\d)")
_WORDS = re.compile(r"[A-Za-z]{3,}(?: [A-Za-z]+)*")
_PLAIN = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_UNIT = re.compile(r"^([-+]?\d+(?:\.\d+)?)\s+[a-zA-Z][a-z]{2,}(?:\s+[a-z]{2,})*(?:\^\{?\d\}?)?$")
"""A number and words behind it; one or two letters may be variables."""
_UNIT_TEXT = re.compile(r"(?<=\d)\s*\\(?:text|mathrm|mbox)\s*\{[a-zA-Z\s./]+\}(?:\^\{?\d\}?)?$")
_BASE = re.compile(r"(?<=[\dA-F])_\{?(\d+)\}?")
"""The base of a number such as `52_8`. Where only one side names one, it is the one that the question asks for."""
_COSTLY = re.compile(
    r"\d{4,}\s*\}?\s*!|!\s*!|\\(?:sum|prod|int|iint|oint|lim|d?t?binom|choose)(?![a-zA-Z])"
    r"|\^\s*(?:\\|\w\s*\^|[{(][^{}()]*(?:\^|\d{4}|\*|\\cdot|\\times))"
)
"""Factorials, sums and towers of powers: short texts whose value could take for ever."""
_MOST_POWER = 1000
_EXPANDED = re.compile(r"[A-Za-z][^()\[\]]*[)\]]\s*\^[\s{(]*[-+]?(\d{1,9})")
_MOST_EXPANDED = 12
"""The power of a bracket with a letter: `(a+b+c+d+e)^{20}` has 10626 terms."""
_MOST_FUNCTIONS = 4
_FUNCTION = re.compile(r"(?:sin|cos|tan|cot|sec|csc)")
"""In products or inside each other, simplifying these takes minutes."""
_DEEPEST = 8
"""Brackets inside each other; math-verify takes a tenth of a second to read each."""
_MOST_TERMS = 250
"""A product of five sums of six letters has 462 and takes seconds."""
_BRACKETED = re.compile(r"[(\[{]([^()\[\]{}]*)[)\]}]")
_SUM = re.compile(r"[a-zA-Z][^+-]*[+-]|[+-][^+-]*[a-zA-Z]")
_LETTER, _COMMAND = re.compile(r"[a-zA-Z]"), re.compile(r"\\[a-zA-Z]+")


def extract(text: str) -> str | None:
    """The answer of a reply: its last `\\boxed{...}`, else what follows `####` or a lead such as `Final Answer:`.

    None where there is neither; a bare last number is not taken for an answer.
    """
    boxed = find_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    if "####" in text:
        return _line(text.rpartition("####")[2])
    for lead in reversed(deque(_LEADS.finditer(text), _MOST_LEADS)):
        formula = _FORMULA.match(text, lead.end())
        if formula:
            return formula.group(1).strip()
        result = _RESULT.match(text, lead.end())
        if result:
            return result.group(1)
        number = _NUMBER.match(text, lead.end())
        if number:
            return number.group().strip()
        choice = _CHOICE.match(text, lead.end())
        if choice:
            return choice.group(1)
        line = _line(text[lead.end() : lead.end() + _LONGEST_LINE])
        if line and len(line) <= 40 and lead.group().lower().startswith("final"):
            return line
    return None


def _line(text: str) -> str | None:
    lines = text.strip().splitlines()
    return lines[0].strip().strip("*$ ").rstrip(".").strip() or None if lines else None


def normalise(answer: str) -> str:
    """An answer without what does not change it: separators, money, units of angle, text wrappers, leading zeros."""
    text = _UNIT_TEXT.sub("", answer.strip().strip("$").strip())
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\\\|\\(?:left|right|!|,|;|\s)|\\\$|\^\\circ|\^\{\\circ\}|\\%|%|\$", _drop, text)
    text = re.sub(r"(?<=\d),(?=\s?\d{3}(?!\d))\s?", "", text.replace("dfrac", "frac").replace("tfrac", "frac"))
    text = _UNIT.sub(r"\1", re.sub(r"\s+", " ", text).strip().rstrip("."))
    return re.sub(r"^(-?)0+(?=\d)", r"\1", text)


def _drop(found: re.Match[str]) -> str:
    """Nothing, but a line end of a matrix stays: its backslashes are not the start of a space."""
    return found.group() if found.group() == "\\\\" else ""


def is_equal(one: str, other: str) -> bool:
    """True where two answers mean the same, by math-verify; as text where it cannot read them."""
    return _is_equal(normalise(one), normalise(other))


@lru_cache(maxsize=4096)
def _is_equal(one: str, other: str) -> bool:
    if one.casefold().replace(" ", "") == other.casefold().replace(" ", ""):
        return True
    if _PLAIN.fullmatch(one) and _PLAIN.fullmatch(other):
        return Decimal(one) == Decimal(other)  # a float would take two long integers for one
    bases = [_BASE.findall(text) for text in (one, other)]
    if all(bases) and bases[0] != bases[1]:
        return False
    if not one or not other or any(_is_costly(text) for text in (one, other)):
        return False
    if _WORDS.fullmatch(one) and _WORDS.fullmatch(other):  # math-verify multiplies their letters: east is seat
        return False
    from math_verify import verify

    parsed = [_parse(text) for text in (one, other)]
    if not all(parsed):
        return False
    return bool(verify(parsed[0], parsed[1], timeout_seconds=None, raise_on_error=False))


def is_readable(answer: str) -> bool:
    """True where an answer is compared by value, not only as text."""
    text = normalise(answer)
    if _PLAIN.fullmatch(text):
        return True
    found = _parse(text) if text and not _is_costly(text) else []
    return bool(found) and not isinstance(found[0], str)


def _parse(text: str) -> list[Any]:
    """What math-verify makes of an answer that is not costly; empty where it cannot read it."""
    from math_verify import parse

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # Its time limits are signals, which only a main thread can set; the bounds above stand in for them.
    return parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=False)  # pyright: ignore[reportArgumentType]


def _is_costly(text: str) -> bool:
    """True where a comparison by value could take long; then only the text counts."""
    text = text.replace("**", "^")
    powers = [int(digits) for digits in re.findall(r"\^[\s{(]*[-+]?(\d{1,9})", text)]
    return (
        len(text) > _LONGEST
        or bool(_COSTLY.search(text))
        or prod(max(power, 1) for power in powers) > _MOST_POWER
        or any(int(power) > _MOST_EXPANDED for power in _EXPANDED.findall(text))
        or len(_FUNCTION.findall(text)) > _MOST_FUNCTIONS
        or _depth(text) > _DEEPEST
        or _n_terms(text) > _MOST_TERMS
    )


def _n_terms(text: str) -> int:
    """Terms that a product of the sums in brackets may have: as many as there are ways to choose a letter from each."""
    n_sums = sum(bool(_SUM.search(inner)) for inner in _BRACKETED.findall(text))
    return comb(n_sums + len(set(_LETTER.findall(_COMMAND.sub("", text)))), n_sums)


def _depth(text: str) -> int:
    """How many brackets are open at once at the most."""
    return max(accumulate((each in "([{") - (each in ")]}") for each in text), default=0)


def group(answers: Sequence[str | None]) -> list[list[int]]:
    """Indices of equal answers, in order of first appearance; every missing answer is a group of its own."""
    groups: list[list[int]] = []
    for i, answer in enumerate(answers):
        for members in groups:
            first = answers[members[0]]
            if answer is not None and first is not None and is_equal(first, answer):
                members.append(i)
                break
        else:
            groups.append([i])
    return groups
