"""Which model the first start proposes, and what it says of it."""

import pytest

from localreason.tui.starter import Offer, count_parameters, suggest

GIB = 1 << 30
CATALOGUE = [
    Offer("demo", 144_000_000, 135_000_000, "Q8_0", is_here=True),
    Offer("qwen3-0.6b", 640_000_000, scheme="Q8_0"),
    Offer("qwen3-1.7b", 1_830_000_000, scheme="Q8_0"),
    Offer("qwen3-4b", 2_500_000_000, scheme="Q4_K_M"),
    Offer("qwen3-8b", 5_030_000_000, scheme="Q4_K_M"),
]


@pytest.mark.parametrize(("free", "best"), [(1.6, "demo"), (2.8, "qwen3-0.6b"), (3.2, "qwen3-1.7b"), (16, "qwen3-8b")])
def test_the_largest_model_that_fits_comes_first(free, best):
    first = suggest(CATALOGUE, int(free * GIB), 8192)[0]
    assert first.offer.name == best
    assert first.verdict == "fits"
    assert first.n_context == 8192
    assert first.needed_bytes < free * GIB


def test_what_does_not_fit_comes_last_and_says_what_it_needs():
    found = suggest(CATALOGUE, 2 * GIB, 8192)
    last = found[-1]
    assert (last.verdict, last.n_context) == ("large", 0)
    assert "does not fit" in last.reason
    assert "2.00 GiB are free" in last.reason
    assert len(found) == len(CATALOGUE)
    assert all(one.reason.endswith(".") for one in found)


def test_less_context_is_a_reservation_and_is_said():
    [one] = suggest([Offer("m-1.5b", 1 * GIB, scheme="Q8_0")], 2 * GIB, 32768)
    assert one.verdict == "short"
    assert 0 < one.n_context < 32768
    assert f"{one.n_context} tokens" in one.reason


def test_weights_of_too_few_bits_are_a_reservation():
    [one] = suggest([Offer("m-8b", 3_000_000_000, scheme="Q2_K")], 16 * GIB, 4096)
    assert one.verdict == "short"
    assert "2-bit" in one.reason


@pytest.mark.parametrize(
    ("name", "n"),
    [("qwen3-1.7b", 1_700_000_000), ("SmolLM2-135M-Instruct", 135_000_000), ("r1-qwen-1.5b", 1_500_000_000)],
)
def test_a_name_tells_the_parameters(name, n):
    assert count_parameters(name) == n


def test_a_name_without_a_size_is_no_obstacle():
    assert count_parameters("qwen3") is None
    [one] = suggest([Offer("mystery", 1_000_000_000)], 16 * GIB)
    assert one.verdict == "fits"


def test_no_offers_give_no_suggestions():
    assert suggest([], GIB) == []
