"""What the rows of one configuration come to, and two of them on the same problems with the same seeds.

Intervals are of 95 % by a bootstrap over problems: repeats of a problem are averaged first, since they are not
independent of each other. That of an accuracy is Wilson's where a problem's repeats agree, as one does with itself, or
all problems went alike: no resample of five right answers has a wrong one. That of a difference has an exact bound
where all problems differ alike, for the same reason.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...quant.paired import Difference, bootstrap, mcnemar, of_shares
from ...runtime.errors import InputError
from ..row import Row, n_sampled


@dataclass(frozen=True, slots=True)
class Summary:
    """One configuration. Shares are of the rows that could be run, token counts means over them."""

    n_problems: int
    n_rows: int
    n_failed: int
    """Rows that could not be run; they are in no other number."""
    accuracy: Difference
    """Its mean and interval; a reply without an answer is wrong."""
    cut: float
    """Share of replies of which the thinking or the whole was cut by a limit; of the sample that was chosen."""
    unclosed: float
    """Share of replies that ended inside the thinking without being cut, closed by a control then or not; of the
    sample that was chosen."""
    no_answer: float
    thinking: float
    """Sampled tokens of thinking, of the sample that was chosen."""
    thinking_right: float | None
    """The same of right replies; None where there are none."""
    thinking_wrong: float | None
    sampled: Difference
    """All sampled tokens, thinking and answers of every sample, with the interval."""
    injected: float
    """Tokens that controls wrote into the contexts of all samples, hints among them."""
    probe: float
    """Tokens of tentative answers, of all samples."""
    seconds: float
    """Wall time of the run a row, others in flight beside it; too high after an interruption, by what was in flight;
    0 where no row tells."""
    tokens_per_second: float
    """All sampled tokens of the run in its wall time; 0 where no row tells."""
    peak_bytes: int
    """The most resident memory of the run, the other configurations' turns before included; 0 where no row tells."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A configuration against a baseline on the problems that both ran."""

    n_problems: int
    accuracy: Difference
    sampled: Difference
    n_only_baseline: int
    """Problems on which the baseline was right more often; with one repeat, that only it got right."""
    n_only_candidate: int
    p: float
    """McNemar's exact test of these two counts; with several repeats a sign test over problems."""


def n_unsampled(row: Row, kind: str) -> int:
    """The forced, hint or probe tokens of a row, of all its samples; of the chosen one in rows of old, which tell no
    other."""
    return int(row.counters.get("search", {}).get(f"{kind}_tokens", row.tokens[kind]))


def is_cut(row: Row) -> bool:
    """True where a limit ended the thinking or the reply."""
    return bool(row.counters.get("budget", {}).get("cuts")) or row.stop in ("length", "context")


def is_unclosed(row: Row) -> bool:
    """True where the reply ended inside the thinking, and no limit ended it; closed by a control then, or not."""
    return not is_cut(row) and (row.is_unclosed or bool(row.counters.get("budget", {}).get("closed_at_end")))


def summarise(rows: Iterable[Row]) -> Summary:
    """The summary of one configuration's rows. Raises InputError where none could be run and graded."""
    everything = list(rows)
    ran = [row for row in everything if row.error is None and row.correct is not None]
    if not ran:
        raise InputError(f"none of the {len(everything)} rows was run and graded; solve some problems first")
    right = [row.tokens["thinking"] for row in ran if row.correct]
    wrong = [row.tokens["thinking"] for row in ran if not row.correct]
    seconds = sum(row.wall_seconds for row in ran)
    return Summary(
        n_problems=len({row.id for row in ran}),
        n_rows=len(ran),
        n_failed=len(everything) - len(ran),
        accuracy=_accuracy(_by_problem(ran, [bool(row.correct) for row in ran])),
        cut=_mean(is_cut(row) for row in ran),
        unclosed=_mean(is_unclosed(row) for row in ran),
        no_answer=_mean(row.answer is None for row in ran),
        thinking=_mean(row.tokens["thinking"] for row in ran),
        thinking_right=_mean(right) if right else None,
        thinking_wrong=_mean(wrong) if wrong else None,
        sampled=bootstrap(_by_problem(ran, [n_sampled(row) for row in ran]), 0),
        injected=_mean(n_unsampled(row, "forced") + n_unsampled(row, "hint") for row in ran),
        probe=_mean(n_unsampled(row, "probe") for row in ran),
        seconds=seconds / len(ran),
        tokens_per_second=sum(map(n_sampled, ran)) / seconds if seconds else 0.0,
        peak_bytes=max(row.peak_bytes for row in ran),
    )


def _accuracy(shares: NDArray[np.float64]) -> Difference:
    """The mean of the shares of each problem's repeats that are right, shape (n_problems,), and its interval."""
    if len(set(shares)) == 1 or set(shares) <= {0.0, 1.0}:
        return wilson(float(shares.mean()), len(shares))
    return bootstrap(shares, 0)


def wilson(share: float, n: int) -> Difference:
    """A share of n independent trials and Wilson's score interval of 95 %."""
    z = 1.959964
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Difference(share, max(0.0, middle - half), min(1.0, middle + half))


def pair(baseline: Iterable[Row], candidate: Iterable[Row], seed: int = 0) -> Pair:
    """Pair the rows by problem and repeat. Raises InputError where no problem was run under both."""
    sides = [
        {row.key: row for row in rows if row.error is None and row.correct is not None}
        for rows in (baseline, candidate)
    ]
    keys = [key for key in sides[0] if key in sides[1]]
    if not keys:
        raise InputError("no problem was run under both configurations; compare results of the same problems")
    ours, theirs = ([side[key] for key in keys] for side in sides)
    right = [_by_problem(rows, [bool(row.correct) for row in rows]) for rows in (ours, theirs)]
    sampled = [_by_problem(rows, [n_sampled(row) for row in rows]) for rows in (ours, theirs)]
    n_lost, n_won = int((right[0] > right[1]).sum()), int((right[1] > right[0]).sum())
    return Pair(
        n_problems=len(right[0]),
        accuracy=of_shares(right[1] - right[0], seed),
        sampled=bootstrap(sampled[1] - sampled[0], seed),
        n_only_baseline=n_lost,
        n_only_candidate=n_won,
        p=mcnemar(n_lost, n_won),
    )


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, value) points that no other one beats in both, by rising cost."""
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


def at_budgets(rows: Iterable[Row], n_points: int = 40) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sampled tokens that a reply may take, and the share of rows that are right within them; shape (n_points,)."""
    ran = [row for row in rows if row.error is None and row.correct is not None]
    taken = np.array([n_sampled(row) for row in ran], np.float64)
    right = np.array([bool(row.correct) for row in ran])
    budgets = np.linspace(0, max(1.0, float(taken.max())), n_points)
    return budgets, ((taken[None, :] <= budgets[:, None]) & right[None, :]).mean(axis=1)


def _by_problem(rows: Sequence[Row], values: Sequence[float]) -> NDArray[np.float64]:
    """The mean over each problem's repeats, in order of first appearance; shape (n_problems,)."""
    found: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        found.setdefault(row.id, []).append(float(value))
    return np.array([sum(each) / len(each) for each in found.values()], np.float64)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
