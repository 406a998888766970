"""Sentences to the person at the terminal, beside the results."""

import re
import sys

# Escape sequences, control characters but line end and tab, and marks that reverse the direction of text.
_UNSAFE = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\^_])?"
    r"|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
)


def safe(text: str) -> str:
    """Text that can be shown on any terminal and does nothing there."""
    return _UNSAFE.sub("", text)


class Line:
    """The line of the terminal that a reply is being written in."""

    is_begun = False


def tell(sentence: str) -> None:
    """Say something on standard error; the chat shows it as a notice. A reply that is being written goes on below."""
    start = "\n" if Line.is_begun and sys.stderr.isatty() else ""
    Line.is_begun = False
    print(f"{start}localreason: {safe(sentence)}", file=sys.stderr, flush=True)
