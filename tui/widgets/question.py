"""What the user wrote, as it was written: it is not read as Markdown."""

from textual.app import ComposeResult
from textual.widgets import Static

from ..visible import visible
from .turn import Turn

_N_SHOWN = 6000


class Question(Turn):
    """A message of the user; of a very long one the beginning."""

    def compose(self) -> ComposeResult:
        text = visible(self.message.content)
        if len(text) > _N_SHOWN:
            text = f"{text[:_N_SHOWN]}\n… {len(text) - _N_SHOWN} more characters were sent"
        yield Static(f"you{self.version_text}", classes="who", markup=False)
        yield Static(text, classes="said", markup=False)
