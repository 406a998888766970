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

from .markup import find_boxed, find_code_line, find_formula, in_code_or_formula

_LONGEST = 400
"""Characters of an answer that are read as mathematics; longer ones are compared as text."""
_LEADS = re.compile(
    r"(?:^[#*_ \t]*+(?:final )?answer[*_ \t]*+$|#{4,}"
    r"|(?:(?:final )?answer|(?:correct|right) (?:option|choice))"
    r"(?:\*{0,2}\s+is\b(?:\*{0,2}\s*[:=])?\*{0,2}|\*{0,2}\s*[:=]\*{0,2}|\*\*))(\s*+(?:\*+(?=\S))?)",
    re.IGNORECASE | re.MULTILINE,
)
"""A heading `Answer`, `####`, `Final Answer:`, `The answer is`, `**Answer**`; not `the answer 3 times`."""
_MOST_LEADS = 32
"""A model that repeats itself for ever must not cost a look at the rest of its reply for each lead."""
_LONGEST_TEXT = 40
"""Characters of a line that is an answer as it stands; a longer one is a sentence."""
_IS, _VERDICT = re.compile(r"is[\s*]*$"), re.compile(r"(?:(?:in)?correct|right|wrong|not)\b", re.IGNORECASE)
"""`The final answer is correct` tells none."""
_ITEM = re.compile(r"(?:[-+*•]|1[.)])[ \t]+\S")
"""An item of a list is a step or one of several answers."""
_MARKS = re.compile(r"\*\*(?!\w)|(?<!\w)\*\*|`|(?<!\\)\\[()\[\]]")
_BRACED = re.compile(r"\{[^{}]*\}")
_VARIABLE = r"(?<![A-Za-z\\])[A-Za-z](?![A-Za-z])"
_WRAPPED = re.compile(r"\\(?:text|mathrm|mbox|textbf)\s*\{([^{}]*)\}")
_CHOICE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice)\s+)?\(?([A-J])\)?+(?!\s*(?:[,/&]|,?\s*\b(?:or|and)\b)\s*\(?[A-HJ]\b)"
    r"(?:(?<=\))\s|[.,:*\s]*$|[.,:;]\s|\s+\((?:[A-Za-z]{2}|[^(),]*\))|\s+[-–—]\s+[A-Za-z]{2}"
    r"|\s+(?:because|since|as)\b|(?<![AI])\s+[a-z]{2})"
)
"""A letter with a bracket behind it, at the end, or before a mark, a remark or words; `A` and `I` may be words."""
_PROSE = r"(?:[aAI]\s+)?[^\W\d_]{2}"
_REMARK = re.compile(
    rf"[.;?](?=\s|$)|,?\s(?:because|since|as|so|where|which|but)\b|,\s+(?!(?:and|or)\b){_PROSE}|≈|\\approx|<[|/]"
    rf"|\s[-–—]+\s+[^\W\d_]{{2,}}\s|\s\([^\W\d_]{{2}}|(?<=\d)\s\((?![^()]*{_VARIABLE})"
)
"""What ends a clause: a full stop, a reason, a rounded value, words behind a comma or a dash, words or numbers in
brackets."""
_NAMES = r"(?:sqrt|pi|sin|cos|tan|log|ln)\b"
_WORD = re.compile(rf"(?<![\\\w])(?!{_NAMES}|(?:and|or)\s+(?![^\W\d_]{{2}})){_PROSE}|(?<=\d )[mg](?!\w|\s*[-+*/^=(])")
"""Such as a unit, `m` and `g` behind a space too. Functions, commands of LaTeX and the `and` of `2 and 3` are none."""
_MORE = re.compile(
    r"[ \t,]*+(?:(?!(?:in|for|of|per|after)\b)[^\W\d]+\s*)?"
    r"(?:(?:[-−+*/×÷=^<>&]|(?:and|or|to|x)\b)\s*[\d\\$(€£−-]|,?\s*[$€£]?\d)"
)
"""Another part of the answer behind what seemed to be all: `hours and 30 minutes`, `dollars - 5 dollars`, `= 5`."""
_START = re.compile(rf"(?!\(?[A-J]\b|a\s+\w)(?:[-+−±]\s*)?(?:[\d.\\(\[{{|√π∞$€£]|{_NAMES}|[A-Za-z](?![A-Za-z]))")
"""How a formula begins: neither with the letter of an option nor with the article `a`."""
_UNENDED = re.compile(r"[-−+*/×÷=^_<>\\]$")
_OPERATOR = re.compile(r"[-−+*/×÷^]|\\(?:times|cdot|div|[dt]?frac)")
_TIMES = re.compile(r"(?<![A-Za-z\\])x(?=\s*\d)")
_WORDS = re.compile(r"[A-Za-z]{3,}(?: [A-Za-z]+)*")
_PLAIN = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)")
_SIGNS = str.maketrans({"−": "-", "×": "\\times ", "~": " ", "°": "^\\circ ", "€": None, "£": None})
_MARKUP = re.compile(
    r"\\\\|\\(?:left|right|[!,;:\s])|\\?[$%]|\^(?:\\circ|\{\\circ\})(?:\s*(?:[CF]|\\(?:text|mathrm)\s*\{[CF]\})(?!\w))?"
)
_UNIT = re.compile(
    r"^([-+]?(?:\d+ )?(?:\d+(?:\.\d+)?(?:/\d+)?|\\frac\{\d+\}\{\d+\}))"
    r"(?:\s+[a-zA-Z][a-z]{2,}(?:/[a-z]+)?(?:\s+[a-z]{2,})*|\s*(?:[ckm]m|kg|m[lL]|ft|lb|oz|mi?(?=/))(?:/(?:hr?|s|min))?)"
    r"(?:\^\{?\d\}?)?$"
)
"""A number and words or an abbreviation behind it; other one or two letters may be variables."""
_UNIT_TEXT = re.compile(
    r"(?:(?<=\d)|(?<=[\d}]\}))\s*\\(?:text|mathrm|mbox)\s*\{(?!\s*[ei]\s*\})[a-zA-Z\s./]+\}(?:\^\{?\d\}?)?$"
)
_CALCULATION = re.compile(r"[\d)}]\s*(?:[-+*×]|\\times|\\cdot)\s*[\d({\\](?!0\s*\^)")
"""Such as `6 + 7`, which is a question and not its answer; `3 * 10^5` is a number."""
_MIXED = re.compile(r"^([-+]?\d+) (\d+)/(\d+)$")
_SCIENTIFIC = re.compile(r"[-+]?\d+(?:\.\d+)?[eE][-+]?\d{1,2}")
_BASE = re.compile(r"(?<=[\dA-F])_\{?(\d+)\}?")
"""The base of a number such as `52_8`. Where only one side names one, it is the one that the question asks for."""
_COSTLY = re.compile(
    r"\d{4,}\s*\}?\s*!|!\s*!|[)\]}]\s*!(?!=)|\^\s*(?:[{(][^{}]*|\d+\s*)!"
    r"|\\(?:Gamma|sum|prod|int|iint|oint|lim|d?t?binom|choose)(?![a-zA-Z])"
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
    """The answer of a reply: its last `\\boxed{...}` with something in it, else what the last readable lead leads to.

    None where there is neither; a bare last number is not taken for an answer.
    """
    boxed = find_boxed(text)
    if boxed is not None:
        return boxed.strip()
    leads = reversed(deque(_LEADS.finditer(text), _MOST_LEADS))
    return next((answer for lead in leads if (answer := _follow(text, lead)) is not None), None)


def _follow(text: str, lead: re.Match[str]) -> str | None:
    """What a lead leads to: a formula between delimiters; else what its line begins with, a choice, a number or a
    formula; else, behind `Final Answer` and `####`, the line itself where it is short."""
    start = lead.end()
    if "\n" in lead[1] and _ITEM.match(text, start):
        return None
    formula = find_formula(text, start)
    if formula and not _MORE.match(text, formula.end()):
        return _checked(_result(formula[formula.lastindex or 0]))
    line = find_code_line(text, start) or text[start : start + _LONGEST].partition("\n")[0]
    if in_code_or_formula(line.replace("$", "")):
        return None
    line = _MARKS.sub("", line).strip()
    choice = _CHOICE.match(_WRAPPED.sub(r"\1", line))
    if choice:
        return choice[1]
    is_text = ("final" in lead[0].lower() or lead[0].startswith("####")) and len(line) <= _LONGEST_TEXT
    is_verdict = bool(_IS.search(lead[0]) and _VERDICT.match(line))
    return _maths(line) or (_checked(line) if is_text and not is_verdict else None)


def _maths(line: str) -> str | None:
    """The number or formula that begins a line, or the result of a calculation there, without the words behind it."""
    remark = _REMARK.search(_mask(line))
    clause = _result(line[: remark.start()] if remark else line)
    word = _WORD.search(_mask(clause))
    head, tail = (clause[: word.start()], clause[word.start() :]) if word else (clause, "")
    head = head.strip(" ,;:*")
    if head.endswith(")") and _balance(head) < 0:
        head = head[:-1]  # the bracket that the whole sentence stands in
    # `5:30` is a part of `5:30 pm`, as is a letter of `x in [0, 1]`.
    is_part = _MORE.match(tail) or (tail and (":" in head or head.isalpha())) or len(head) >= _LONGEST
    return _checked(head) if _START.match(head) and not is_part and not _UNENDED.search(head) else None


def _mask(line: str) -> str:
    """A line without what braces hold: words in `\\text{...}` end nothing."""
    return _BRACED.sub(lambda found: "{" + "0" * (len(found[0]) - 2) + "}", line)


def _result(formula: str) -> str:
    """What a calculation without variables comes to, such as the 15 of `20 - 5 = 15`; else the formula itself."""
    before, _, after = formula.rpartition("=")
    sides = _TIMES.sub("*", before).rpartition("=")[2]
    is_calculation = _OPERATOR.search(sides) and not re.search(_VARIABLE, sides) and "," not in sides
    return after if is_calculation and _balance(sides) == 0 else formula


def _balance(text: str) -> int:
    """How many brackets are open at the end of a text, of whatever kind: an interval may be half open."""
    return sum((each in "([{") - (each in ")]}") for each in text)


def _checked(answer: str) -> str | None:
    """An answer without marks around it; None where nothing or only a part of a formula is left."""
    answer = answer.strip("*,;: \t\n").rstrip(".")
    return answer if re.search(r"[\w∞∅]", answer) and _balance(answer) == 0 and "\\boxed" not in answer else None


def normalise(answer: str) -> str:
    """An answer without what does not change it: separators, money, units, text wrappers, leading zeros, and other ways
    to write a number."""
    text = _MARKUP.sub(_drop, answer.translate(_SIGNS)).strip().rstrip(".")
    text = _WRAPPED.sub(r"\1", _UNIT_TEXT.sub("", text))
    text = re.sub(r"(?<=\d),(?=\s?\d{3}(?!\d))\s?", "", text.replace("dfrac", "frac").replace("tfrac", "frac"))
    text = _UNIT.sub(r"\1", re.sub(r"\s+", " ", text).strip().rstrip("."))
    text = re.sub(r"^(-?)0+(?=\d)", r"\1", _MIXED.sub(r"\1\\frac{\2}{\3}", text))
    return format(Decimal(text), "f") if _SCIENTIFIC.fullmatch(text) else text


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
    if any(
        _PLAIN.fullmatch(plain) and _CALCULATION.search(asked) for plain, asked in ((one, other), (other, one))
    ):  # math-verify would work it out
        return False
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
