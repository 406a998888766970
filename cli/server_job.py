"""A request under way: what its sequences' events become for its reader, stop words and log-probabilities included."""

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ..runtime.controls.search import FirstFinishSearch
from ..runtime.decode import Request
from ..runtime.engine import Row
from ..runtime.events import Event, Finished, Token
from ..runtime.markup import n_begun
from ..runtime.sequence import Counts, Origin, Phase, Sequence
from ..runtime.tokenizer import Tokenizer
from .server_schema import Wanted

Counters = dict[str, dict[str, int | float]]


@dataclass(frozen=True, slots=True)
class Chance:
    """A sampled token of the answer, the natural logarithm of its probability, and the likeliest ones in its place.

    The model's own distribution at temperature 1, after what controls ban. `start` is where its text begins in the
    answer.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]
    start: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one choice ended. `stop` is the decode loop's reason, or `stop` for a stop word."""

    stop: str
    counts: Counts
    counters: Counters
    sample: int = 0
    n_reply: int = 0
    """Tokens of the reply as it stands: without its end, and what controls took back."""


@dataclass(frozen=True, slots=True)
class Update:
    """News of one choice for its reader."""

    index: int
    kind: Literal["think", "answer", "end", "error"]
    text: str = ""
    chances: tuple[Chance, ...] = ()
    outcome: Outcome | None = None


class StopWords:
    """Releases text up to the first stop word, holding back what may be the beginning of one."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words
        self._held = ""
        self.is_found = False

    def feed(self, text: str) -> str:
        """The text that can be shown now."""
        if not self._words or self.is_found:
            return "" if self.is_found else text
        held = self._held + text
        starts = [start for word in self._words if (start := held.find(word)) >= 0]
        if starts:
            self.is_found, self._held = True, ""
            return held[: min(starts)]
        n = max(n_begun(held, word) for word in self._words)
        self._held = held[len(held) - n :]
        return held[: len(held) - n]

    def flush(self) -> str:
        """What was held back, once the reply has ended."""
        held, self._held = self._held, ""
        return held


@dataclass(slots=True, eq=False)
class _Sample:
    """One sequence of a choice, and what its reader has been or would be told."""

    sequence: Sequence
    words: StopWords
    is_trimmed: bool
    """True where white space before the answer is dropped."""
    chances: "deque[Chance] | None" = None
    counters: Counters = field(default_factory=dict)
    updates: list[Update] = field(default_factory=list)
    waiting: list[Chance] = field(default_factory=list)
    n_fed: int = 0
    n_shown: int = 0
    stop: str | None = None

    def read(self, event: Token, index: int) -> list[Update]:
        """What a token shows."""
        if event.origin is Origin.PROBE:
            return []
        is_own = event.origin is Origin.SAMPLED and not event.is_continued
        chance = self.chances.popleft() if self.chances and is_own else None
        if event.phase is Phase.THINK:
            if not self.n_fed:
                self.waiting.clear()  # a tag that was sampled in several tokens is no part of the answer
            return [Update(index, "think", event.text)] if event.text else []
        text = event.text
        if self.is_trimmed and not self.n_fed:
            text = text.lstrip()
        if chance is not None and not event.sequence.is_ending and not event.sequence.is_closing:
            self.waiting.append(Chance(chance.token, chance.logprob, chance.top, self.n_fed))
        self.n_fed += len(text)
        shown = self.words.feed(text) if text else ""
        if self.words.is_found:
            event.sequence.cancel("stop")
        return self._show(shown, index, is_last=False)

    def flush(self, index: int) -> list[Update]:
        """What was held back to the end."""
        return self._show(self.words.flush(), index, is_last=True)

    def _show(self, text: str, index: int, is_last: bool) -> list[Update]:
        self.n_shown += len(text)
        is_all = is_last and not self.words.is_found
        chances = tuple(chance for chance in self.waiting if is_all or chance.start < self.n_shown)
        self.waiting = self.waiting[len(chances) :]
        return [Update(index, "answer", text, chances)] if text or chances else []


class Choice:
    """One reply: a sequence, or several that race, of which the winner's text is shown once it is known."""

    def __init__(self, index: int, requests: list[Request], wanted: Wanted) -> None:
        self.index = index
        self.requests = requests
        self._search = next((c for c in requests[0].controls if isinstance(c, FirstFinishSearch)), None)
        self.samples = [
            _Sample(
                request.sequence,
                StopWords(wanted.stop),
                wanted.is_chat,
                None if wanted.n_top is None else record(request, wanted.n_top),
            )
            for request in requests
        ]
        self.is_done = False

    def take(self, event: Event) -> list[Update]:
        """What an event of one of the sequences means to the reader."""
        sample = self.samples[event.sequence.sample]
        if isinstance(event, Token):
            updates = sample.read(event, self.index)
        elif isinstance(event, Finished):
            sample.counters = {name: dict(values) for name, values in event.counters.items()}
            return self.end(sample, event.reason)
        else:
            return []
        if len(self.samples) == 1:
            return updates
        sample.updates += updates
        return []

    def end(self, sample: "_Sample", reason: str) -> list[Update]:
        """A sequence has ended, or never began; the last one of a choice decides it."""
        sample.stop = reason
        updates = sample.flush(self.index)
        if len(self.samples) > 1:
            sample.updates += updates
            updates = []
        if any(one.stop is None for one in self.samples):
            return []
        self.is_done = True
        chosen = self._winner()
        counters = chosen.counters
        if self._search:
            counters = {**counters, "search": self._search.tally()}
        if len(self.samples) > 1:
            updates = chosen.updates
        sequence, stop = chosen.sequence, chosen.stop or reason
        n_reply = sequence.n_reply - (stop == "end")
        outcome = Outcome(stop, sequence.counts, counters, sequence.sample, n_reply)
        return [*updates, Update(self.index, "end", outcome=outcome)]

    def _winner(self) -> "_Sample":
        winner = self._search.winner() if self._search else None
        return self.samples[winner.sample if winner is not None else 0]


