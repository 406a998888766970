"""Two models on the same problems with the same seeds: accuracy and length of thinking, and what of it is chance."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.errors import InputError

N_RESAMPLES = 10_000
_N_BLOCK = 1 << 22
"""Indices of resamples that are held at once."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one problem came to; `is_correct` is None where no right answer is known."""

    is_correct: bool | None
    n_thinking: int
    """Sampled tokens of thinking of the sample that was chosen."""
    stop: str


@dataclass(frozen=True, slots=True)
class Difference:
    """A mean difference, candidate less reference, and its 95 % interval by a paired bootstrap."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The problems that both models ran; accuracies are shares of `n_graded`, None where no answers are known."""

    n_problems: int
    n_failed: int
    """Problems left out, since one of the models could not run them."""
    n_graded: int
    reference_accuracy: float | None
    candidate_accuracy: float | None
    accuracy: Difference | None
    n_only_reference: int
    """Problems that only the reference got right."""
    n_only_candidate: int
    mcnemar_p: float | None
    """McNemar's exact test: how likely so uneven a split of those is where the models are equally good."""
    reference_thinking: float
    candidate_thinking: float
    thinking: Difference
    """Of tokens."""
    reference_unfinished: int
    """Replies that ended otherwise than by the model's own end."""
    candidate_unfinished: int


def compare_outcomes(
    reference: Mapping[str, Outcome], candidate: Mapping[str, Outcome], n_problems: int, seed: int = 0
) -> Comparison:
    """Pair the outcomes by problem. Raises InputError where no problem was run by both."""
    ids = [name for name in reference if name in candidate]
    if not ids:
        raise InputError(f"none of the {n_problems} problems could be run by both models; give others")
    graded = [name for name in ids if reference[name].is_correct is not None]
    ours, theirs = (np.array([of[name].is_correct for name in graded], np.bool_) for of in (reference, candidate))
    lengths = [np.array([of[name].n_thinking for name in ids], np.float64) for of in (reference, candidate)]
    n_lost, n_won = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    return Comparison(
        n_problems=len(ids),
        n_failed=n_problems - len(ids),
        n_graded=len(graded),
        reference_accuracy=float(ours.mean()) if graded else None,
        candidate_accuracy=float(theirs.mean()) if graded else None,
        accuracy=of_shares(theirs.astype(np.float64) - ours, seed) if graded else None,
        n_only_reference=n_lost,
        n_only_candidate=n_won,
        mcnemar_p=mcnemar(n_lost, n_won) if graded else None,
        reference_thinking=float(lengths[0].mean()),
        candidate_thinking=float(lengths[1].mean()),
        thinking=bootstrap(lengths[1] - lengths[0], seed),
        reference_unfinished=sum(reference[name].stop != "end" for name in ids),
        candidate_unfinished=sum(candidate[name].stop != "end" for name in ids),
    )


def bootstrap(differences: NDArray[np.float64], seed: int, n_resamples: int = N_RESAMPLES) -> Difference:
    """The mean of paired differences, shape (n,), and the 2.5th and 97.5th percentile of resampled means."""
    n, random = len(differences), np.random.default_rng(seed)
    means = np.empty(n_resamples)
    size = max(1, _N_BLOCK // n)
    for start in range(0, n_resamples, size):
        end = min(n_resamples, start + size)
        means[start:end] = differences[random.integers(0, n, (end - start, n))].mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return Difference(float(differences.mean()), float(low), float(high))


def of_shares(differences: NDArray[np.float64], seed: int) -> Difference:
    """The mean of paired differences of shares, shape (n,), and its interval; an exact bound where all are equal, since
    no resample has another."""
    if len(set(differences)) > 1:
        return bootstrap(differences, seed)
    # What n problems do not show is at most so frequent (Clopper-Pearson, 97.5 % to each side).
    mean, rest = float(differences[0]), 1 - 0.025 ** (1 / len(differences))
    return Difference(mean, max(-1.0, mean - (1 + abs(mean)) * rest), min(1.0, mean + (1 + abs(mean)) * rest))


def mcnemar(n_one: int, n_other: int) -> float:
    """The two-sided p of McNemar's exact test for discordant pairs: a binomial with a half."""
    n = n_one + n_other
    tail = sum(math.comb(n, i) for i in range(min(n_one, n_other) + 1))
    return min(1.0, 2 * tail / 2**n)
