"""Formulas as a terminal can show them: LaTeX in Markdown becomes Unicode, for display only."""

import logging
import re
from functools import cache
from typing import Any

from ..runtime.markup import n_begun

_PAIRS = {"\\(": "\\)", "\\[": "\\]", "$$": "$$", "$": "$"}
_OPENING = re.compile(r"\\\(|\\\[|\$\$|\$|`+|~~~+|\\boxed\{")
_LIMIT = 4000
"""Characters that may stand in a formula; what is longer was none."""
_UP = str.maketrans("0123456789+-=()ni−", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁼⁽⁾ⁿⁱ⁻")
_DOWN = str.maketrans("0123456789+-=()aehijklmnoprstuvx−", "₀₁₂₃₄₅₆₇₈₉₊₋₌₍₎ₐₑₕᵢⱼₖₗₘₙₒₚᵣₛₜᵤᵥₓ₋")
_SCRIPT = re.compile(r"([\^_])(?:\{([^{}\\]*)\}|([0-9A-Za-z+\-]))")
_AFTER_MACRO = re.compile(r"(\\[A-Za-z]+)(?=[\^_]|\s+[^\s{\[])")
_DROPPED = re.compile(r"\\(?:left|right|displaystyle|limits|nolimits|bigl?|bigr|Bigl?|Bigr)(?![A-Za-z])\.?")
_MARKDOWN = re.compile(r"([\\`*_\[\]<>])")


def readable(formula: str) -> str:
    """A formula without its dollars as one line of Unicode, more lines only where it has them; as it is where it
    cannot be read."""
    if formula.count("{") != formula.count("}"):
        return formula
    text = _DROPPED.sub("", formula).replace(r"^\circ", "°").replace(r"^{\circ}", "°")
    text = _AFTER_MACRO.sub(r"\1{}", text)  # keeps the space, and raised letters out of the macro's name
    text = _SCRIPT.sub(_script, text)
    try:
        found = _converter().latex_to_text(text)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):  # whatever a model writes, it is shown
        return formula
    lines = (re.sub(r"[ \t]+", " ", line).strip() for line in found.splitlines())
    return "\n".join(line for line in lines if line)


def _script(match: re.Match[str]) -> str:
    """A raised or lowered group in characters that are so by themselves, where there are such."""
    text = match[2] if match[2] is not None else match[3]
    raised = text.translate(_UP if match[1] == "^" else _DOWN)
    if all(one != other or one == " " for one, other in zip(text, raised, strict=True)):
        return raised
    return f"{match[1]}{text}" if len(text) == 1 else rf"{match[1]}({text})"


@cache
def _converter() -> Any:
    from pylatexenc import latex2text  # slow to import, and many chats have no formula

    logging.getLogger("pylatexenc").setLevel(logging.CRITICAL)
    known = latex2text.get_default_latex_context_db()
    spec = latex2text.MacroTextSpec
    fractions = [spec(name, _fraction) for name in ("frac", "dfrac", "tfrac", "cfrac")]
    arrows = [spec(name, arrow) for name, arrow in (("implies", "⟹"), ("iff", "⟺"), ("dots", "…"))]
    known.add_context_category("ours", [*fractions, *arrows, spec("sqrt", _root)], prepend=True)
    known.set_unknown_macro_spec(spec("", _unknown))
    return latex2text.LatexNodes2Text(known, strict_latex_spaces="except-in-equations", keep_comments=True)


def _fraction(node: Any, l2tobj: Any) -> str:
    """A fraction in one line, with parentheses where it would not be one without them."""
    parts = [l2tobj.nodelist_to_text([part]).strip() for part in node.nodeargd.argnlist]
    return "/".join(part if re.fullmatch(r"[\d.]*|\w", part) else f"({part})" for part in parts)


def _root(node: Any, l2tobj: Any) -> str:
    index, inside = node.nodeargd.argnlist
    degree = l2tobj.nodelist_to_text(index.nodelist).translate(_UP) if index is not None else ""
    text = l2tobj.nodelist_to_text([inside]).strip()
    return f"{degree}√{text}" if re.fullmatch(r"[\d.]*|\w", text) else f"{degree}√({text})"


def _unknown(node: Any) -> str:
    return f"\\{node.macroname}"


