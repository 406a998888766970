"""A model on its way: fetched, then loaded."""

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.widgets import ProgressBar, Static


class Opening(Vertical):
    """What goes on and how far it is; hidden while nothing is opened."""

    def compose(self) -> ComposeResult:
        yield Static("", markup=False)
        yield ProgressBar(show_eta=True)

    def on_mount(self) -> None:
        self.display = False

    def show(self, text: str, n_done: int, n_total: int) -> None:
        """The bar is there only where the bytes are known."""
        self.display = True
        amount = f"  {n_done / 1e9:.2f} of {n_total / 1e9:.2f} GB" if n_total else ""
        self.query_one(Static).update(f"{text}{amount}")
        bar = self.query_one(ProgressBar)
        bar.display = n_total > 0
        bar.update(total=n_total or None, progress=n_done)

    def hide(self) -> None:
        self.display = False
