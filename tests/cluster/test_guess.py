"""Guesses: what is guessed and when, and that a ring with them gives the logits of one without."""

import contextlib
import random

import numpy as np
import pytest

from localreason.cluster.formation import HEAD, Assignment, Placement
from localreason.cluster.guess import Lookup, Pace
from localreason.runtime.decode import Request, decode
from localreason.runtime.engine import Span
from localreason.runtime.events import Finished, Token
from localreason.runtime.formats import FORMATS
from localreason.runtime.llama import EngineOptions, load
from localreason.runtime.phase import PhaseTracker
from localreason.runtime.sequence import Sequence
from tests.cluster.processes import NodeProcess
from tests.cluster.test_ring import ring_of, whole
from tests.cluster.test_window import PROMPT, script
from tests.gguf_models import write_model


def test_a_guess_is_what_followed_the_longest_run_of_tokens_when_it_was_met_last():
    lookup = Lookup()
    lookup.learn([1, 2, 3, 4, 5, 6, 9, 3, 4, 5, 7], 0)
    assert lookup.find([1, 2, 3, 4, 5]) == (6, 4)
    assert lookup.find([8, 3, 4, 5]) == (7, 3)
    assert lookup.find([8, 8, 5]) == (7, 1)
    assert lookup.find([7]) == (0, 0)
    assert lookup.find([]) == (0, 0)
    lookup.learn([0, 9, 8], 2)
    assert lookup.find([9]) == (8, 1)
    assert lookup.find([0, 9]) == (8, 2)
    assert lookup.find([0]) == (0, 0), "9 was said to be known already"


def test_a_table_gives_up_what_it_learned_first(monkeypatch):
    monkeypatch.setattr("localreason.cluster.guess._MOST_ENTRIES", 100)
    lookup = Lookup()
    lookup.learn(list(range(400)), 0)
    assert len(lookup._new) + len(lookup._old) <= 2 * 104
    assert lookup.find([300]) == (0, 0)
    assert lookup.find([370, 371]) == (372, 2)
    assert lookup.find([398]) == (399, 1)


def pace(whole, widest, own):
    found = Pace()
    found.round.extend([whole] * 3)
    found.widest.extend([widest] * 3)
    found.own.extend([own] * 3)
    return found


@pytest.mark.parametrize(
    ("seconds", "odds", "n_ahead", "is_worth"),
    [
        ((2.0, 1.0, 1.0), 0.01, 0, True),  # two alike: a wrong one costs nothing
        ((2.0, 1.0, 1.0), 0.99, 1, False),  # and more than one gains nothing
        ((3.0, 1.0, 1.0), 0.01, 1, True),  # of three, two can wait
        ((3.0, 1.0, 1.0), 0.99, 2, False),
        ((4.0, 3.0, 1.0), 0.66, 0, False),  # gains 1 or costs 2
        ((4.0, 3.0, 1.0), 0.67, 0, True),
        ((4.0, 1.0, 3.0), 0.01, 0, True),  # the head is the slow one: only nodes do more
        ((4.0, 4.0, 0.1), 0.99, 0, False),
        ((90.0, 1.0, 1.0), 0.2, 3, True),  # a long way between fast machines
        ((90.0, 1.0, 1.0), 0.99, 4, False),  # which are not to be flooded
    ],
)
def test_a_guess_is_worth_what_it_is_expected_to_save(seconds, odds, n_ahead, is_worth):
    assert pace(*seconds).is_worth(odds, n_ahead) == is_worth


def test_now_and_then_a_guess_that_is_not_worth_it_measures_anew():
    found = pace(4.0, 3.9, 1.0)
    assert [found.is_worth(0.5, 0) for _ in range(32)].count(True) == 2
    assert not any(found.is_worth(0.5, 1) for _ in range(32))
    found.widest.extend([1.0] * 16)
    assert all(found.is_worth(0.5, 0) for _ in range(32))


def test_nothing_is_guessed_before_a_round_is_known_and_one_at_a_time_before_the_slowest_node_is():
    found = Pace()
    assert not found.is_worth(0.9, 0)
    found.round.extend([2.0] * 3)
    assert not found.is_worth(0.9, 0)
    found.own.extend([1.0] * 3)
    assert found.is_worth(0.1, 0)
    assert not found.is_worth(0.9, 1)


@pytest.fixture(scope="module")
def nodes(folder, head):
    with NodeProcess(folder, "attic", head) as attic, NodeProcess(folder, "phone", head) as phone:
        yield [attic, phone]


@pytest.fixture
def eager(monkeypatch):
    """Three guesses at a time, whatever they cost."""
    monkeypatch.setattr(Pace, "is_worth", lambda pace, odds, n_ahead: n_ahead < 3)


@pytest.fixture(scope="module")
def expected(model):
    with whole(model) as engine:
        return script(engine)


@pytest.mark.parametrize("is_guessing", [True, False])
def test_a_ring_that_guesses_gives_the_whole_models_logits_bit_for_bit(
    model, head, nodes, folder, expected, eager, is_guessing
):
    with ring_of(model, head, nodes, folder, is_guessing=is_guessing) as ring:
        assert np.array_equal(script(ring), expected)
        for sequence in range(4):
            ring.rewind(sequence, 0)
        assert np.array_equal(script(ring), expected)
        assert (ring._guesses.n_made > 0) == is_guessing
        assert (ring._guesses.n_right > 0) == is_guessing, "the second time all is known"


