"""All keys on one screen, made of the bindings themselves."""

from collections.abc import Iterable
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

_EXTRA = (
    ("Writing", (("enter", "send"), ("ctrl+j, shift+enter, \\ enter", "new line"), ("up, down", "earlier inputs"))),
)


class Keys(ModalScreen[None]):
    """Esc or F1 closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f1,q,enter", "dismiss", "Close")]

    def __init__(self, groups: Iterable[tuple[str, Iterable[Binding]]]) -> None:
        super().__init__()
        rows = [
            (title, tuple((b.key.replace(",", ", "), b.tooltip or b.description) for b in bindings))
            for title, bindings in groups
        ]
        self._groups = [*_EXTRA, *rows]

    def compose(self) -> ComposeResult:
        lines: list[Content] = []
        for title, rows in self._groups:
            lines.append(Content.assemble((title, "bold $primary")))
            lines += [Content.assemble(f"  {keys:<30}", (text, "$foreground 55%")) for keys, text in rows]
            lines.append(Content(""))
        with Vertical(classes="dialog tall"):
            yield Static("Keys", classes="dialog-title", markup=False)
            with VerticalScroll():
                yield Static(Content("\n").join(lines))
            yield Static("Esc closes. Ctrl+P finds every command by name.", classes="dialog-help", markup=False)
