"""Paired comparisons: known values of the tests, and what is left out."""

import math

import numpy as np
import pytest

from localreason.quant.paired import Outcome, bootstrap, compare_outcomes, mcnemar, of_shares
from localreason.runtime.errors import InputError


@pytest.mark.parametrize(("one", "other", "p"), [(0, 0, 1), (5, 5, 1), (1, 9, 22 / 1024), (9, 1, 22 / 1024)])
def test_mcnemar_is_the_binomial_of_the_discordant_pairs(one, other, p):
    assert mcnemar(one, other) == pytest.approx(p)


def test_mcnemar_of_many_pairs_does_not_overflow():
    assert 0 < mcnemar(1400, 1600) < 0.001


def test_the_bootstrap_is_about_the_normal_interval_and_the_same_for_a_seed():
    differences = np.random.default_rng(5).normal(0.3, 1.0, 400)
    found = bootstrap(differences, seed=1)
    half = 1.96 * differences.std(ddof=1) / math.sqrt(400)
    assert found.mean == pytest.approx(differences.mean())
    assert found.low == pytest.approx(differences.mean() - half, abs=0.01)
    assert found.high == pytest.approx(differences.mean() + half, abs=0.01)
    assert bootstrap(differences, seed=1) == found
    assert bootstrap(np.ones(3), seed=0).low == 1


def test_only_problems_that_both_ran_are_compared_and_only_known_answers_graded():
    reference = {"a": Outcome(True, 10, "end"), "b": Outcome(True, 20, "end"), "c": Outcome(None, 30, "end")}
    candidate = {"a": Outcome(True, 14, "end"), "b": Outcome(False, 22, "length"), "c": Outcome(None, 30, "end")}
    candidate["d"] = Outcome(True, 1000, "end")
    found = compare_outcomes(reference, candidate, 5)
    assert (found.n_problems, found.n_failed, found.n_graded) == (3, 2, 2)
    assert (found.reference_accuracy, found.candidate_accuracy) == (1.0, 0.5)
    assert (found.n_only_reference, found.n_only_candidate, found.mcnemar_p) == (1, 0, 1.0)
    assert found.accuracy is not None
    assert (found.accuracy.mean, found.accuracy.low, found.accuracy.high) == (-0.5, -1.0, 0.0)
    assert (found.reference_thinking, found.candidate_thinking, found.thinking.mean) == (20, 22, 2)
    assert (found.reference_unfinished, found.candidate_unfinished) == (0, 1)


def test_without_answers_only_the_lengths_are_compared():
    found = compare_outcomes({"a": Outcome(None, 1, "end")}, {"a": Outcome(None, 3, "end")}, 1)
    assert (found.accuracy, found.mcnemar_p, found.reference_accuracy, found.thinking.mean) == (None, None, None, 2)


def test_no_common_problem_is_an_error():
    with pytest.raises(InputError, match="none of the 2 problems"):
        compare_outcomes({"a": Outcome(True, 1, "end")}, {"b": Outcome(True, 1, "end")}, 2)


def test_models_that_agree_on_few_problems_may_differ_all_the_same():
    same = {f"p{i}": Outcome(True, 5, "end") for i in range(3)}
    found = compare_outcomes(same, same, 3, seed=0).accuracy
    assert found is not None
    assert (found.mean, found.low, found.high) == (0, pytest.approx(-0.7076, abs=1e-4), pytest.approx(0.7076, abs=1e-4))
    assert of_shares(np.zeros(300), seed=0).high < 0.013
