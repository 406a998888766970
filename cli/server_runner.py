"""The server's one decode thread: requests of all clients in one continuous batch, in turn."""

import asyncio
import contextlib
import math
import secrets
import threading
import time
from bisect import insort
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from ..runtime.decode import Request, decode
from ..runtime.errors import LocalReasonError
from ..runtime.events import Event, Finished, Token
from ..runtime.model import Model
from ..runtime.prompt import Prompt
from ..runtime.sequence import Origin
from .server_constraint import constrain_all
from .server_field import Refused
from .server_job import Choice, Job, Update
from .server_schema import Wanted

_STRIDE = 0x9E3779B97F4A7C15
"""Between the seeds of a request's choices, so that choice 1 of seed 1 is not choice 0 of seed 2."""
_LONGEST_RETRY_SECONDS = 120


@dataclass(slots=True)
class Totals:
    """What was done since the start."""

    requests: Counter[str] = field(default_factory=Counter)
    """Requests by how they ended, `refused` for those that found the queue full."""
    tokens: Counter[str] = field(default_factory=Counter)
    """Tokens by kind: prompt, thinking, answer, forced, hint, probe."""
    n_first: int = 0
    first_seconds: float = 0.0
    """Sum of the times to the first token, and how many they are."""
    mean_seconds: float = 1.0
    """A moving average of how long a request runs."""


