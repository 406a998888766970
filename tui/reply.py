"""A reply in the making: the samples that race for it, how full the context is, and what can be asked of it."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ..runtime.controls.budget import BudgetForcing
from ..runtime.controls.search import FirstFinishSearch
from ..runtime.engine import Engine, Row
from ..runtime.recipe import Recipe
from ..runtime.sampler import entropy
from ..runtime.schedule import Request
from ..runtime.sequence import Phase, Sequence
from .conversation import Mark, Stats


@dataclass(frozen=True, slots=True)
class Context:
    """Tokens of one sample's context: used, all there are with the reply, and the most that the reply may still take,
    None without a limit."""

    n_used: int
    n_limit: int
    n_wanted: int | None

    @property
    def n_left(self) -> int:
        return max(0, self.n_limit - self.n_used)

    @property
    def refusal(self) -> str:
        """One sentence where a message that is not sent yet has no room; else empty."""
        if self.n_used < self.n_limit:
            return ""
        return (
            f"with this message the conversation has {self.n_used} tokens and the context holds {self.n_limit} with "
            f"the reply; shorten the message, start a new conversation, or open the model with a larger context"
        )

    @property
    def warning(self) -> str:
        """One sentence once the reply could meet the end of the context, though not before a quarter is left; else
        empty. Nothing is ever trimmed: a prompt that does not fit is refused, a reply without room ends."""
        if self.n_used >= self.n_limit:
            return (
                f"the conversation has {self.n_used} tokens and the context holds {self.n_limit}; start a new one, "
                f"or open the model with a larger context"
            )
        n_due = self.n_limit // 4 if self.n_wanted is None else min(self.n_wanted, self.n_limit // 4)
        if self.n_left >= n_due:
            return ""
        return (
            f"{self.n_used} of {self.n_limit} tokens of context are used and a reply may want more than the "
            f"{self.n_left} that are left; start a new conversation soon, or open the model with a larger context"
        )


def measure(engine: Engine, recipe: Recipe, n_prompt: int, n_used: int | None = None) -> Context:
    """The context of a sample of `n_used` tokens, all of its prompt where nothing is written yet; several samples share
    the cells behind their prompt."""
    n_used = n_prompt if n_used is None else n_used
    n_limit = min(engine.n_context_sequence, n_prompt + max(0, engine.n_context - n_prompt) // recipe.n_samples)
    n_wanted = None if recipe.limit is None else max(0, recipe.limit - (n_used - n_prompt))
    return Context(n_used, n_limit, n_wanted)


class Sample:
    """One of the replies that race; any thread may read it at any time."""

    def __init__(self, request: Request) -> None:
        self.sequence: Sequence = request.sequence
        self.index = request.sequence.sample
        self.marks: list[Mark] = []
        self.entropies: list[float] = []
        """In nats, of thinking tokens while somebody watches; where tokens are fast, not of all."""
        self.counters: dict[str, dict[str, int | float]] = {}
        """Of its controls, by control; set when it ends."""
        self.first: float | None = None
        self.last_thinking: float | None = None
        self.last: float | None = None
        """Times of its first sampled, last thinking and last sampled token, on `time.perf_counter`."""
        self.budget = next((control for control in request.controls if isinstance(control, BudgetForcing)), None)

    @property
    def thinking(self) -> str:
        return self.sequence.thinking

    @property
    def answer(self) -> str:
        return self.sequence.answer

    @property
    def phase(self) -> str:
        """ "prompt", "think" or "answer"."""
        return self.sequence.phase.value

    @property
    def n_thinking(self) -> int:
        return self.sequence.counts.thinking

    @property
    def n_answer(self) -> int:
        return self.sequence.counts.answer

    @property
    def n_sampled(self) -> int:
        return self.sequence.counts.thinking + self.sequence.counts.answer

    @property
    def n_budget(self) -> int | None:
        """Most thinking tokens that it may take as things stand; None without a budget."""
        return None if self.budget is None else self.n_thinking + max(0, self.budget.remaining(self.sequence))

    @property
    def thinking_seconds(self) -> float:
        """From its first token to its latest thinking token."""
        return max(0.0, self.last_thinking - self.first) if self.last_thinking and self.first else 0.0

    @property
    def reason(self) -> str | None:
        """Why it ended: `end`, `length`, `context`, `lost` (another won), `stopped`, `error`; None while it runs."""
        return self.sequence.finish

    def watch(self, request: Request, is_watching: Callable[[], bool], period_seconds: float) -> None:
        """Put a look at the entropy before the draw of a thinking token, at most once in a period: a look takes up to
        half a millisecond, and a screen shows no more than some thirty a second."""
        draw, sequence, due = request.sample, self.sequence, 0.0

        def watched(row: Row) -> int:
            nonlocal due
            if sequence.phase is Phase.THINK and is_watching() and (now := time.perf_counter()) >= due:
                due = now + period_seconds
                self.entropies.append(entropy(row))
            return draw(row)

        request.sample = watched


@dataclass(slots=True, eq=False)
class Reply:
    """One reply, made by `Streamer.start`; any thread may read it and call its methods."""

    id: int
    recipe: Recipe
    preset: str
    state: str = "waiting"
    """"waiting", "running", "done", "stopped" or "failed"."""
    samples: list[Sample] = field(default_factory=list)
    """Empty before `Started`."""
    winner: Sample | None = None
    """The sample that counts; set when the reply is over, None only where it never began."""
    stats: Stats | None = None
    """Set when the reply is over."""
    asked: float = field(default_factory=time.perf_counter)
    _search: FirstFinishSearch | None = None
    _engine: Engine | None = None
    _is_stopped: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_over(self) -> bool:
        return self.state not in ("waiting", "running")

    @property
    def best(self) -> Sample | None:
        """The winner; while there is none, the first sample that ended by itself, or the first of all."""
        ended = (sample for sample in self.samples if sample.reason == "end")
        return self.winner or next(ended, self.samples[0] if self.samples else None)

    @property
    def context(self) -> Context | None:
        """The context as it stands, by the longest sample; None before `Started`."""
        if not self.samples or self._engine is None:
            return None
        n_used = max(len(sample.sequence.tokens) for sample in self.samples)
        return measure(self._engine, self.recipe, self.samples[0].sequence.n_prompt, n_used)

    @property
    def first_seconds(self) -> float | None:
        """From the request to the first token; None before it."""
        firsts = [sample.first for sample in self.samples if sample.first is not None]
        return min(firsts) - self.asked if firsts else None

    @property
    def tokens_per_second(self) -> float:
        """Sampled tokens of all samples together, since the first; 0 before the second."""
        firsts = [sample.first for sample in self.samples if sample.first is not None]
        lasts = [sample.last for sample in self.samples if sample.last is not None]
        n_sampled = sum(sample.n_sampled for sample in self.samples) - 1
        seconds = max(lasts) - min(firsts) if firsts and lasts else 0.0
        return n_sampled / seconds if seconds > 0 and n_sampled > 0 else 0.0

    def stop(self) -> None:
        """End it before its next step; what was written stays. One that waits ends when its turn comes."""
        with self._lock:
            self._is_stopped = True
            for sample in self.samples:
                sample.sequence.cancel("stopped")

    def answer_now(self) -> bool:
        """Close the thinking and answer; False where no budget control is there to do so, or nothing thinks."""
        thinking = [sample for sample in self.samples if _may_think(sample)]
        for sample in thinking:
            sample.sequence.hurry()
        return bool(thinking)

    def think_longer(self, n_tokens: int = 512) -> bool:
        """Think for about this many tokens more from here: an earlier end is ignored, limits that are nearer are
        raised; False where no budget control is there to do so, or nothing thinks any more."""
        done = [s.budget.extend(s.sequence, n_tokens) for s in self.samples if s.budget and _may_think(s)]
        return any(done)

    # --- for the decode thread ----------------------------------------------------------------------------------

    def begin(self, engine: Engine, requests: list[Request]) -> None:
        """It runs now, as these requests."""
        with self._lock:
            self._engine, self.state = engine, "running"
            controls = requests[0].controls
            self._search = next((one for one in controls if isinstance(one, FirstFinishSearch)), None)
            self.samples = [Sample(request) for request in requests]
            if self._is_stopped:
                for sample in self.samples:
                    sample.sequence.cancel("stopped")

    @property
    def is_stopped(self) -> bool:
        """True since `stop`."""
        return self._is_stopped

    def end(self, model: str, problem: str = "") -> Stats:
        """It is over, by a problem or as it should: choose the winner and sum up."""
        for sample in self.samples:
            sample.sequence.finish = sample.sequence.finish or "error"
        chosen = self._search.winner() if self._search else None
        by_index = {sample.index: sample for sample in self.samples}
        self.winner = by_index[chosen.sample if chosen else 0] if by_index else None
        if self.winner and self._search:
            self.winner.counters["search"] = dict(self._search.counters)
        self.stats = self.sum_up(model, problem)
        is_cut = self._is_stopped and self.stats.stop in ("stopped", "error")
        self.state = "failed" if problem else "stopped" if is_cut else "done"
        return self.stats

    def sum_up(self, model: str, problem: str = "") -> Stats:
        """How it came about, by its best sample; "interrupted" as long as it runs."""
        rest = Stats(
            total_seconds=time.perf_counter() - self.asked,
            stop="error" if problem else "stopped",
            model=model,
            preset=self.preset,
            seed=self.recipe.seed,
            problem=problem,
        )
        sample = self.best
        if sample is None:
            return rest
        counts = sample.sequence.counts
        return replace(
            rest,
            n_prompt=counts.prompt,
            n_thinking=counts.thinking,
            n_answer=counts.answer,
            n_forced=counts.forced,
            n_hint=counts.hint,
            n_probe=counts.probe,
            n_sampled=sum(one.n_sampled for one in self.samples),
            first_seconds=self.first_seconds or 0.0,
            thinking_seconds=sample.thinking_seconds,
            tokens_per_second=self.tokens_per_second,
            stop=(self.winner and self.winner.reason) or "interrupted",
        )


def _may_think(sample: Sample) -> bool:
    return sample.budget is not None and sample.reason is None and sample.sequence.phase is not Phase.ANSWER
