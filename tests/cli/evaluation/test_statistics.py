"""The numbers of an evaluation against values worked out by hand."""

import pytest

from localreason.cli.evaluation.statistics import at_budgets, is_cut, is_unclosed, pair, pareto, summarise, wilson
from localreason.quant.paired import mcnemar
from localreason.runtime.errors import InputError
from tests.cli.evaluation.samples import row


def test_mcnemar_is_the_exact_binomial_test():
    assert mcnemar(10, 2) == pytest.approx(0.03857421875)
    assert mcnemar(0, 0) == 1


def test_a_summary_counts_every_kind_of_reply():
    rows = [
        row("a", True, 10),
        row("b", False, 30, answer=None, is_unclosed=True),
        row("c", False, 50, counters={"budget": {"cuts": 1}}),
        row("d", True, 20, counters={"search": {"sampled_tokens": 100}}),
        row("e", None, error="too long"),
    ]
    found = summarise(rows)
    assert (found.n_problems, found.n_rows, found.n_failed) == (4, 4, 1)
    assert found.accuracy.mean == 0.5
    assert found.accuracy.low <= 0.5 <= found.accuracy.high
    assert (found.cut, found.unclosed, found.no_answer) == (0.25, 0.25, 0.25)
    assert (found.thinking_right, found.thinking_wrong) == (15, 40)
    assert found.sampled.mean == (12 + 32 + 52 + 100) / 4
    assert found.tokens_per_second == pytest.approx(196 / 2)
    assert (found.seconds, found.injected, found.probe) == (0.5, 0, 0)


def test_injected_tokens_and_probes_are_apart():
    tokens = {"prompt": 1, "thinking": 4, "answer": 1, "forced": 3, "hint": 5, "probe": 7}
    found = summarise([row(tokens=tokens)])
    assert (found.sampled.mean, found.injected, found.probe) == (5, 8, 7)


def test_injected_tokens_and_probes_of_every_sample_count():
    tokens = {"prompt": 1, "thinking": 4, "answer": 1, "forced": 3, "hint": 5, "probe": 7}
    search = {"sampled_tokens": 100, "forced_tokens": 30, "hint_tokens": 50, "probe_tokens": 70}
    found = summarise([row(tokens=tokens, counters={"search": search})])
    assert (found.sampled.mean, found.injected, found.probe) == (100, 80, 70)
    of_old = summarise([row(tokens=tokens, counters={"search": {"sampled_tokens": 100}})])
    assert (of_old.sampled.mean, of_old.injected, of_old.probe) == (100, 8, 7)


def test_thinking_that_a_control_closed_at_the_end_was_not_closed_by_the_model():
    assert is_unclosed(row(counters={"budget": {"closed_at_end": 1}}))
    assert not is_cut(row(counters={"budget": {"closed_at_end": 1, "cuts": 0}}))


@pytest.mark.parametrize("stop", ["length", "context"])
def test_a_reply_that_a_limit_ends_inside_its_thinking_is_cut_and_not_unclosed(stop: str):
    found = row(stop=stop, is_unclosed=True)
    assert (is_cut(found), is_unclosed(found)) == (True, False)


def test_an_interval_of_a_share_is_wilsons():
    found = wilson(0.7, 10)  # 7 of 10, as tables of it have
    assert found.mean == 0.7
    assert (found.low, found.high) == (pytest.approx(0.3968, abs=1e-4), pytest.approx(0.8922, abs=1e-4))


@pytest.mark.parametrize(("is_right", "low", "high"), [(True, 0.5655, 1.0), (False, 0.0, 0.4345)])
@pytest.mark.parametrize("n_repeats", [1, 3])
def test_five_that_went_alike_leave_something_to_chance(n_repeats: int, is_right: bool, low: float, high: float):
    rows = [row(f"p{i}", is_right, repeat=k) for i in range(5) for k in range(n_repeats)]
    found = summarise(rows).accuracy
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_repeats_that_differ_are_resampled_by_problem():
    rows = [row(f"p{i}", (i + k) % 3 > 0, repeat=k) for i in range(9) for k in range(2)]
    found = summarise(rows).accuracy
    assert 0 < found.low < found.mean < found.high < 1
    assert found != wilson(found.mean, 9)


def test_without_right_replies_their_length_is_unknown():
    assert summarise([row(correct=False)]).thinking_right is None


def test_rows_that_all_failed_are_refused():
    with pytest.raises(InputError, match="none of the 1 rows"):
        summarise([row(correct=None, error="too long")])


def test_pairs_are_of_the_same_problem_and_repeat():
    ours = [row(f"p{i}", i < 10) for i in range(20)]
    theirs = [row(f"p{i}", i >= 10 and i < 12, 20) for i in range(20)] + [row("alone", True)]
    found = pair(ours, theirs)
    assert (found.n_problems, found.n_only_baseline, found.n_only_candidate) == (20, 10, 2)
    assert found.p == pytest.approx(0.03857421875)
    assert found.accuracy.mean == pytest.approx(-0.4)
    assert found.accuracy.low < -0.4 < found.accuracy.high < 0
    assert found.sampled == type(found.sampled)(10, 10, 10)
    assert pair(ours, theirs) == found  # the same seed gives the same interval


@pytest.mark.parametrize(
    ("ours", "theirs", "low", "high"), [(True, True, -0.7076, 0.7076), (False, True, -0.4152, 1.0)]
)
def test_three_problems_that_differ_alike_leave_something_to_chance(ours: bool, theirs: bool, low: float, high: float):
    found = pair([row(f"p{i}", ours) for i in range(3)], [row(f"p{i}", theirs) for i in range(3)]).accuracy
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_repeats_of_a_problem_are_one_observation():
    ours = [row("a", k < 1, repeat=k) for k in range(4)] + [row("b", True, repeat=k) for k in range(4)]
    theirs = [row("a", k < 3, repeat=k) for k in range(4)] + [row("b", True, repeat=k) for k in range(4)]
    found = pair(ours, theirs)
    assert (found.n_problems, found.n_only_baseline, found.n_only_candidate, found.p) == (2, 0, 1, 1.0)
    assert found.accuracy.mean == 0.25
    assert summarise(theirs).accuracy.mean == 0.875


def test_configurations_without_a_common_problem_are_refused():
    with pytest.raises(InputError, match="no problem was run under both"):
        pair([row("a")], [row("b")])


def test_the_front_holds_what_nothing_beats():
    assert pareto([(10, 0.5), (5, 0.4), (20, 0.5), (5, 0.3), (30, 0.9)]) == [1, 0, 4]


def test_accuracy_rises_with_the_budget_to_that_of_all():
    budgets, share = at_budgets([row("a", True, 8), row("b", True, 98), row("c", False, 3)], 11)
    assert (budgets[0], budgets[-1]) == (0, 100)
    assert share.tolist() == pytest.approx([0] + [1 / 3] * 9 + [2 / 3])