class Runner:
    """Owns the decode thread. All public methods but `stop` are called in the event loop that `start` was called in."""

    def __init__(self, model: Model, n_parallel: int, n_queue: int) -> None:
        self.model = model
        self.n_parallel = min(n_parallel, model.engine.n_sequences)
        self.n_queue = n_queue
        self.totals = Totals()
        self.jobs: dict[str, Job] = {}
        self.problem: str | None = None
        """What the engine reported last, until a reply ends well again."""
        self._waiting: list[tuple[int, Request]] = []
        """In order of their turns: a request's number, and for each further sequence as if that many requests later."""
        self._n_submitted = 0
        self._running: set[str] = set()
        """Names of the sequences in the loop: choice and sample."""
        self._owners: dict[str, tuple[Job, Choice]] = {}
        self._n_held = 0
        """Sequences that were let in and have not ended."""
        self._changed = threading.Condition(threading.RLock())
        self._is_closing = False
        self._outbox: list[tuple[Job, list[Update]]] = []
        """News for the event loop, which has been called, and has not come yet, exactly while this is not empty."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._pool = ThreadPoolExecutor(1, "prompt")  # one thread: prompts are made in the order they came in

    # --- for the event loop -------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to decode what is submitted."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def n_running(self) -> int:
        return len(self._running)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    async def submit(self, wanted: Wanted) -> Job:
        """Make the prompt and put the request into the queue. Raises Refused, PromptError, ControlError."""
        self._reserve(wanted.n_sequences)
        try:
            id = f"{'chatcmpl' if wanted.is_chat else 'cmpl'}-{secrets.token_hex(12)}"
            choices = await asyncio.get_running_loop().run_in_executor(self._pool, self._prepare, id, wanted)
            job = Job(id, wanted, choices)
            with self._changed:
                self._refuse_closing()
                self.jobs[id] = job
                for choice in choices:
                    self._owners[f"{id}/{choice.index}"] = (job, choice)
                turn = self._n_submitted
                for choice in choices:
                    n_left = 0  # those that begin together have one turn
                    for request in choice.requests:
                        n_left = n_left or request.n_together
                        insort(self._waiting, (turn, request), key=_turn)
                        n_left -= 1
                        turn += 0 if n_left else self.n_parallel + 1
                self._n_submitted += 1
                self._changed.notify()
            return job
        except BaseException:
            with self._changed:
                self._n_held -= wanted.n_sequences
            raise

    def _reserve(self, n: int) -> None:
        with self._changed:
            self._refuse_closing()
            room = self.n_parallel + self.n_queue
            if self._n_held and self._n_held + n > room:
                self.totals.requests["refused"] += 1
                seconds = math.ceil(self.totals.mean_seconds * (self._n_held / self.n_parallel))
                seconds = max(1, min(seconds, _LONGEST_RETRY_SECONDS))
                raise Refused(
                    f"{self._n_held} replies are running or waiting and this server takes {room}; "
                    f"try again in {seconds} s",
                    status=429,
                    code="queue_full",
                    headers={"Retry-After": str(seconds)},
                )
            self._n_held += n

    def _refuse_closing(self) -> None:
        if self._is_closing:
            raise Refused("the server is shutting down; try again later", status=503, headers={"Retry-After": "10"})

    def _prepare(self, id: str, wanted: Wanted) -> list[Choice]:
        """In a thread of its own: templates and long texts take their time."""
        model, recipe = self.model, wanted.recipe
        if wanted.is_chat:
            prompt = model.chat_prompt(list(wanted.turns), recipe, is_problem=False)
        else:
            recipe = replace(recipe, format="none")
            text = wanted.prompt
            prompt = model.text_prompt(text) if isinstance(text, str) else Prompt(list(text), "")
        choices: list[Choice] = []
        for i in range(wanted.n):
            seed = (recipe.seed + i * _STRIDE) % 2**63
            requests = model.samples(prompt, replace(recipe, seed=seed), f"{id}/{i}")
            if wanted.rules is not None:
                constrain_all(requests, wanted.rules, recipe, model)
            requests[0].is_continued = wanted.is_chat and wanted.n == len(requests) == 1
            choices.append(Choice(i, requests, wanted))
        return choices

    def cancel(self, job: Job, reason: str = "cancelled") -> None:
        """End a request before the next step; what waits leaves the queue at once. Of no effect once it is done."""
        with self._changed:
            for sequence in job.sequences:
                sequence.cancel(reason)
            self._give_up(job)

    def _give_up(self, job: Job) -> None:
        """End what waits of a request and was cancelled: all of it, or samples of a search that is decided."""
        for request in self._drop(job):
            sequence = request.sequence
            sequence.finish = reason = sequence.cancelled or "cancelled"
            _, choice = self._owners[sequence.id]
            self._end(job, choice.end(choice.samples[sequence.sample], reason), reason)

    def _drop(self, job: Job, is_whole: bool = False) -> list[Request]:
        """Take a request's sequences out of the queue, those that were cancelled or all."""
        mine = {id(sequence) for sequence in job.sequences if is_whole or sequence.cancelled}
        dropped = [request for _, request in self._waiting if id(request.sequence) in mine]
        self._waiting = [item for item in self._waiting if id(item[1].sequence) not in mine]
        return dropped

    def hurry(self, job: Job) -> None:
        """Close the thinking of a request and let it answer."""
        for sequence in job.sequences:
            sequence.hurry()

    def close(self) -> None:
        """Take no more requests; those that are there go on."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()

    def cancel_all(self, reason: str) -> None:
        """End all requests before the next step."""
        for job in list(self.jobs.values()):
            self.cancel(job, reason)

    def stop(self) -> None:
        """End everything and wait for the thread, which may be within a step; then the model can be closed."""
        self.close()
        self.cancel_all("shutdown")
        self._pool.shutdown()
        if self._thread.ident is not None:
            self._thread.join()

    # --- the decode thread --------------------------------------------------------------------------------------

    def __iter__(self) -> Iterator[Request]:
        return self

    def __next__(self) -> Request:
        """The next request: none while others run and nobody waits; where nothing runs, it is waited for, so that the
        loop stays alive and keeps the latest prompts."""
        with self._changed:
            while not self._waiting:
                if self._running or self._is_closing:
                    raise StopIteration
                self._changed.wait()
            _, request = self._waiting.pop(0)
            job, _ = self._owners[request.sequence.id]
            job.begun = job.begun or time.perf_counter()
            self._running.add(_name(request))
            return request

    def _run(self) -> None:
        while True:
            problem = "the decode loop ended early; report this"
            try:
                with contextlib.closing(
                    decode(self.model.engine, self.model.tokenizer, self, self.n_parallel)
                ) as events:
                    for event in events:
                        self._take(event)
            except LocalReasonError as error:
                problem = str(error)
            except Exception as error:  # as in tui/stream.py: one request must not end the server
                problem = f"this is a bug: {type(error).__name__}: {error}"
            with self._changed:
                self._fail(problem)
                if self._is_closing and not self._waiting:
                    return

    def _take(self, event: Event) -> None:
        sequence = event.sequence
        with self._changed:
            job, choice = self._owners[sequence.id]
            if isinstance(event, Token) and event.origin is Origin.SAMPLED and job.first_token is None:
                job.first_token = time.perf_counter()
                self.totals.n_first += 1
                self.totals.first_seconds += job.first_token - job.submitted
            updates = choice.take(event)
            if isinstance(event, Finished):
                self._running.discard(f"{sequence.id}/{sequence.sample}")
                self.problem = None
                self._end(job, updates, event.reason)
                self._give_up(job)
            else:
                self._post(job, updates)

    def _end(self, job: Job, updates: list[Update], reason: str) -> None:
        """One sequence has ended; the last one ends the request."""
        self._n_held -= 1
        for update in updates:
            if update.outcome is not None:
                for kind in ("prompt", "thinking", "answer", "forced", "hint", "probe"):
                    self.totals.tokens[kind] += getattr(update.outcome.counts, kind)
        if job.is_done and self.jobs.pop(job.id, None):
            job.ended = time.perf_counter()
            self.totals.requests[reason] += 1
            self.totals.mean_seconds += 0.2 * (job.ended - (job.begun or job.submitted) - self.totals.mean_seconds)
            for choice in job.choices:
                self._owners.pop(f"{job.id}/{choice.index}", None)
        self._post(job, updates)

    def _fail(self, problem: str) -> None:
        """The engine gave up all that ran: tell their readers. What waits is tried anew."""
        if not self._running:
            return
        self.problem = problem
        failed = {self._owners[name.rpartition("/")[0]][0] for name in self._running}
        self._running.clear()
        for job in failed:
            self._drop(job, is_whole=True)
            for choice in job.choices:
                self._n_held -= sum(sample.stop is None for sample in choice.samples)
                self._owners.pop(f"{job.id}/{choice.index}", None)
            self.jobs.pop(job.id, None)
            job.ended = time.perf_counter()
            self.totals.requests["error"] += 1
            self._post(job, [Update(0, "error", problem)])

    def _post(self, job: Job, updates: list[Update]) -> None:
        """To the event loop, which is called once for all that is there when it comes. Under the lock, as `_deliver`:
        so nothing is left behind by one that the other did not see."""
        if not updates or self._loop is None:
            return
        with self._changed:
            self._outbox.append((job, updates))
            if len(self._outbox) == 1:
                with contextlib.suppress(RuntimeError):  # the event loop has been closed: nobody reads
                    self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._changed:
            news, self._outbox = self._outbox, []
        for job, updates in news:
            job.put(updates)


def _turn(item: tuple[int, Request]) -> int:
    return item[0]


def _name(request: Request) -> str:
    return f"{request.sequence.id}/{request.sequence.sample}"
