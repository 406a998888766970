"""The line of instruments: what goes on, tokens a second, context, thinking budget, entropy."""

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widgets import Sparkline, Static

from .gauge import Gauge

CONTEXT_WARNING = 0.8
"""Share of the context from which on the meter warns: what is older would soon have to be left out."""
_N_ENTROPIES = 400


class Instruments(Horizontal):
    """Shows what it is told, and computes nothing."""

    def __init__(self, id: str | None = None) -> None:
        super().__init__(id=id)
        self._entropies: list[float] = []
        self.state = "ready"

    def compose(self) -> ComposeResult:
        yield Static("ready", id="state", markup=False)
        yield Static("", id="speed", markup=False)
        yield Gauge("context", CONTEXT_WARNING, id="context")
        yield Gauge("thinking", is_counting=True, id="budget")
        yield Sparkline([], id="entropy")

    def show_state(self, text: str) -> None:
        """One word or two of what goes on."""
        if text != self.state:
            self.state = text
            self.query_one("#state", Static).update(text, layout=False)

    def show_speed(self, tokens_per_second: float) -> None:
        """Of all samples together; nothing for 0."""
        self.query_one("#speed", Static).update(
            f"{tokens_per_second:.1f} tok/s" if tokens_per_second else "", layout=False
        )

    def show_context(self, n_used: int, n_limit: int) -> None:
        gauge = self.query_one("#context", Gauge)
        gauge.limit, gauge.value = n_limit, n_used

    def show_budget(self, n_thinking: int, n_limit: int | None) -> None:
        gauge = self.query_one("#budget", Gauge)
        gauge.limit, gauge.value = n_limit or 0, n_thinking

    def add_entropies(self, entropies: tuple[float, ...]) -> None:
        """The entropy of each new thinking token, in nats."""
        if entropies:
            self._entropies = [*self._entropies, *entropies][-_N_ENTROPIES:]
            self._draw()

    def begin(self) -> None:
        """A new reply."""
        self._entropies = []
        self._draw()
        self.show_speed(0)

    def on_mount(self) -> None:
        self._draw()

    def _draw(self) -> None:
        sparkline = self.query_one("#entropy", Sparkline)
        sparkline.data = self._entropies
        sparkline.visible = bool(self._entropies)
