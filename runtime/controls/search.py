"""First-finish search and its relatives: several samples of one question, of which not all need to end.

Sources: First Finish Search (arXiv 2505.18149), short-m@k (arXiv 2505.17813), majority vote. Where we deviate: the
guard, on by default, lets a sample finish first only if it closed its thinking by itself and gave an answer that can be
extracted; samples that end in one step are ordered by their sampled thinking tokens, then by their number; the vote
stops once no outcome of the rest can change it.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from ..answer import extract, group
from ..errors import ControlError
from ..sequence import Sequence
from .control import Action, Control, Note, Parameters, Setup, Stop, parameter


@dataclass(frozen=True, slots=True)
class SearchParameters(Parameters):
    control: ClassVar[str] = "search"
    n: int = parameter(4, "samples of the question", 1, 64)
    rule: str = parameter(
        "first",
        "first: the first to finish wins; short: the first m to finish thinking vote; majority: all vote",
        choices=("first", "short", "majority"),
    )
    m: int = parameter(3, "samples that vote under the rule short", 1, 64)
    guard: bool = parameter(True, "count only samples that closed their thinking and gave an answer")

    def __post_init__(self) -> None:
        Parameters.__post_init__(self)
        if self.rule == "short" and self.m > self.n:
            raise ControlError(f"search: m is {self.m}, above the n of {self.n} samples; lower m or raise n")

    @property
    def is_race(self) -> bool:
        """True where who ends first matters, so that all samples have to begin together."""
        return self.rule != "majority"


class FirstFinishSearch(Control):
    name = "search"
    summary = "several samples over one prompt; the first good one, or a vote, decides and frees the rest"
    source = "First Finish Search, arXiv 2505.18149; short-m@k, arXiv 2505.17813"
    Parameters = SearchParameters
    is_shared = True
    parameters: SearchParameters

    def __init__(self, parameters: SearchParameters, setup: Setup) -> None:
        super().__init__(parameters, setup)
        self.counters = {"samples": parameters.n, "finished": 0, "lost": 0, "guarded": 0, "winner": -1, "votes": 0}
        self._members: list[Sequence] = []
        self._closed: list[Sequence] = []
        self._good: list[Sequence] = []
        self._rest: list[Sequence] = []
        self._is_decided = False
        self._has_thinking = setup.is_thinking and bool(setup.format.closes)

    def join(self, sequence: Sequence) -> None:
        """Make a sample known before the first of them begins."""
        self._members.append(sequence)

    def observe(self, sequence: Sequence, token: int) -> Iterable[Action]:
        if self.parameters.rule != "short" or self._is_decided or not sequence.is_closing:
            return ()
        if sequence in self._closed or (self.parameters.guard and sequence.is_cut):
            return ()
        self._closed.append(sequence)
        if len(self._closed) < self.parameters.m:
            return ()
        self._is_decided = True
        return self._stop(set(map(id, self._closed)), f"{self.parameters.m} samples finished thinking")

    def end(self, sequence: Sequence) -> Iterable[Action]:
        if sequence.finish == "lost":
            self.counters["lost"] += 1
            return ()
        self.counters["finished"] += 1
        if not self._is_good(sequence):
            self.counters["guarded"] += 1
            self._rest.append(sequence)
        else:
            self._good.append(sequence)
        return () if self._is_decided else self._decide()

    def winner(self) -> Sequence | None:
        """The sample whose reply stands for the question, once all have ended; None if none finished.

        Samples that the guard held back count only if no other finished; of equal votes the shortest thinking wins.
        """
        voters = self._good or [s for s in self._rest if _answer(s) is not None] or self._rest
        if not voters:
            return None
        if self.parameters.rule == "first":
            chosen = voters[0]
        else:
            best = min(self._groups(voters), key=lambda members: (-len(members), min(map(_length, members))))
            self.counters["votes"] = len(best)
            chosen = min(best, key=_length)
        self.counters["winner"] = chosen.sample
        return chosen

    def tally(self) -> dict[str, int | float]:
        """The counters, with the tokens of all samples by who wrote them."""
        counts = [sequence.counts for sequence in self._members]
        return {
            **self.counters,
            "sampled_tokens": sum(each.thinking + each.answer for each in counts),
            "forced_tokens": sum(each.forced for each in counts),
            "hint_tokens": sum(each.hint for each in counts),
            "probe_tokens": sum(each.probe for each in counts),
        }

    def _decide(self) -> Iterable[Action]:
        """Stop the samples that can no longer matter."""
        running = [s for s in self._members if s.finish is None]
        if not running or not self._good:
            return ()
        if self.parameters.rule == "first":
            self._is_decided = True
            return self._stop(set(), f"sample {self._good[0].sample} finished first")
        if self.parameters.rule == "short" and not self._has_thinking and len(self._good) == self.parameters.m:
            self._is_decided = True
            return self._stop(set(), f"{self.parameters.m} samples finished")
        if self.parameters.rule == "majority":
            sizes = sorted((len(members) for members in self._groups(self._good)), reverse=True)
            # Strictly ahead of the runner-up even if all that still run join it.
            if sizes[0] > (sizes[1] if len(sizes) > 1 else 0) + len(running):
                self._is_decided = True
                return self._stop(set(), f"the vote is decided with {sizes[0]} equal answers")
        return ()

    def _stop(self, kept: set[int], why: str) -> tuple[Action, ...]:
        losers = [s for s in self._members if s.finish is None and id(s) not in kept]
        return (Note(f"{why}; {len(losers)} stopped"), *(Stop("lost", loser) for loser in losers))

    def _is_good(self, sequence: Sequence) -> bool:
        if not self.parameters.guard:
            return sequence.finish == "end"
        is_closed = not self._has_thinking or (
            sequence.closed_at is not None and not sequence.is_thinking and not sequence.is_cut
        )
        return sequence.finish == "end" and is_closed and _answer(sequence) is not None

    def _groups(self, voters: list[Sequence]) -> list[list[Sequence]]:
        return [[voters[i] for i in members] for members in group([_answer(s) for s in voters])]


def _answer(sequence: Sequence) -> str | None:
    return extract(sequence.answer)


def _length(sequence: Sequence) -> tuple[int, int]:
    return sequence.counts.thinking, sequence.sample
