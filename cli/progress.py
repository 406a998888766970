"""The progress bar of a file of problems, on standard error."""

import sys
import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from .batch import Tally

_REFRESH_SECONDS = 0.2


class Bar:
    """Done and left, tokens a second, time left, and accuracy so far."""

    def __init__(self, tally: "Tally") -> None:
        self._tally = tally
        self._due = 0.0
        self._progress = Progress(
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._progress.add_task("", total=tally.n_left + len(tally.rows), state="")

    def __enter__(self) -> "Bar":
        self._progress.start()
        self.update(is_due=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, is_due: bool = False) -> None:
        """Show the tally as it is now, some times a second at most unless a row is due."""
        if not is_due and time.monotonic() < self._due:
            return
        self._due = time.monotonic() + _REFRESH_SECONDS
        tally = self._tally
        state = f"{tally.n_left} left  {tally.n_tokens / tally.seconds:.1f} tokens/s  {tally.accuracy()}"
        self._progress.update(self._task, completed=len(tally.rows), state=state.rstrip())
