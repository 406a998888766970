"""Where a message is written: several lines, the earlier inputs, long pastes and files folded to one line."""

import itertools
from dataclasses import dataclass

from textual import events
from textual.message import Message
from textual.widgets import TextArea

from ..visible import is_visible, visible

_FOLD_LINES = 12
_FOLD_CHARACTERS = 2000
NEWLINE_KEYS = ("ctrl+j", "shift+enter", "alt+enter")
"""Keys for a new line: the first arrives from every terminal, the others from some."""


class Composer(TextArea):
    """The input. Enter sends; a long paste stands as `[paste 1: 40 lines, 2000 characters]` and is sent in full."""

    @dataclass
    class Sent(Message):
        """The user sent this text, folded parts written out; and what it was before that, for one that is refused."""

        text: str
        typed: str
        folded: dict[str, str]

    def __init__(self, id: str | None = None) -> None:
        super().__init__(
            id=id,
            soft_wrap=True,
            show_line_numbers=False,
            highlight_cursor_line=False,
            placeholder="Ask something. Enter sends, Ctrl+J begins a new line, F1 shows all keys.",
        )
        self._folded: dict[str, str] = {}
        self._n_pasted = 0
        self._inputs: list[str] = []
        self._at = 0
        self._draft = ""

    def remember(self, inputs: list[str]) -> None:
        """The earlier inputs, oldest first; up and down walk through them."""
        self.leave_inputs()
        self._inputs = list(inputs)
        self._at = len(self._inputs)

    def leave_inputs(self) -> None:
        """Go back from an earlier input to the draft."""
        if self._at < len(self._inputs):
            self.restore(self._draft)
            self._at = len(self._inputs)

    def fold(self, kind: str, name: str, text: str) -> None:
        """Put a text in as one line that stands for it."""
        n_lines, stem = text.count("\n") + 1, visible(f"{kind} {name}")
        size = f"{n_lines} {'line' if n_lines == 1 else 'lines'}, {len(text)} characters"
        names = (stem if n == 1 else f"{stem} ({n})" for n in itertools.count(1))
        label = next(label for name in names if self._folded.get(label := f"[{name}: {size}]", text) == text)
        self._folded[label] = text
        self.insert(label)

    @property
    def folded(self) -> tuple[str, ...]:
        """The lines in the text that stand for more."""
        return tuple(label for label in self._folded if label in self.text)

    def expanded(self) -> str:
        """The text with what was folded."""
        text = self.text
        for label, whole in self._folded.items():
            text = text.replace(label, whole)
        return text

    def restore(self, text: str) -> None:
        """Begin with this text, folded if it is long."""
        self.text = ""
        self._folded.clear()
        if _is_folded(text):
            self.fold("text", "1", text)
        else:
            self.text = text
        self.move_cursor(self.document.end)

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter" or event.key in NEWLINE_KEYS:
            event.stop()
            event.prevent_default()
            before = self.get_text_range((self.cursor_location[0], 0), self.cursor_location)
            if event.key == "enter" and not before.endswith("\\"):
                self._send()
                return
            if event.key == "enter":  # a backslash at the end of a line, where no other key for it arrives
                self.action_delete_left()
            self.insert("\n")

    async def _on_paste(self, event: events.Paste) -> None:
        # Many terminals send what the Enter key would send.
        event.text = event.text.replace("\r\n", "\n").replace("\r", "\n")
        if _is_folded(event.text):
            event.stop()
            event.prevent_default()
            self._n_pasted += 1  # what was sent may be put back beside it
            self.fold("paste", str(self._n_pasted), event.text)

    def action_delete_left(self) -> None:
        """A folded part goes as a whole: half of its line would be sent as it stands."""
        if not self._delete_folded(at_end=True):
            super().action_delete_left()

    def action_delete_right(self) -> None:
        if not self._delete_folded(at_end=False):
            super().action_delete_right()

    def _delete_folded(self, at_end: bool) -> bool:
        """Delete the folded part that the cursor is in, or stands at the end or the beginning of."""
        row, column = self.cursor_location
        line = self.document.get_line(row)
        for label in self._folded if self.selection.is_empty else ():
            start = line.find(label)
            end = start + len(label)
            if start >= 0 and (start < column <= end if at_end else start <= column < end):
                self.delete((row, start), (row, end))
                return True
        return False

    def _send(self) -> None:
        """Give the text away at once: keys that follow belong to the next one."""
        if self._has_stump():
            self.notify("Half of a folded text would be sent as it stands; Ctrl+Z undoes, or delete it.")
            return
        text = self.expanded().strip()
        if text:
            self.post_message(self.Sent(text, self.text, dict(self._folded)))
            self._at = len(self._inputs)
            with self.prevent(TextArea.Changed):  # it is no other draft until it is sent or put back
                self.text = ""
            self._folded.clear()

    def _has_stump(self) -> bool:
        left = self.text
        for label in self._folded:
            left = left.replace(label, "")
        ends = ((label[: label.index(":") + 1], label[label.rindex(",") :]) for label in self._folded)
        return any(first in left or last in left for first, last in ends)

    def note_sent(self, sent: Sent) -> None:
        """What was sent can be called back with up."""
        self._inputs.append(sent.text)
        self._at = len(self._inputs)

    def put_back(self, sent: Sent) -> None:
        """What was refused stands before what was written since."""
        self._folded = sent.folded | self._folded
        with self.prevent(TextArea.Changed):
            self.text = sent.typed + self.text
        self.move_cursor(self.document.end)

    def action_cursor_up(self, select: bool = False) -> None:
        if not select and self.get_cursor_up_location()[0] == 0 and self.cursor_at_first_line:
            if self._at > 0:
                if self._at == len(self._inputs):
                    self._draft = self.expanded()
                self._at -= 1
                self.restore(self._inputs[self._at])
            return
        super().action_cursor_up(select)

    def action_cursor_down(self, select: bool = False) -> None:
        if not select and self.cursor_at_last_line and self._at < len(self._inputs):
            self._at += 1
            self.restore(self._inputs[self._at] if self._at < len(self._inputs) else self._draft)
            return
        super().action_cursor_down(select)


def _is_folded(text: str) -> bool:
    """True for a text that is long, or would do something to the terminal."""
    return text.count("\n") >= _FOLD_LINES or len(text) > _FOLD_CHARACTERS or not is_visible(text)
