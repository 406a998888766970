"""Pictures by matplotlib (extra `eval`): the same numbers give the same file."""

import io
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..runtime.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = ("png", "svg")


@contextmanager
def figure(name: str, size_inches: tuple[float, float], otherwise: str) -> "Generator[Figure, None, None]":
    """An empty figure; names are drawn as they are, never as formulas. `otherwise` is what a user can do without
    matplotlib. Raises InputError where it is missing."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(f'pictures need matplotlib; run pip install "localreason[eval]", or {otherwise}') from error
    settings: Any = {"text.parse_math": False, "svg.hashsalt": f"localreason {name}", "svg.fonttype": "none"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # of a name in letters that the font lacks
        yield Figure(figsize=size_inches, layout="constrained")


def encode(painted: "Figure", kind: str) -> bytes:
    """The content of a file of one of `KINDS`."""
    buffer = io.BytesIO()
    painted.savefig(buffer, format=kind, dpi=144, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
