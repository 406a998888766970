"""The final answer in a reply, and whether two answers are the same. Nothing here evaluates text as code."""

import contextlib
import logging
import re
from collections.abc import Sequence
from functools import lru_cache

from .markup import find_boxed

_LONGEST = 400
"""Characters of an answer that are compared mathematically; longer ones are compared as text."""
_LEADS = re.compile(r"(?:final answer(?: is)?|the answer is|answer)\**\s*[:=]?\s*\**\s*", re.IGNORECASE)
_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?")


def extract(text: str) -> str | None:
    """The answer of a reply: its last `\\boxed{...}`, else what follows `####` or the last lead such as `Final Answer:`.

    None where there is neither; a bare last number is not taken for an answer.
    """
    boxed = find_boxed(text)
    if boxed is not None:
        return boxed.strip() or None
    if "####" in text:
        return _line(text.rpartition("####")[2])
    leads = list(_LEADS.finditer(text))
    for lead in reversed(leads):
        number = _NUMBER.match(text, lead.end())
        if number:
            return number.group().strip()
        line = _line(text[lead.end() :])
        if line and len(line) <= 40 and lead.group().lower().startswith("final"):
            return line
    return None


def _line(text: str) -> str | None:
    lines = text.strip().splitlines()
    return lines[0].strip().strip("*$ ").rstrip(".").strip() or None if lines else None


def normalise(answer: str) -> str:
    """An answer without what does not change it: separators, money, units of angle, text wrappers, leading zeros."""
    text = re.sub(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}", r"\1", answer.strip().strip("$").strip())
    text = re.sub(r"\\(?:left|right|!|,|;|\s)|\\\$|\^\\circ|\^\{\\circ\}|\\%|%|\$", "", text)
    text = re.sub(r"(?<=\d),(?=\s?\d{3}(?!\d))\s?", "", text.replace("dfrac", "frac").replace("tfrac", "frac"))
    text = re.sub(r"\s+", " ", text).strip().rstrip(".")
    return re.sub(r"^(-?)0+(?=\d)", r"\1", text)


def is_equal(one: str, other: str) -> bool:
    """True where two answers mean the same, by math-verify; as text where it cannot read them."""
    return _is_equal(normalise(one), normalise(other))


@lru_cache(maxsize=4096)
def _is_equal(one: str, other: str) -> bool:
    if one.casefold().replace(" ", "") == other.casefold().replace(" ", ""):
        return True
    with contextlib.suppress(ValueError, OverflowError):
        return float(one) == float(other)
    if max(len(one), len(other)) > _LONGEST or re.search(r"\^\s*\{?\s*-?\d{4,}|!\s*!", one + other):
        return False  # large powers and factorials would be computed
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    # Its time limits are signals, which only a main thread can set; the bounds above stand in for them.
    parsed = [
        parse(f"\\boxed{{{text}}}", parsing_timeout=None, raise_on_error=False)  # pyright: ignore[reportArgumentType]
        for text in (one, other)
    ]
    if not all(parsed):
        return False
    return bool(verify(parsed[0], parsed[1], timeout_seconds=None, raise_on_error=False))


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