def walk(engine, seed, guess):
    """The rows of steps drawn at random; `guess` tells what the engine expects next."""
    draw, held, rows = random.Random(seed), [0, 0, 0, 0], []

    def decode(*spans):
        engine.submit(list(spans))
        for span in spans:
            held[span.sequence_id] += len(span.tokens)
        if draw.random() < 0.1:
            engine.discard()
        else:
            rows.append(np.array(engine.collect()))

    for _ in range(120):
        what, one, other = draw.random(), draw.randrange(4), draw.randrange(4)
        if sum(held) > 300 or (what < 0.04 and held[one]):
            held[one] = draw.randint(0, held[one])
            engine.rewind(one, held[one])
        elif what < 0.08 and held[one] and not held[other] and one != other:
            held[other] = draw.randint(1, held[one])
            engine.fork(one, other, held[other])
        elif what < 0.12 and one != other:
            decode(Span(one, held[one], [3, 4]), Span(other, held[other], [5]))
        elif what < 0.16:
            decode(Span(one, held[one], [draw.randrange(6) for _ in range(5)]))
        else:
            last = one
            for _ in range(draw.randint(1, 6)):
                token, is_right = draw.randrange(6), draw.random() < 0.6
                decode(Span(last, held[last], [guess(token) if is_right else token]))
    return rows


@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_done_between_guesses_the_logits_are_those_of_the_whole_model(
    model, head, nodes, folder, eager, seed
):
    said = []
    with ring_of(model, head, nodes, folder) as ring:

        def guess(token):
            ahead = ring._guesses._flights
            said.append(ahead[0].batch[0].tokens[0] if ahead else token)
            return said[-1]

        rows = walk(ring, seed, guess)
        assert 0 < ring._guesses.n_right < ring._guesses.n_made
    with whole(model) as engine:
        again = iter(said)
        expected = walk(engine, seed, lambda token: next(again))
    assert len(rows) == len(expected)
    assert all(map(np.array_equal, rows, expected))


def answer(engine, tokenizer, limit=None, on_token=lambda n: None):
    """The tokens of one answer and why it ended."""
    tokens, reason = [], ""
    request = Request(
        Sequence(list(PROMPT), id="0", limit=limit),
        PhaseTracker(FORMATS["none"], ""),
        lambda row: int(row.argmax()),
        [],
    )
    for event in decode(engine, tokenizer, [request]):
        if isinstance(event, Token) and not event.is_continued:
            tokens.append(event.id)
            on_token(len(tokens))
        elif isinstance(event, Finished):
            reason = event.reason
    return tokens, reason


def test_an_answer_to_the_end_of_the_context_is_the_same(model, head, nodes, folder, eager):
    engine, tokenizer = load(model, EngineOptions(512, 1, 1, n_batch=64))
    with contextlib.closing(engine):
        expected = answer(engine, tokenizer)
    assert expected[1] == "context"
    with ring_of(model, head, nodes, folder, n_sequences=1) as ring:
        for _ in range(2):
            assert answer(ring, tokenizer) == expected
        assert 0 < ring._guesses.n_right < ring._guesses.n_made


def test_a_node_that_is_lost_with_guesses_under_way_costs_no_token(model, head, spare, folder, eager):
    engine, tokenizer = load(model, EngineOptions(512, 1, 1, n_batch=64))
    with contextlib.closing(engine):
        expected = answer(engine, tokenizer, 80)
    n_right = []

    def kill(n):
        if n == 30:
            assert ring._guesses._flights
            spare[1].kill()
        n_right.append(ring._guesses.n_right)

    with ring_of(model, head, spare, folder) as ring:
        assert answer(ring, tokenizer, 80, kill) == expected
        assert [name for name, _ in ring.timing.recoveries] == ["older"]
    assert 0 < n_right[30] < n_right[-1], "the ring that is left guesses too"


@pytest.mark.parametrize(
    "windows",
    [
        (Assignment(HEAD, 0, 7),),
        (Assignment(HEAD, 0, 2), Assignment("attic", 2, 5), Assignment(HEAD, 5, 7)),
        (Assignment("attic", 0, 2), Assignment(HEAD, 2, 4), Assignment("attic", 4, 6), Assignment(HEAD, 6, 7)),
    ],
    ids=["alone", "first too", "2 rounds"],
)
def test_nothing_is_guessed_where_no_node_would_wait(model, head, nodes, folder, eager, windows):
    tokenizer = load(model, EngineOptions(512, 1, 1))[1]
    with ring_of(model, head, nodes, folder, lambda _: Placement(windows)) as ring:
        assert len(answer(ring, tokenizer, 20)[0]) == 20
        assert ring._guesses.n_made == 0


def test_nothing_is_guessed_of_a_model_with_a_sliding_window(head, nodes, folder, tmp_path, eager):
    path = write_model(tmp_path / "gemma.gguf", "gemma3", 3, 14)
    tokenizer = load(path, EngineOptions(512, 1, 1))[1]
    halves = Placement((Assignment("attic", 0, 7), Assignment(HEAD, 7, 14)))
    with ring_of(path, head, nodes[:1], folder, lambda _: halves) as ring:
        assert not ring.can_rewind
        assert len(answer(ring, tokenizer, 20)[0]) == 20
        assert ring._guesses.n_made == 0


def test_what_a_ring_measures_of_itself_is_what_its_steps_took(model, head, nodes, folder):
    tokenizer = load(model, EngineOptions(512, 1, 1))[1]
    with ring_of(model, head, nodes, folder) as ring:
        answer(ring, tokenizer, 60)
        found = ring._guesses._pace
        assert min(len(found.own), len(found.round)) >= 3
        assert 0 < min(found.own) < max(found.round) < 10
        assert all(seconds > 0 for seconds in found.widest)
        assert ring.timing.n_tokens >= 50
