"""Events as terminal text. What a model writes is data: never markup, and without control characters."""

import sys
from typing import TYPE_CHECKING

from rich.console import Console

from .row import Row, n_sampled
from .say import Line, safe

if TYPE_CHECKING:
    from ..runtime.events import Event


class Stream:
    """One reply as it comes: thinking dimmed, the answer plain, notes of controls in dim italics.

    Off a terminal it is the bare text, a blank line between thinking and answer, and notes go to standard error.
    """

    def __init__(self, is_thinking_shown: bool = True) -> None:
        self._console = Console(file=sys.stdout, highlight=False)
        self._notes = Console(file=sys.stderr, highlight=False)
        self._is_thinking_shown = is_thinking_shown
        self._phase: str | None = None
        self._tail = "\n"

    def show(self, event: "Event") -> None:
        """Show what an event adds."""
        from ..runtime.events import Noted, Token

        if isinstance(event, Token) and event.text:
            self.write(event.text, str(event.phase))
        elif isinstance(event, Noted) and self._is_thinking_shown:
            self.note(f"{event.control}: {event.text}")

    def write(self, text: str, phase: str) -> None:
        """Text of a phase, `think` or `answer`."""
        text = safe(text)
        if phase == "think" and not self._is_thinking_shown:
            return
        if phase != self._phase:
            text = text.lstrip("\n")
            if not text:
                return
            if self._phase is not None:
                self._put("\n" * (2 - len(self._tail) + len(self._tail.rstrip("\n"))))
            self._phase = phase
        self._put(text, "dim" if phase == "think" else None)

    def note(self, text: str) -> None:
        """A line that is not the model's."""
        if not self._console.is_terminal:
            self._notes.out(f"[{safe(text)}]", highlight=False)
            return
        start = "" if self._tail.endswith("\n") else "\n"
        self._put(f"{start}[{safe(text)}]\n", "dim italic")

    def end(self) -> None:
        """End the last line."""
        if not self._tail.endswith("\n"):
            self._put("\n")

    def _put(self, text: str, style: str | None = None) -> None:
        if text:
            self._console.out(text, style=style, end="", highlight=False)
            self._console.file.flush()
            self._tail = (self._tail + text)[-2:]
            Line.is_begun = self._console.is_terminal and not text.endswith("\n")


def summary(row: Row, n_tokens: int, seconds: float) -> list[str]:
    """Why a reply ended, its tokens by kind, its speed, and what each control did."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in row.tokens.items() if count)
    lines = [
        f"stopped: {row.stop}" + (f"; answer: {safe(row.answer)}" if row.answer is not None else "; no answer found"),
        f"tokens: {kinds}; {n_tokens / seconds:.1f} a second, {seconds:.1f} s" if seconds > 0 else f"tokens: {kinds}",
    ]
    for name, counters in row.counters.items():
        lines.append(f"{name}: " + ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in counters.items()))
    return lines


def row_line(row: Row) -> str:
    """A finished problem in one line."""
    mark = {True: "right", False: "wrong", None: "done"}[row.correct]
    if row.error is not None:
        return f"{safe(row.id)}  failed  {safe(row.error)}"
    answer = safe(row.answer or "no answer").replace("\n", " ")
    return f"{safe(row.id)}  {mark}  {answer[:80]}  ({n_sampled(row)} tokens, {row.seconds:.1f} s, {row.stop})"
