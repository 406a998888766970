"""Code and formulas in a text: whether it ends inside one, the one that stands at a position, and what may begin."""

import re

_FENCE = re.compile(r"^[ \t]*(```|~~~)", re.MULTILINE)
_BOXED = re.compile(r"\\boxed\s*\{")
_FORMULA = re.compile(
    r"\\\[(.{1,400}?)\\\]|\\\((.{1,400}?)\\\)|\$\$(.{1,400}?)\$\$|\$((?:[^$\n\\]|\\.){1,400})\$(?!\d)", re.DOTALL
)
_CODE_LINE = re.compile(r"```\w*[ \t]*\n([^\n]+)\n[ \t]*```")
_BRACES = re.compile(r"\\boxed\s*\{\s*\}|\\boxed\s*\{|\\.|[{}]", re.DOTALL)
"""An empty box is taken as a whole, so that it opens nothing."""


def in_code_or_formula(text: str) -> bool:
    """True where `text` ends within a code fence, inline code, `$`, `$$`, `\\(`, `\\[` or `\\boxed{`.

    Inline marks end with their paragraph at the latest, so that a single dollar sign does not count for ever.
    """
    if len(_FENCE.findall(text)) % 2:
        return True
    text = text[text.rfind("```") + 3 :] if "```" in text else text
    if text.count("\\[") > text.count("\\]") or text.count("$$") % 2:
        return True
    paragraph = text[text.rfind("\n\n") + 2 :] if "\n\n" in text else text
    if paragraph.count("\\(") > paragraph.count("\\)"):
        return True
    plain = re.sub(r"\\.", "", paragraph.replace("$$", ""))
    if plain.count("$") % 2 or plain.count("`") % 2:
        return True
    starts = [match.end() for match in _BOXED.finditer(paragraph)]
    if not starts:
        return False
    rest = paragraph[starts[-1] :]
    return rest.count("{") + 1 > rest.count("}")


def find_formula(text: str, start: int) -> re.Match[str] | None:
    """The formula between delimiters that begins at `start`; its last group is what they hold."""
    return _FORMULA.match(text, start)


def find_code_line(text: str, start: int) -> str | None:
    """The line of the code block that begins at `start`, where it has just one."""
    found = _CODE_LINE.match(text, start)
    return found[1] if found else None


def find_boxed(text: str) -> str | None:
    """The content of the last `\\boxed{...}` whose braces balance and hold something, or None."""
    open: list[re.Match[str]] = []
    best = None
    # One pass: a model that repeats `\\boxed{` for ever must not cost a scan for each.
    for match in _BRACES.finditer(text):
        if match.group().endswith("{") and match.group() != "\\{":
            open.append(match)
        elif match.group() == "}" and open:
            start = open.pop()
            if start.group() != "{" and (best is None or start.end() > best[0]):
                best = (start.end(), match.start())
    return text[best[0] : best[1]] if best else None


def n_begun(text: str, word: str) -> int:
    """Characters at the end of a text that begin a word, and are not all of it."""
    return next((n for n in range(min(len(word) - 1, len(text)), 0, -1) if text.endswith(word[:n])), 0)