class Job:
    """A request with its choices; made and read in the event loop, fed by the decode thread through the runner."""

    def __init__(self, id: str, wanted: Wanted, choices: list[Choice]) -> None:
        self.id = id
        self.wanted = wanted
        self.choices = choices
        self.created = int(time.time())
        self.submitted = time.perf_counter()
        self.begun: float | None = None
        self.first_token: float | None = None
        self.ended: float | None = None
        self._inbox: list[Update] = []
        self._ready = asyncio.Event()

    @property
    def sequences(self) -> list[Sequence]:
        return [sample.sequence for choice in self.choices for sample in choice.samples]

    @property
    def is_done(self) -> bool:
        return all(choice.is_done for choice in self.choices)

    def put(self, updates: list[Update]) -> None:
        """Hand updates to the reader. What waits is bounded by the reply's token limit, so a slow reader costs
        memory, and never the time of others."""
        self._inbox += updates
        self._ready.set()

    async def updates(self) -> list[Update]:
        """All that is new, once there is something."""
        await self._ready.wait()
        self._ready.clear()
        news, self._inbox = self._inbox, []
        return news


def record(request: Request, n_top: int) -> "deque[Chance]":
    """Let a request's sampling leave the log-probability of each token in the queue that is returned."""
    draw: Callable[[Row], int] = request.sample
    chances: deque[Chance] = deque()

    def sample(row: Row) -> int:
        token = draw(row)
        shifted = row - row.max()
        logprobs = shifted - np.log(np.exp(shifted).sum(dtype=np.float64))
        ids: list[int] = []
        if n_top:
            best = np.argpartition(logprobs, -n_top)[-n_top:] if n_top < len(logprobs) else np.arange(len(logprobs))
            ids = [int(i) for i in best[np.argsort(-logprobs[best], kind="stable")]]
        top = tuple((i, float(logprobs[i])) for i in ids)
        chances.append(Chance(token, float(logprobs[token]), top))
        return token

    request.sample = sample
    return chances


def piece_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's bytes as text; U+FFFD for what is no whole character."""
    return tokenizer.piece(token).decode("utf-8", "replace")
