"""Sampling against a plain reference over the whole vocabulary."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from localreason.runtime.errors import DecodeFailed, InputError
from localreason.runtime.sampler import Sampling, choose, entropy


def reference(row, sampling):
    """Probabilities by the definitions, without any shortcut."""
    values = row.astype(np.float64) / sampling.temperature
    p = np.exp(values - values.max())
    p /= p.sum()
    order = np.lexsort((np.arange(len(p)), -p))
    if sampling.top_k:
        order = order[: sampling.top_k]
    q = p[order] / p[order].sum()
    order = order[: int(np.searchsorted(np.cumsum(q), sampling.top_p)) + 1]
    order = order[p[order] >= sampling.min_p * p.max()]
    return {int(i): p[i] / p[order].sum() for i in order}


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([3, 50, 2000]),
    st.sampled_from([0.3, 0.6, 1.0]),
    st.sampled_from([0.5, 0.95, 1.0]),
    st.sampled_from([0, 1, 7]),
    st.sampled_from([0.0, 0.05, 0.4]),
)
def test_every_draw_is_a_token_that_the_definition_allows_and_each_of_them_is_reached(
    seed, n, temperature, top_p, top_k, min_p
):
    random = np.random.default_rng(seed)
    row = random.normal(0, 3, n).astype(np.float32)
    sampling = Sampling(temperature, top_p, top_k, min_p)
    allowed = reference(row, sampling)
    for uniform in (0.0, random.random(), 0.999999):
        assert choose(row, sampling, uniform) in allowed
    start = 0.0
    for token, p in allowed.items():
        if p > 1e-4:  # else rounding may hide it
            assert choose(row, sampling, start + p / 2) == token
        start += p


def test_the_nucleus_is_that_of_all_candidates_and_not_of_the_likely_ones():
    row = np.log(np.array([0.5, 0.3, 0.1, 0.1], dtype=np.float32))
    sampling = Sampling(temperature=1.0, top_p=0.6, min_p=0.3)
    assert {choose(row, sampling, u) for u in np.linspace(0, 0.999, 50)} == {0, 1}


def test_draws_have_the_frequencies_of_the_definition():
    row = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    sampling = Sampling(temperature=1.0, top_p=0.9)
    random = np.random.default_rng(0)
    drawn = [choose(row, sampling, random.random()) for _ in range(20000)]
    expected = reference(row, sampling)
    assert set(drawn) == {0, 1, 2}
    for token, p in expected.items():
        assert drawn.count(token) / len(drawn) == pytest.approx(p, abs=0.012)


def test_a_nucleus_wider_than_the_first_candidates_is_found_whole():
    row = np.zeros(5000, dtype=np.float32)
    sampling = Sampling(temperature=1.0, top_p=0.9)
    assert choose(row, sampling, 0.9999) == 4499
    assert choose(row, sampling, 0.0) == 0


def test_temperature_zero_takes_the_best_and_the_first_of_equals():
    assert choose(np.array([1, 3, 3], dtype=np.float32), Sampling(temperature=0), 0.99) == 1


def test_banned_tokens_are_never_drawn():
    row = np.array([-np.inf, 0, 0], dtype=np.float32)
    assert {choose(row, Sampling(1.0, 1.0), u) for u in np.linspace(0, 0.999, 50)} == {1, 2}


@pytest.mark.parametrize("bad", [np.nan, -np.inf, np.inf])
def test_a_row_without_a_finite_maximum_is_an_error(bad):
    with pytest.raises(DecodeFailed):
        choose(np.full(4, bad, dtype=np.float32), Sampling(), 0.5)


@pytest.mark.parametrize("values", [{"temperature": -1}, {"top_p": 1.1}, {"top_k": -1}, {"min_p": 2}])
def test_parameters_out_of_range_are_named(values):
    with pytest.raises(InputError, match=next(iter(values))):
        Sampling(**values)


def test_entropy_of_known_distributions():
    assert entropy(np.zeros(8, dtype=np.float32)) == pytest.approx(np.log(8))
    assert entropy(np.array([0, -100, -100], dtype=np.float32)) == pytest.approx(0, abs=1e-6)
    assert entropy(np.array([0, 0, -np.inf], dtype=np.float32)) == pytest.approx(np.log(2))
