"""Text as a terminal may show it: without what would move its cursor, change its colours or turn its lines round."""

import re

_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")
# The order of right-to-left letters is left to the terminal; only the marks that reorder whole lines are dropped.


def visible(text: str) -> str:
    """The text without control characters and marks of direction, tabs as spaces, line ends as newlines."""
    return _UNSAFE.sub("", text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    "))
