"""Errors of ours as notices, so that none of them ends the chat."""

import contextlib
from collections.abc import Iterator

from textual.widget import Widget

from ..runtime.errors import LocalReasonError


@contextlib.contextmanager
def told(widget: Widget) -> Iterator[None]:
    """What goes wrong within becomes a notice on the widget's app."""
    try:
        yield
    except LocalReasonError as error:
        widget.notify(str(error), severity="error", markup=False)
