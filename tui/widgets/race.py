"""Samples of one question side by side: who thinks, who answers, who won."""

import re

from textual.app import ComposeResult
from textual.containers import HorizontalScroll, Vertical
from textual.widgets import Static

from ...runtime.formats import FORMATS

_N_TAIL = 600
_TAGS = re.compile("|".join(re.escape(tag) for one in FORMATS.values() for tag in one.opens + one.closes))
"""What begins or ends thinking. A model whose thinking was closed for it may write the end once more, in its answer."""
_STATES = {"thinking": "…", "answering": "›", "done": "✓", "won": "★", "lost": "✗", "stopped": "■"}


class Lane(Vertical):
    """One sample: its number, state and count, and the end of its text."""

    def __init__(self, sample: int) -> None:
        super().__init__()
        self.sample = sample
        self.state = "thinking"
        self.n_tokens = 0
        self._tail = ""

    def compose(self) -> ComposeResult:
        yield Static(self.caption, classes="caption", markup=False)
        yield Static("", classes="tail", markup=False)

    @property
    def caption(self) -> str:
        return f"{_STATES[self.state]} {self.sample + 1} {self.state} · {self.n_tokens}"

    def add(self, text: str, n_tokens: int) -> None:
        """More text; only the end of it is kept."""
        self.n_tokens += n_tokens
        self._tail = (self._tail + text)[-_N_TAIL:]
        self.query_one(".tail", Static).update(self._last_lines(), layout=False)
        self._caption()

    def become(self, state: str) -> None:
        """Show another state: thinking, answering, done, won, lost or stopped."""
        if state != self.state:
            self.remove_class(self.state)
            self.add_class(state)
            self.state = state
            self._caption()

    def _caption(self) -> None:
        self.query_one(".caption", Static).update(self.caption, layout=False)

    def _last_lines(self) -> str:
        # A lane has few rows, and new text has to be in sight.
        width, height = max(8, self.content_size.width), max(1, self.content_size.height - 1)
        flat = " ".join(_TAGS.sub(" ", self._tail).split())
        return flat[-(width * height * 9 // 10) :]


class Race(HorizontalScroll, can_focus=False):
    """The lanes of one reply. It stays when the race is over, with the winner marked."""

    def __init__(self, n_samples: int) -> None:
        super().__init__()
        self._lanes = [Lane(sample) for sample in range(n_samples)]

    def compose(self) -> ComposeResult:
        yield from self._lanes

    def lane(self, sample: int) -> Lane:
        return self._lanes[sample]

    def finish(self, winner: int | None) -> None:
        """Mark the winner and the others."""
        for lane in self._lanes:
            if lane.sample == winner:
                lane.become("won")
            elif lane.state != "stopped":
                lane.become("lost")
