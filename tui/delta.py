"""What a screen hears of a reply, and how the loop's events of many tokens become a few of these."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from ..runtime.events import Event, Finished, Noted, Prefilled, Token
from ..runtime.sequence import Origin, Phase, Sequence
from ..runtime.tokenizer import Tokenizer
from .conversation import Mark, MarkKind, Stats
from .reply import Context, Reply, Sample

PERIOD_SECONDS = 1 / 30
"""Between two posts of a reply's news, times its samples."""


@dataclass(frozen=True, slots=True)
class Started:
    """The prompt has been made and `reply.samples` are there. Its evaluation begins."""

    reply: Reply
    context: Context


@dataclass(frozen=True, slots=True)
class Progress:
    """Tokens of the prompt that are evaluated; nothing is posted where what is new of it fits one batch."""

    reply: Reply
    n_done: int
    n_total: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What one sample got since its last delta, all in one phase ("think" or "answer"). `text` is empty where only
    tokens or marks came; `n_tokens` are sampled ones; `entropies` in nats, of some thinking tokens, while watched."""

    reply: Reply
    sample: int
    phase: str
    text: str
    n_tokens: int
    entropies: tuple[float, ...]
    marks: tuple[Mark, ...]


@dataclass(frozen=True, slots=True)
class SampleEnded:
    """One sample of a reply ended; `reason` as in `Sample.reason`."""

    reply: Reply
    sample: int
    reason: str


@dataclass(frozen=True, slots=True)
class Ended:
    """The reply is over, by itself or stopped: `reply.state`, `reply.winner`."""

    reply: Reply
    stats: Stats


@dataclass(frozen=True, slots=True)
class Failed:
    """The reply could not be made, or not to its end; what was written stays in its samples. Others can be started."""

    reply: Reply
    message: str


StreamEvent = Started | Progress | Delta | SampleEnded | Ended | Failed
"""`Started` comes first, unless the reply fails or is stopped before; `Ended` or `Failed` comes last, and once."""


@dataclass(slots=True)
class _Part:
    """A delta that still grows."""

    phase: str
    texts: list[str] = field(default_factory=list)
    n_tokens: int = 0
    entropies: list[float] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)


@dataclass(slots=True)
class _Feed:
    """One sample's deltas to come, and the run of forced or hinted tokens that is open."""

    sample: Sample
    parts: list[_Part] = field(default_factory=list)
    n_sampled: int = 0
    n_entropies: int = 0
    run: tuple[int, str, MarkKind] | None = None
    bytes: bytearray = field(default_factory=bytearray)

    def part(self, phase: str) -> _Part:
        if not self.parts or self.parts[-1].phase != phase:
            self.parts.append(_Part(phase))
        return self.parts[-1]

    def mark(self, position: int, phase: str, kind: MarkKind, text: str) -> None:
        mark = Mark(position, phase, kind, text)
        self.sample.marks.append(mark)
        self.part(phase).marks.append(mark)

    def close_run(self) -> None:
        if self.run is not None:
            self.mark(*self.run, self.bytes.decode("utf-8", "replace"))
            self.run, self.bytes = None, bytearray()


class Feeder:
    """Gathers the events of one reply and posts them at most about 30 times a second, all samples together."""

    def __init__(self, reply: Reply, tokenizer: Tokenizer, post: Callable[[StreamEvent], object]) -> None:
        self._reply = reply
        self._tokenizer = tokenizer
        self._post = post
        self._feeds = [_Feed(sample) for sample in reply.samples]
        self._probed: Sequence | None = None
        """Whose probe gave the latest token: a note right behind it is what the control read."""
        self._posted = 0.0

    def take(self, event: Event) -> None:
        """One event of the loop; the sample of a `Finished` is flushed."""
        feed = self._feeds[event.sequence.sample]
        probed, self._probed = self._probed, None
        if isinstance(event, Token):
            self._take_token(feed, event)
        elif isinstance(event, Noted):
            feed.close_run()
            is_reading = probed is event.sequence
            kind = "probe" if is_reading else "suppressed" if event.control == "suppress" else "note"
            phase, position = _place(event.sequence)
            feed.mark(position, phase, kind, event.text)
        elif isinstance(event, Finished):
            feed.close_run()
            feed.sample.counters = {name: dict(values) for name, values in event.counters.items()}
            self.flush()
            self._post(SampleEnded(self._reply, feed.sample.index, event.reason))
            return
        elif self._is_due():
            self._post_progress(event)
        if self._is_due():
            self.flush()

    def flush(self) -> None:
        """Post what was gathered."""
        self._posted = time.perf_counter()
        for feed in self._feeds:
            parts, feed.parts = feed.parts, []
            for part in parts:
                text = "".join(part.texts)
                self._post(
                    Delta(
                        self._reply,
                        feed.sample.index,
                        part.phase,
                        text,
                        part.n_tokens,
                        tuple(part.entropies),
                        tuple(part.marks),
                    )
                )

    def _is_due(self) -> bool:
        return time.perf_counter() - self._posted >= PERIOD_SECONDS * len(self._feeds)

    def _post_progress(self, event: Prefilled) -> None:
        self._posted = time.perf_counter()
        self._post(Progress(self._reply, event.n_done, event.n_total))

    def _take_token(self, feed: _Feed, event: Token) -> None:
        if event.origin is Origin.PROBE:
            self._probed = event.sequence
            return
        sample, now = feed.sample, time.perf_counter()
        if not event.is_continued:
            self._follow_run(feed, event)
        if event.origin is Origin.SAMPLED:
            sample.last = now
            sample.first = now if sample.first is None else sample.first
        phase = event.phase.value if event.phase is not Phase.PROMPT else Phase.ANSWER.value
        if phase == Phase.THINK:
            sample.last_thinking = now
        n_sampled = sample.n_sampled
        if not event.text and n_sampled == feed.n_sampled:
            return
        part = feed.part(phase)
        part.texts.append(event.text)
        part.n_tokens += n_sampled - feed.n_sampled
        part.entropies += sample.entropies[feed.n_entropies :]
        feed.n_sampled, feed.n_entropies = n_sampled, len(sample.entropies)

    def _follow_run(self, feed: _Feed, event: Token) -> None:
        """Gather forced and hinted tokens into one mark."""
        if event.origin is Origin.SAMPLED:
            feed.close_run()
            return
        kind: MarkKind = "hint" if event.origin is Origin.HINT else "forced"
        if feed.run is not None and feed.run[2] != kind:
            feed.close_run()
        if feed.run is None:
            phase, position = _place(event.sequence)
            if event.text and event.phase == phase:
                position -= len(event.text)
            feed.run = (position, phase, kind)
        feed.bytes += self._tokenizer.piece(event.id)


def _place(sequence: Sequence) -> tuple[str, int]:
    """Where a sample has got to: the phase and the number of its characters."""
    if sequence.phase is Phase.ANSWER:
        return Phase.ANSWER.value, len(sequence.answer)
    return Phase.THINK.value, len(sequence.thinking)
