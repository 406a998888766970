"""What workers, threads and widgets tell the screen."""

from dataclasses import dataclass

from textual.message import Message

from .backend import Opened
from .delta import StreamEvent


@dataclass
class Streamed(Message):
    """Something happened in the decode."""

    event: StreamEvent


@dataclass
class OpenProgress(Message):
    """A model is fetched or opened: what goes on, bytes done and in all, 0 where that is not known."""

    text: str
    n_done: int = 0
    n_total: int = 0


@dataclass
class ModelOpened(Message):
    """A model is ready."""

    opened: Opened


@dataclass
class OpenFailed(Message):
    """A model could not be opened; nothing is open now."""

    text: str
