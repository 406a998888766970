"""The list of conversations: searched in full text, opened, renamed, deleted, exported."""

from collections.abc import Callable
from datetime import datetime
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.widgets import Input

from ..history import History, Summary
from ..told import told
from ..visible import visible
from .ask import Ask
from .chooser import Choice, Chooser

_N_SHOWN = 200


class Conversations(Chooser):
    """Gives the id of a conversation to open, or None."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f2", "rename", "Rename"),
        Binding("f5", "export('md')", "Markdown"),
        Binding("f6", "export('json')", "JSON"),
        Binding("f8,ctrl+delete", "delete", "Delete"),
    ]

    def __init__(
        self,
        history: History,
        current: int | None,
        export: Callable[[int, str], None],
        protected: Callable[[], int | None],
    ) -> None:
        self._history = history
        self._export = export
        self._protected = protected
        self._doomed = ""
        self.deleted: set[int] = set()
        help = "Enter opens · F2 rename · F5 to Markdown · F6 to JSON · F8 delete · Esc leaves"
        super().__init__("Conversations", _choices(history.summaries(limit=_N_SHOWN)), str(current or ""), help)

    def find(self, query: str) -> list[Choice]:
        with told(self):
            return _choices(self._history.summaries(query, _N_SHOWN))
        return []

    def _again(self) -> None:
        self.fill(self.find(self.query_one(Input).value))

    def action_rename(self) -> None:
        choice = self.highlighted
        if choice is None:
            return

        def rename(title: str | None) -> None:
            if title and title.strip():
                with told(self):
                    self._history.rename(int(choice.id), title.strip())
                    self._current = choice.id
                    self._again()

        self.app.push_screen(Ask("Rename the conversation", visible(choice.title)), rename)

    def action_delete(self) -> None:
        """The first time asks, by the key again."""
        choice = self.highlighted
        if choice is None:
            return
        if self._protected() == int(choice.id):
            self.notify("A reply is being written there; stop it first.", severity="warning")
        elif self._doomed != choice.id:
            self._doomed = choice.id
            title = visible(choice.title)
            self.notify(f"F8 again deletes “{title}” for good.", severity="warning", markup=False)
        else:
            with told(self):
                self._history.delete(int(choice.id))
                self.deleted.add(int(choice.id))
                self._again()

    def action_export(self, kind: str) -> None:
        choice = self.highlighted
        if choice is not None:
            self._export(int(choice.id), kind)


def _choices(summaries: list[Summary]) -> list[Choice]:
    return [Choice(str(one.id), one.title or "without a title", one.excerpt, _details(one)) for one in summaries]


def _details(one: Summary) -> str:
    messages = "1 message" if one.n_messages == 1 else f"{one.n_messages} messages"
    return f"{messages} · {one.model} · {datetime.fromtimestamp(one.updated):%Y-%m-%d %H:%M}"
