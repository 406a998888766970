"""Several batches under way: the same tokens as with one, in an engine that answers in the order of submission."""

import contextlib
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localreason.runtime.decode import Request, decode
from localreason.runtime.events import Finished, Token
from localreason.runtime.formats import FORMATS
from localreason.runtime.phase import PhaseTracker
from localreason.runtime.sequence import Sequence
from tests.fakes import ByteTokenizer, ScriptedEngine, script

TOKENIZER = ByteTokenizer()
QUESTIONS = [f"Question number {i} of many, with a common beginning?" + "x" * (7 * i) for i in range(7)]
REPLIES = {text: f"<think>{'ab' * (3 * i)}</think>Answer {i}." for i, text in enumerate(QUESTIONS)}


def requests(limit=None):
    for i, text in enumerate(QUESTIONS):
        sequence = Sequence(TOKENIZER.encode(text), id=str(i), limit=limit)
        yield Request(sequence, PhaseTracker(FORMATS["think"], ""), lambda row: int(row.argmax()), [])


def run(n_in_flight, n_context=100_000, n_parallel=None, limit=None, n_batch=128, n_spread=None):
    engine = ScriptedEngine(
        script(TOKENIZER, REPLIES),
        TOKENIZER.n_vocab,
        n_context,
        n_batch=n_batch,
        n_in_flight=n_in_flight,
        n_spread=n_spread,
    )
    tokens, reasons = {}, {}
    for event in decode(engine, TOKENIZER, requests(limit), n_parallel):
        if isinstance(event, Token) and not event.is_continued:
            tokens.setdefault(event.sequence.id, []).append(event.id)
        elif isinstance(event, Finished):
            reasons[event.sequence.id] = event.reason
    assert not engine.results
    assert engine.n_used == 0, "something was left in the cache"
    return tokens, reasons, engine


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(1, 8), st.sampled_from([None, 3, 20]), st.sampled_from([16, 40, 128]), st.data())
def test_the_tokens_do_not_depend_on_how_many_batches_are_under_way(n_in_flight, n_parallel, limit, n_batch, data):
    n_context = data.draw(st.sampled_from([100_000, 260, 180]))
    expected = run(1, n_context, n_parallel, limit, n_batch)
    n_spread = data.draw(st.integers(1, n_in_flight))
    found = run(n_in_flight, n_context, n_parallel, limit, n_batch, n_spread)
    assert found[0] == expected[0]
    assert found[1] == expected[1]


def test_decoding_rows_are_spread_over_the_batches():
    engine = run(4, n_parallel=4)[2]
    sizes = [len(batch) for batch in engine.batches]
    assert max(sizes[-20:]) == 1
    assert len(engine.batches) > len(run(1, n_parallel=4)[2].batches)


def test_rows_share_as_many_batches_as_the_engine_wants_and_late_ones_join_them():
    texts = [f"{i}" + "x" * 40 * i for i in range(6)]  # each begins to answer at another time
    answer = script(TOKENIZER, dict.fromkeys(texts, "<think>" + "ab" * 60 + "</think>Done."))
    engine = ScriptedEngine(answer, TOKENIZER.n_vocab, n_batch=16, n_in_flight=6, n_spread=2)
    every = [
        Request(Sequence(TOKENIZER.encode(text)), PhaseTracker(FORMATS["think"], ""), lambda row: int(row.argmax()), [])
        for text in texts
    ]
    assert sum(isinstance(event, Finished) for event in decode(engine, TOKENIZER, every, n_parallel=6)) == 6
    prompts = [i for i, batch in enumerate(engine.batches) if any(len(span.tokens) > 1 for span in batch)]
    together = [{span.sequence_id for span in batch} for batch in engine.batches[prompts[-1] + 6 :][:12]]
    assert [len(slots) for slots in together] == [3] * 12
    assert all(one.isdisjoint(other) for one, other in pairwise(together))


def test_a_prompt_goes_in_pieces_that_follow_each_other():
    engine = ScriptedEngine(script(TOKENIZER, REPLIES), TOKENIZER.n_vocab, n_batch=8, n_in_flight=3)
    with contextlib.closing(decode(engine, TOKENIZER, list(requests())[:1])) as events:
        next(events)
        assert len(engine.batches) == 3, "three pieces are under way when the first comes back"


def pieces_of(*texts, n_in_flight=4, n_parallel=None):
    """Tokens of each batch of prompts, of requests that follow each other or come together."""
    engine = ScriptedEngine(
        script(TOKENIZER, dict.fromkeys(texts, "")), TOKENIZER.n_vocab, n_batch=64, n_in_flight=n_in_flight
    )
    every = [
        Request(Sequence(TOKENIZER.encode(text)), PhaseTracker(FORMATS["none"], ""), lambda row: int(row.argmax()), [])
        for text in texts
    ]
    for _ in decode(engine, TOKENIZER, every, n_parallel):
        pass
    return [sum(len(span.tokens) for span in batch) for batch in engine.batches]


@pytest.mark.parametrize(
    ("n_tokens", "pieces"),
    [(10, [10]), (32, [16, 16]), (64, [16] * 4), (65, [32, 32, 1]), (128, [32] * 4), (600, [64] * 9 + [24])],
)
def test_a_short_prompt_is_cut_into_as_many_pieces_as_can_be_under_way(n_tokens, pieces):
    assert pieces_of("x" * n_tokens) == pieces
    assert pieces_of("x" * n_tokens, n_in_flight=1) == [64] * (n_tokens // 64) + [n_tokens % 64] * (n_tokens % 64 > 0)


def test_pieces_are_of_what_is_not_in_the_cache_and_of_all_prompts_that_come_together():
    assert pieces_of("x" * 300, "x" * 300 + "y" * 60, n_parallel=1)[5:] == [16, 16, 16, 12]
    assert pieces_of("a" * 64, "b" * 64, "c" * 128)[0] == 64


def test_closing_with_batches_under_way_leaves_the_engine_ready():
    engine = ScriptedEngine(script(TOKENIZER, REPLIES), TOKENIZER.n_vocab, n_in_flight=4)
    for stop in range(1, 30, 4):
        with contextlib.closing(decode(engine, TOKENIZER, requests())) as events:
            for _ in range(stop):
                next(events)
        assert not engine.results
        assert engine.n_used == 0
    texts = [event for event in decode(engine, TOKENIZER, requests()) if isinstance(event, Finished)]
    assert len(texts) == len(QUESTIONS)


def test_a_sequence_cancelled_while_its_batch_is_under_way_takes_no_more_tokens():
    engine = ScriptedEngine(script(TOKENIZER, REPLIES), TOKENIZER.n_vocab, n_in_flight=4)
    chosen, after = random.Random(0), []
    cancelled = set()
    for event in decode(engine, TOKENIZER, requests()):
        if event.sequence.id in cancelled and isinstance(event, Token):
            after.append(event)
        if isinstance(event, Token) and chosen.random() < 0.05 and event.sequence.id not in cancelled:
            event.sequence.cancel("enough")
            cancelled.add(event.sequence.id)
    assert cancelled
    assert not [event for event in after if not event.is_continued]
    assert engine.n_used == 0
