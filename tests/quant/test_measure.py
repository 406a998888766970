"""Perplexity and divergence: closed forms on scripted engines, exactness on tiny files."""

import itertools
import json
import math

import numpy as np
import pytest

from localreason.quant.measure import (
    check_vocabulary,
    compare,
    cut,
    log_softmax,
    score_rows,
)
from localreason.quant.traces import Trace, read_traces
from localreason.runtime.errors import InputError, ModelBroken, ModelUnsupported
from localreason.runtime.llama import EngineOptions, load
from tests.fakes import ByteTokenizer, ScriptedEngine
from tests.gguf_models import write_model

N_VOCAB = 8


def sloped(slope):
    """A model whose logits are a slope over the vocabulary, shifted by the last token."""
    return lambda tokens: {i: slope * ((i + tokens[-1]) % N_VOCAB) for i in range(N_VOCAB)}


def log_probabilities(slope, last):
    logits = np.array([slope * ((i + last) % N_VOCAB) for i in range(N_VOCAB)])
    return logits - math.log(np.exp(logits).sum())


def test_chunks_begin_with_bos_in_place_of_their_first_token_and_the_rest_is_left_over():
    assert cut(list(range(40)), [99], 16) == [[99, *range(15)], [99, *range(16, 31)]]
    assert cut(list(range(40)), [], 16) == [[*range(16)], [*range(16, 32)]]
    assert cut(list(range(40)), [], 16, 20) == [[*range(16)]]


@pytest.mark.parametrize(("n", "n_context", "n_most"), [(15, 16, None), (40, 16, 15), (40, 8, None), (0, 16, None)])
def test_a_text_that_fills_no_chunk_is_refused(n, n_context, n_most):
    with pytest.raises(InputError, match=r"not fill one chunk|give 16 or more"):
        cut(list(range(n)), [], n_context, n_most)


def test_the_second_halves_of_chunks_are_scored_by_the_closed_forms_whatever_the_batches_are():
    random = np.random.default_rng(1)
    chunks = [[int(token) for token in random.integers(0, N_VOCAB, 17)] for _ in range(3)]
    reference = ScriptedEngine(sloped(0.5), N_VOCAB, n_batch=5)
    candidate = ScriptedEngine(sloped(-0.3), N_VOCAB, n_batch=7)
    done = []
    drift = compare(reference, candidate, chunks, on_chunk=done.append)
    ours, theirs, divergences = [], [], []
    for chunk in chunks:
        for last, token in itertools.pairwise(chunk[8:]):
            p, q = log_probabilities(0.5, last), log_probabilities(-0.3, last)
            ours.append(p[token])
            theirs.append(q[token])
            divergences.append((np.exp(p) * (p - q)).sum())
    assert (drift.n_scored, drift.n_chunks, drift.n_context) == (24, 3, 17)
    assert done == [1, 2, 3]
    assert drift.reference_perplexity.value == pytest.approx(math.exp(-np.mean(ours)), rel=1e-6)
    assert drift.candidate_perplexity.value == pytest.approx(math.exp(-np.mean(theirs)), rel=1e-6)
    change = np.array(theirs) - ours
    assert drift.log_probability_difference.value == pytest.approx(change.mean(), rel=1e-6)
    assert drift.log_probability_difference.error == pytest.approx(change.std(ddof=1) / math.sqrt(24), rel=1e-6)
    assert drift.divergence.value == pytest.approx(np.mean(divergences), rel=1e-6)
    assert drift.divergence_max == pytest.approx(max(divergences), rel=1e-6)
    assert drift.same_top.value == 0
    # The models take turns: nothing of a chunk is left in either, and no batch has more than the engine takes.
    assert reference.n_used == candidate.n_used == 0


def test_ctrl_c_leaves_the_drift_of_the_chunks_that_both_evaluated():
    chunks = [[(3 * i + j) % N_VOCAB for j in range(16)] for i in range(4)]

    def interrupt_at(n):
        def on_chunk(n_done):
            if n_done == n:
                raise KeyboardInterrupt

        return on_chunk

    def drift(chunks, **options):
        return compare(*(ScriptedEngine(sloped(s), N_VOCAB, n_batch=5) for s in (0.5, -0.3)), chunks, **options)

    assert drift(chunks, on_chunk=interrupt_at(2)) == drift(chunks[:2]) != drift(chunks)

    class Interrupted(ScriptedEngine):
        def submit(self, batch):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(Interrupted(sloped(0.5), N_VOCAB), ScriptedEngine(sloped(0.5), N_VOCAB), chunks)


