"""Text as a terminal may show it: without what would move its cursor, change its colours or turn its lines round."""

import re

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, entity

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
# The order of right-to-left letters is left to the terminal; only the marks that reorder whole lines are dropped.


def parser() -> MarkdownIt:
    """A parser of Markdown whose entities (`&#8238;`) are no way round `visible`."""

    def read(state: StateInline, silent: bool) -> bool:
        is_read = entity(state, silent)
        if is_read and not silent:
            state.tokens[-1].content = visible(state.tokens[-1].content)
        return is_read

    found = MarkdownIt("gfm-like")
    found.inline.ruler.at("entity", read)
    return found


def is_visible(text: str) -> bool:
    """True where a terminal may show the text as it is."""
    return not _UNSAFE.search(text)


def visible(text: str) -> str:
    """The text without control characters and marks of direction, tabs as spaces, line ends as newlines."""
    return _UNSAFE.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    "))