class FormulaReader:
    """Follows Markdown that arrives in pieces; what may be the beginning of a formula is held back until it is whole.

    Code is left alone. However the text is cut, the same comes out.
    """

    def __init__(self) -> None:
        self._held = ""
        self._fence = ""

    def feed(self, text: str) -> str:
        """What can be shown of all text so far and was not yet."""
        self._held += text
        return self._take(is_end=False)

    def flush(self) -> str:
        """The rest, once no more text comes."""
        return self._take(is_end=True)

    def _take(self, is_end: bool) -> str:
        done: list[str] = []
        while self._held:
            piece = self._code(is_end) if self._fence else self._text(is_end)
            if piece is None:
                break
            done.append(piece)
        return "".join(done)

    def _code(self, is_end: bool) -> str | None:
        """Text of code up to its end; where that is not there, all but what may be the beginning of it."""
        found = re.compile(f"{re.escape(self._fence)}(?!{re.escape(self._fence[0])})").search(self._held)
        is_span = self._fence[0] == "`" and len(self._fence) < 3
        blank = self._held.find("\n\n") if is_span else -1
        if blank >= 0 and (found is None or blank < found.start()):  # a lone backtick is no code
            return self._cut(blank + 2, "")
        if found is not None and (is_end or found.end() < len(self._held)):
            return self._cut(found.end(), "")
        if is_end:
            return self._cut(len(self._held), "")
        size = len(self._held) - len(self._held.rstrip(self._fence[0] + "\n"))
        return self._cut(len(self._held) - size, self._fence) if size < len(self._held) else None

    def _text(self, is_end: bool) -> str | None:
        """Text up to the next opening, or a formula."""
        found = _OPENING.search(self._held)
        if found is None:
            size = 0 if is_end else _n_doubtful(self._held)
            return self._cut(len(self._held) - size, "") if size < len(self._held) else None
        if found.start():
            return self._cut(found.start(), "")
        mark = found[0]
        if not is_end and found.end() == len(self._held) and mark[0] in "`~$":
            return None  # the mark itself may go on
        if mark[0] in "`~":
            return self._cut(found.end(), mark)
        return self._boxed(is_end) if mark.startswith("\\b") else self._formula(mark, is_end)

    def _formula(self, mark: str, is_end: bool) -> str | None:
        closing = _PAIRS[mark]
        end = self._held.find(closing, len(mark))
        inside = self._held[len(mark) : end if end >= 0 else len(self._held)]
        is_over = "\n" in inside if mark == "$" else "\n\n" in inside or len(inside) > _LIMIT
        if is_over or (end < 0 and is_end):
            return self._cut(len(mark), "")  # a sum of money, or a formula that was never closed
        if end < 0 or (mark == "$" and not is_end and end + 1 == len(self._held)):
            return None
        if mark == "$" and not _is_formula(inside, self._held[end + 1 : end + 2]):
            return self._cut(1, "")
        shown = _escape(readable(inside.strip()))
        self._held = self._held[end + len(closing) :]
        is_block = mark in ("\\[", "$$")
        return "\n\n" + "\n".join(f"> {line}  " for line in shown.splitlines()) + "\n\n" if is_block else shown

    def _boxed(self, is_end: bool) -> str | None:
        """`\\boxed{…}` outside of a formula, as many models write it."""
        depth = 0
        for i, character in enumerate(self._held):
            depth += (character == "{") - (character == "}")
            if character == "}" and not depth:
                shown = f"**{_escape(readable(self._held[7:i]))}**"
                self._held = self._held[i + 1 :]
                return shown
            if character == "\n" or i > _LIMIT:
                return self._cut(7, "")
        return self._cut(7, "") if is_end else None

    def _cut(self, n: int, fence: str) -> str:
        piece, self._held, self._fence = self._held[:n], self._held[n:], fence
        return piece


def _is_formula(inside: str, following: str) -> bool:
    """Whether dollars enclose mathematics: no space inside of them, no digit behind, as in Pandoc."""
    return bool(inside) and not inside[0].isspace() and not inside[-1].isspace() and not following.isdigit()


def _n_doubtful(text: str) -> int:
    """How many characters at the end may begin a mark."""
    if text.endswith("~"):
        return len(text) - len(text.rstrip("~"))
    return n_begun(text, "\\boxed{")


def _escape(text: str) -> str:
    """Text of a formula that Markdown does not read as its own."""
    return _MARKDOWN.sub(r"\\\1", text)


def shown(text: str) -> str:
    """A whole Markdown text with its formulas made readable."""
    reader = FormulaReader()
    return reader.feed(text) + reader.flush()
