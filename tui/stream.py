"""Decodes in a thread of its own, and tells what happens in batches that a screen can follow."""

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from ..runtime.decode import Request, decode
from ..runtime.errors import LocalReasonError
from ..runtime.events import Event, Finished
from ..runtime.model import Model
from ..runtime.recipe import Recipe
from ..runtime.template import Message as Turn
from .delta import PERIOD_SECONDS, Delta, Ended, Failed, Feeder, Progress, SampleEnded, Started, StreamEvent
from .reply import Context, Reply, Sample, measure

__all__ = [
    "Context",
    "Delta",
    "Ended",
    "Failed",
    "Progress",
    "Reply",
    "Sample",
    "SampleEnded",
    "Started",
    "StreamEvent",
    "Streamer",
]


class Streamer:
    """One decode thread over one long-lived loop, which waits while nothing runs and so keeps the latest turn.

    `on_event` is called in the decode thread, at most about 30 times a second but for starts and ends; it must be
    quick, must not raise and must not call `close`. Replies run one after the other, in the order of `start`.
    """

    def __init__(
        self, model: Model, on_event: Callable[[StreamEvent], object], is_watching_entropy: bool = False
    ) -> None:
        self.is_watching_entropy = is_watching_entropy
        """Whether entropies of thinking tokens are computed, at most about 30 a second; may be switched at any time."""
        self._model = model
        self._post = on_event
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Reply, list[Turn]]] = deque()
        self._requests: deque[Request] = deque()
        """Samples of the running reply that the loop has not taken yet."""
        self._current: Reply | None = None
        self._feeder: Feeder | None = None
        self._n_started = 0
        self._is_closing = False
        self._is_littered = False
        """True after a failure, which may have left sequences in the engine."""
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    # --- for the screen -----------------------------------------------------------------------------------------

    def start(self, turns: list[Turn], recipe: Recipe, preset: str = "") -> Reply:
        """Ask for the reply to a conversation; returns at once. A bad recipe or prompt comes back as `Failed`."""
        with self._changed:
            self._n_started += 1
            reply = Reply(self._n_started, recipe, preset)
            self._waiting.append((reply, list(turns)))
            self._changed.notify()
        return reply

    def measure(self, turns: list[Turn], recipe: Recipe) -> Context:
        """The context that a reply to these turns would begin with. Template and tokeniser run in the calling thread,
        for milliseconds. Raises PromptError."""
        n_prompt = len(self._model.chat_prompt(turns, recipe, is_problem=False).tokens)
        return measure(self._model.engine, recipe, n_prompt)

    def close(self, seconds: float = 10.0) -> bool:
        """Stop everything and end the thread, which may be within a step; True once it has ended, and only then may
        the model be closed. What waits is not heard of again."""
        with self._changed:
            self._is_closing = True
            waiting = [reply for reply, _ in self._waiting]
            self._waiting.clear()
            current = self._current
            self._changed.notify()
        for reply in waiting:
            reply.stop()
            reply.end(self._model.name)
        if current is not None:
            current.stop()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # --- the decode thread --------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        """The loop's next request. None while a reply runs whose samples all run; where nothing runs it is waited for,
        so that the loop stays alive with what it has evaluated."""
        while True:
            if self._requests:
                return self._requests.popleft()
            with self._changed:
                while not self._waiting and self._current is None and not self._is_closing:
                    self._changed.wait()
                if self._current is not None or self._is_closing:
                    raise StopIteration
                reply, turns = self._waiting.popleft()
                self._current = reply
            self._begin(reply, turns)

    def _begin(self, reply: Reply, turns: list[Turn]) -> None:
        """Make the requests of a reply; where that fails, the loop goes on without it."""
        model = self._model
        if reply.is_stopped:
            self._end(reply)
            return
        try:
            self._tidy()
            model.check_room(reply.recipe)
            prompt = model.chat_prompt(turns, reply.recipe, is_problem=False)
            requests = model.samples(prompt, reply.recipe)
        except LocalReasonError as error:
            self._fail(str(error))
            return
        reply.begin(model.engine, requests)
        for sample, request in zip(reply.samples, requests, strict=True):
            sample.watch(request, lambda: self.is_watching_entropy, PERIOD_SECONDS * len(requests))
            request.is_continued = len(requests) == 1
        self._feeder = Feeder(reply, model.tokenizer, self._post)
        self._requests.extend(requests)
        self._post(Started(reply, measure(model.engine, reply.recipe, len(prompt.tokens))))

    def _tidy(self) -> None:
        """Empty an engine that failed; nothing runs now."""
        if self._is_littered:
            for slot in range(self._model.engine.n_sequences):
                self._model.engine.rewind(slot, 0)
            self._is_littered = False

    def _run(self) -> None:
        while True:
            problem = "the decode loop ended early; report this"
            try:
                with contextlib.closing(decode(self._model.engine, self._model.tokenizer, self)) as events:
                    for event in events:
                        self._take(event)
            except LocalReasonError as error:
                problem = str(error)
            except Exception as error:  # one reply must not end the chat
                problem = f"this is a bug: {type(error).__name__}: {error}"
            self._is_littered = True
            self._fail(problem)
            with self._changed:
                if self._is_closing:
                    return

    def _take(self, event: Event) -> None:
        reply, feeder = self._current, self._feeder
        assert reply is not None
        assert feeder is not None
        feeder.take(event)
        if isinstance(event, Finished) and all(sample.reason is not None for sample in reply.samples):
            self._end(reply)

    def _end(self, reply: Reply) -> None:
        stats = reply.end(self._model.name)
        self._release()
        self._post(Ended(reply, stats))

    def _fail(self, problem: str) -> None:
        """The running reply, if there is one, is over; the next can run."""
        reply = self._current
        if reply is None:
            return
        if self._feeder is not None:
            self._feeder.flush()
        reply.end(self._model.name, problem)
        self._release()
        self._post(Failed(reply, problem))

    def _release(self) -> None:
        self._requests.clear()
        self._feeder = None
        with self._changed:
            self._current = None