def test_the_same_file_does_not_diverge_and_a_smaller_cache_type_does(tiny_model):
    random = np.random.default_rng(0)
    chunks = cut([int(token) for token in random.integers(0, 250, 200)], [], 64)
    found = {}
    for kind in ("f16", "q8_0", "q4_0"):
        options = [EngineOptions(n_context=64, n_sequences=1, n_threads=1, cache_type=name) for name in ("f16", kind)]
        with load(tiny_model, options[0])[0] as reference, load(tiny_model, options[1])[0] as candidate:
            found[kind] = compare(reference, candidate, chunks)
    same = found["f16"]
    assert (same.divergence.value, same.divergence_max, same.same_top.value) == (0, 0, 1)
    assert same.reference_perplexity == same.candidate_perplexity
    assert 0 < found["q8_0"].divergence.value < found["q4_0"].divergence.value
    assert found["q4_0"].divergence_p99 <= found["q4_0"].divergence_max


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_perplexity_is_that_of_one_token_after_the_other(tmp_path, architecture):
    path = write_model(tmp_path / "model.gguf", architecture)
    random = np.random.default_rng(3)
    chunk = [int(token) for token in random.integers(0, 250, 48)]
    with load(path, EngineOptions(n_context=64, n_sequences=1, n_threads=1))[0] as engine:
        rows = np.concatenate([np.array(rows) for _, rows in score_rows(engine, chunk, 24)])
        found = log_softmax(rows)[np.arange(23), chunk[25:]]
    single = EngineOptions(n_context=64, n_sequences=1, n_threads=1, n_batch=1)
    with load(path, single)[0] as engine:
        rows = np.concatenate([np.array(rows) for _, rows in score_rows(engine, chunk, 24)])
        expected = log_softmax(rows)[np.arange(23), chunk[25:]]
    assert found == pytest.approx(expected, abs=2e-2)


def test_logits_that_are_no_numbers_are_reported_with_the_model_that_gave_them(tmp_path):
    chunks = [[1] * 16]
    sound = ScriptedEngine(sloped(1.0), N_VOCAB)
    for bad in (math.nan, math.inf):
        broken = ScriptedEngine(lambda tokens, bad=bad: {1: bad}, N_VOCAB)
        with pytest.raises(ModelBroken, match=r"b\.gguf gives 7 logits that are not finite numbers in chunk 1"):
            compare(sound, broken, chunks, ("a.gguf", "b.gguf"))
        with pytest.raises(ModelBroken, match=r"a\.gguf gives"):
            compare(broken, sound, chunks, ("a.gguf", "b.gguf"))


def test_a_chunk_longer_than_a_context_is_refused():
    short = ScriptedEngine(sloped(1.0), N_VOCAB, n_context=16)
    with pytest.raises(InputError, match=r"32 tokens is above the 16 that b\.gguf holds"):
        compare(ScriptedEngine(sloped(1.0), N_VOCAB), short, [[1] * 32], ("a.gguf", "b.gguf"))


def test_another_vocabulary_is_refused_with_the_first_difference():
    plain = ByteTokenizer(["one", "two"])
    check_vocabulary(plain, ByteTokenizer(["one", "two"]), ("a", "b"))
    with pytest.raises(ModelUnsupported, match=r"b has another vocabulary than a: token 260 is 'six' and not 'two'"):
        check_vocabulary(plain, ByteTokenizer(["one", "six"]), ("a", "b"))
    with pytest.raises(ModelUnsupported, match="b has a vocabulary of 260 tokens and a one of 261"):
        check_vocabulary(plain, ByteTokenizer(["one"]), ("a", "b"))


def test_results_of_solve_are_read_and_anything_else_is_refused_by_its_line():
    rows = [{"thinking": "t", "text": "a", "id": "1"}, {"thinking": "", "text": "", "error": "too long"}]
    assert read_traces("\n".join(map(json.dumps, rows)), "r.jsonl") == [Trace("", "t", "a")]
    evaluated = [{"schema": 1, "header": {"task": "x"}}, {"problem": "p", "thinking": "t", "text": "a"}]
    assert read_traces("\n".join(map(json.dumps, evaluated)), "r.jsonl") == [Trace("p", "t", "a")]
    plain = {"problem": "p", "thinking": "", "text": "a", "recipe": {"is_thinking": False, "format": "deepseek"}}
    assert read_traces(json.dumps(plain), "r.jsonl") == [Trace("p", "", "a", False, "deepseek")]
    strange = plain | {"recipe": {"is_thinking": 3, "format": ["x"]}}
    assert read_traces(json.dumps(strange), "r.jsonl") == [Trace("p", "", "a")]
    bad = {"{": "line 1", "[1]": "line 1", '{"thinking": 3, "text": ""}': "no text", json.dumps(rows[1]): "no reply"}
    for text, reason in bad.items():
        with pytest.raises(InputError, match=reason):
            read_traces(text, "r.jsonl")
