"""The thinking of a reply: dimmed, folded when the answer starts, with the places where a control acted."""

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.content import Content
from textual.events import Click
from textual.message import Message
from textual.style import Style
from textual.widgets import Static

from ..conversation import Mark
from ..visible import visible

_PIECE = 1500
"""Characters from which on a piece ends with its paragraph: the layout takes time for each piece there is, and the last
one is laid out with each new word."""
SIGNS = {"forced": "▸", "hint": "◆", "suppressed": "◇", "probe": "◌", "note": "※"}
_MEANINGS = {
    "forced": "forced: a control wrote this, the model did not",
    "hint": "hint: the model reads it, it is no part of the text",
    "suppressed": "suppressed: words that begin a reflection were made rarer from here on",
    "probe": "probe: a tentative answer was asked for on the side",
    "note": "note of a control",
}


def explain(mark: Mark) -> str:
    """What happened at a place, in one line."""
    text = " ".join(visible(mark.text).split())
    place = "" if mark.phase == "think" else " (in the answer)"
    return f"{SIGNS[mark.kind]} {_MEANINGS[mark.kind]}{place}: {text}" if text else _MEANINGS[mark.kind]


class Paragraph(Static):
    """A piece of the thinking; marks in it can be clicked."""

    class MarkClicked(Message):
        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

    def action_mark(self, index: int) -> None:
        self.post_message(self.MarkClicked(index))


class Thinking(Vertical):
    """Grows by `sync`; only the last piece is rendered again."""

    def __init__(self, is_open: bool) -> None:
        super().__init__()
        self.is_open = is_open
        self.text = ""
        self.marks: list[Mark] = []
        self.selected: int | None = None
        self._pieces: list[tuple[int, Paragraph]] = []
        self._title = "Thinking"

    def compose(self) -> ComposeResult:
        yield Static(self._caption(), id="fold", markup=False)
        yield Vertical(id="body")
        yield Static("", id="explanation", markup=False)

    def on_mount(self) -> None:
        self.query_one("#explanation").display = False
        self.query_one("#body").display = self.is_open
        text, self.text = self.text, ""
        self._lay_out(text)

    def entitle(self, title: str) -> None:
        """The words beside the fold."""
        if title != self._title:
            self._title = title
            if self.is_mounted:
                self.query_one("#fold", Static).update(self._caption(), layout=False)

    def fold(self, is_open: bool) -> None:
        self.is_open = is_open
        if self.is_mounted:
            self.query_one("#body").display = is_open
            self.query_one("#fold", Static).update(self._caption(), layout=False)

    def _caption(self) -> str:
        signs = "".join(dict.fromkeys(SIGNS[mark.kind] for mark in self.marks))
        return f"{'▾' if self.is_open else '▸'} {self._title}{f'  {signs}' if signs else ''}"

    def sync(self, text: str, marks: Sequence[Mark]) -> None:
        """Show the whole thinking so far, of which what is shown is a beginning."""
        n_marks = len(self.marks)
        self.marks = list(marks)
        if not self.is_mounted:
            self.text = text
            return
        if len(self.marks) != n_marks:
            self.query_one("#fold", Static).update(self._caption(), layout=False)
            first = min((mark.position for mark in self.marks[n_marks:]), default=0)
            for start, piece in self._pieces[:-1]:
                if start + _PIECE >= first or start >= first:
                    self._render_piece(start, piece)
        if not text.startswith(self.text):  # a control took some of it back
            self._pieces.clear()
            self.query_one("#body").remove_children()
        if text != self.text or len(self.marks) != n_marks:
            self._lay_out(text)

    def _lay_out(self, text: str) -> None:
        """New pieces for what came since."""
        self.text = text
        fresh: list[Paragraph] = []
        start = self._pieces[-1][0] if self._pieces else 0
        while text[start:].strip():
            if not self._pieces or self._pieces[-1][0] != start:
                self._pieces.append((start, Paragraph("")))
                fresh.append(self._pieces[-1][1])
            self._render_piece(*self._pieces[-1])
            end = text.find("\n\n", start + _PIECE)
            if end < 0:
                break
            self._render_piece(*self._pieces[-1], end)
            start = end + 2
        if fresh:
            self.query_one("#body").mount_all(fresh)

    def _render_piece(self, start: int, piece: Paragraph, end: int = -1) -> None:
        if end < 0:
            following = next((other for other, _ in self._pieces if other > start), None)
            end = len(self.text) if following is None else following - 2
        parts: list[Content] = []
        at = start
        for index, mark in enumerate(self.marks):
            is_at_break = mark.position == end < len(self.text)  # the next piece begins with it
            if mark.phase != "think" or not start <= mark.position <= end or is_at_break:
                continue
            parts.append(Content(visible(self.text[at : mark.position])))
            written = mark.text if mark.kind == "forced" and self.text.startswith(mark.text, mark.position) else ""
            at = max(at, mark.position + len(written))
            parts.append(self._mark(index, mark, written))
        parts.append(Content(visible(self.text[at:end])))
        piece.update(Content("").join(parts).rstrip())

    def _mark(self, index: int, mark: Mark, written: str) -> Content:
        look = "reverse" if index == self.selected else "underline" if written else ""
        shown = Content(SIGNS[mark.kind] + visible(written)).stylize(f"$accent {look}".strip())
        return shown.stylize(Style.from_meta({"@click": f"mark({index})"}))

    def step(self, step: int) -> str:
        """Select the next or previous mark; its explanation, empty where there is none."""
        if not self.marks:
            return ""
        at = -1 if self.selected is None and step > 0 else 0 if self.selected is None else self.selected
        return self.select((at + step) % len(self.marks))

    def select(self, index: int) -> str:
        """Explain a mark under the thinking."""
        self.selected = index
        self.fold(True)
        for start, piece in self._pieces:
            self._render_piece(start, piece)
        text = f"{explain(self.marks[index])}  ({index + 1} of {len(self.marks)})"
        explanation = self.query_one("#explanation", Static)
        explanation.update(text)
        explanation.display = True
        explanation.scroll_visible(animate=False)
        return text

    def on_paragraph_mark_clicked(self, event: Paragraph.MarkClicked) -> None:
        event.stop()
        self.select(event.index)

    def on_click(self, event: Click) -> None:
        if event.widget is not None and event.widget.id == "fold":
            event.stop()
            self.fold(not self.is_open)
