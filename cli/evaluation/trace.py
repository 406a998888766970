"""The record of a reply's steps, as `--trace` keeps it in a row and `localreason trace` shows it.

A step is a list: `[sample, "token", text, phase, origin]` or `[sample, "note", control, text]`. Where
the model tells its tokens' bytes, the text is all that was written, marks of the thinking, hints and probes too, which
the reader of the reply never saw.
"""

from collections.abc import Callable
from typing import Any

from ...runtime.events import Noted, Token
from ...runtime.sequence import Origin
from ...runtime.tokenizer import StreamDecoder

Steps = list[list[Any]]


class Recorder:
    """Keeps the steps of all questions in flight; `piece` takes a token to its bytes, where the model tells them."""

    def __init__(self, piece: Callable[[int], bytes] | None = None) -> None:
        self._piece = piece
        self._steps: dict[str, Steps] = {}
        self._decoders: dict[tuple[str, int, str], StreamDecoder] = {}

    @classmethod
    def of(cls, model: object) -> "Recorder":
        """For the events of a model, whose tokenizer is asked where it has one."""
        return cls(getattr(getattr(model, "tokenizer", None), "piece", None))

    def add(self, event: object) -> None:
        """Keep what an event of the decode loop tells; others are passed over."""
        if not isinstance(event, Noted | Token):
            return
        sequence = event.sequence
        steps = self._steps.setdefault(sequence.id, [])
        if isinstance(event, Noted):
            steps.append([sequence.sample, "note", event.control, event.text])
        elif self._piece is None:
            steps.append([sequence.sample, "token", event.text, str(event.phase), str(event.origin)])
        elif not event.is_continued:
            stream = event.origin if event.origin in (Origin.HINT, Origin.PROBE) else "reply"
            decoder = self._decoders.setdefault((sequence.id, sequence.sample, str(stream)), StreamDecoder())
            text = decoder.feed(self._piece(event.id))
            steps.append([sequence.sample, "token", text, str(event.phase), str(event.origin)])

    def take(self, id: str) -> Steps:
        """The steps of a question that is done, which are forgotten here."""
        for key in [key for key in self._decoders if key[0] == id]:
            del self._decoders[key]
        return self._steps.pop(id, [])
