"""A list to choose from, narrowed by typing, with an explanation of what is highlighted."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from ..visible import visible


@dataclass(frozen=True, slots=True)
class Choice:
    """One line of the list: what is given back, what is shown, at the right of it, and what explains it. Without an
    id it is a heading."""

    id: str
    title: str
    detail: str = ""
    explanation: str = ""


class Chooser(ModalScreen[str | None]):
    """Gives the id of a choice, or None. The list has no focus of its own: typing narrows it, arrows walk in it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Leave"),
        Binding("up", "walk('up')", "Up", show=False, priority=True),
        Binding("down", "walk('down')", "Down", show=False, priority=True),
        Binding("pageup", "walk('page_up')", "Page up", show=False, priority=True),
        Binding("pagedown", "walk('page_down')", "Page down", show=False, priority=True),
    ]

    def __init__(self, title: str, choices: Iterable[Choice], current: str = "", help: str = "") -> None:
        super().__init__()
        self._title = title
        self._choices = list(choices)
        self._current = current
        self._help = help or "Type to narrow the list. Enter takes it, Esc leaves it."

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog tall"):
            yield Static(self._title, classes="dialog-title", markup=False)
            yield Input(placeholder="search")
            yield OptionList(compact=True)
            yield Static("", classes="explanation", markup=False)
            yield Static(self._help, classes="dialog-help", markup=False)

    def on_mount(self) -> None:
        self.query_one(OptionList).can_focus = False
        self.fill(self._choices)

    def find(self, query: str) -> list[Choice]:
        """The choices for what was typed; each word has to be in a title or a detail."""
        words = query.casefold().split()
        return [c for c in self._choices if all(w in f"{c.title} {c.detail}".casefold() for w in words)]

    def fill(self, choices: list[Choice]) -> None:
        """Show these, with the current one highlighted, else the first."""
        self.shown = choices
        options = self.query_one(OptionList)
        options.clear_options()
        options.add_options([Option(self._line(c), disabled=not c.id) for c in choices])
        ids = [choice.id for choice in choices]
        first = next((i for i, id in enumerate(ids) if id), None)
        options.highlighted = ids.index(self._current) if self._current in ids and self._current else first
        self._explain()

    def _line(self, choice: Choice) -> Content:
        if not choice.id:
            return Content.assemble((choice.title, "bold $foreground 55%"))
        sign = "● " if choice.id == self._current else "  "
        title = " ".join(visible(choice.title).split())
        detail = " ".join(visible(choice.detail).split())
        return Content.assemble(sign, title, (f"  {detail}" if detail else "", "$foreground 55%")).truncate(400)

    @property
    def highlighted(self) -> Choice | None:
        at = self.query_one(OptionList).highlighted
        return self.shown[at] if at is not None and at < len(self.shown) else None

    def _explain(self) -> None:
        choice = self.highlighted
        self.query_one(".explanation", Static).update(visible(choice.explanation) if choice is not None else "nothing")

    def on_input_changed(self, event: Input.Changed) -> None:
        self.fill(self.find(event.value))

    def on_input_submitted(self) -> None:
        self._take()

    def on_option_list_option_highlighted(self) -> None:
        self._explain()

    def on_option_list_option_selected(self) -> None:
        self._take()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        event.stop()

    def _take(self) -> None:
        choice = self.highlighted
        if choice is not None and choice.id:
            self.dismiss(choice.id)

    def action_walk(self, where: str) -> None:
        options = self.query_one(OptionList)
        if where in ("up", "down"):
            getattr(options, f"action_cursor_{where}")()
        else:
            getattr(options, f"action_{where}")()

    def action_leave(self) -> None:
        self.dismiss(None)
