"""Bodies of any shape: what is checked, what is clamped, and that nothing but 4xx comes of nonsense."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from localreason.cli.server_field import Refused, parse_json
from localreason.cli.server_job import StopWords
from localreason.cli.server_schema import EFFORTS, Limits, parse_chat, parse_completion
from localreason.runtime.controls import combine
from localreason.runtime.llama import EngineOptions
from localreason.runtime.model import Model, Recipe
from tests.cli.serving import LIMITS, serving
from tests.gguf_models import write_model

USER = {"role": "user", "content": "hello"}


def chat(**more: Any) -> Any:
    return parse_chat({"messages": [USER], **more}, LIMITS)


def test_what_a_request_does_not_say_is_the_servers():
    wanted = chat()
    assert (wanted.recipe.controls, wanted.recipe.sampling) == (LIMITS.recipe.controls, LIMITS.recipe.sampling)
    assert (wanted.n, wanted.is_stream, wanted.n_top, wanted.recipe.max_tokens) == (1, False, None, 256)


@pytest.mark.parametrize(
    ("more", "max_tokens", "max_thinking"),
    [
        ({"max_tokens": 10**6}, 256, 64),
        ({"max_tokens": 40}, 40, 30),
        ({"max_completion_tokens": 40, "max_tokens": 99}, 40, 30),
        ({"reasoning_effort": "low"}, 256, 64),
        ({"reasoning_effort": "high", "localreason": {"budget": 5}}, 256, 5),
        ({"localreason": {"controls": ["budget:max=9,min=8"], "budget": 4}}, 256, 4),
        ({"localreason": {"controls": ["budget:max=9000,total=8000"]}}, 256, 64),
        ({"localreason": {"preset": "careful"}}, 256, 64),
        ({"localreason": {"controls": ["hint"]}}, 256, 64),
    ],
)
def test_what_a_request_asks_for_is_clamped(more: dict[str, Any], max_tokens: int, max_thinking: int):
    recipe = chat(**more).recipe
    assert (recipe.max_tokens, recipe.max_thinking) == (max_tokens, max_thinking)


@pytest.mark.parametrize(("max_tokens", "max_thinking"), [(4, 0), (16, 0), (32, 0), (33, 16), (52, 30), (256, 64)])
def test_what_a_cut_writes_leaves_room_for_the_answer_or_there_is_no_thinking(max_tokens: int, max_thinking: int):
    body = {"messages": [USER], "max_tokens": max_tokens, "localreason": {"think": True}}
    recipe = parse_chat(body, replace(LIMITS, n_closing=11)).recipe
    assert (recipe.max_thinking, recipe.is_thinking) == (max_thinking, max_thinking > 0)


def test_a_cap_applies_though_the_server_names_no_budget():
    limits = Limits(Recipe(), max_tokens=6144, max_thinking=4096)
    assert parse_chat({"messages": [USER]}, limits).recipe.max_thinking == 4096


def test_efforts_turn_thinking_off_or_bound_it():
    limits = Limits(Recipe(combine("safe", [])), 6144, 4096, "safe")
    found = {e: parse_chat({"messages": [USER], "reasoning_effort": e}, limits).recipe for e in EFFORTS}
    assert {effort: recipe.max_thinking for effort, recipe in found.items()} == {
        "none": 0,
        "minimal": 128,
        "low": 512,
        "medium": 2048,
        "high": 4096,
        "xhigh": 4096,
    }
    assert [effort for effort, recipe in found.items() if not recipe.is_thinking] == ["none"]


def test_controls_of_a_request_take_the_place_of_the_servers():
    limits = Limits(Recipe(combine("safe", ["hint:alpha=5"])), 256, 64, "safe", ("hint:alpha=5",))
    own = {"controls": ["hint:alpha=7"]}
    parameters = parse_chat({"messages": [USER], "localreason": own}, limits).recipe.get("hint")
    assert getattr(parameters, "alpha", None) == 7
    assert parse_chat({"messages": [USER], "localreason": {}}, limits).recipe.get("hint") is not None


def test_parts_of_text_are_joined_and_pictures_refused():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_chat({"messages": [{"role": "user", "content": parts}]}, LIMITS).turns[0].content == "ab"
    with pytest.raises(Refused, match=r"messages\[0\]"):
        parse_chat({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, LIMITS)


def test_a_reply_without_content_is_an_empty_turn():
    turns = [USER, {"role": "assistant", "content": None}, USER]
    assert [turn.content for turn in parse_chat({"messages": turns}, LIMITS).turns] == ["hello", "", "hello"]
    with pytest.raises(Refused, match=r"messages\[0\]"):
        parse_chat({"messages": [{"role": "user", "content": None}]}, LIMITS)


def test_token_ids_out_of_the_vocabulary_are_refused():
    limits = Limits(Recipe(), 10, 10, n_vocab=5)
    assert parse_completion({"prompt": [1, 4]}, limits).prompt == (1, 4)
    for prompt in ([5], [-1], [True], [1.0], [], [[1], [2]], ["a", "b"], None):
        with pytest.raises(Refused, match="prompt"):
            parse_completion({"prompt": prompt}, limits)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3), st.data())
def test_stop_words_cut_where_the_whole_text_would_be_cut(text: str, words: list[str], data: st.DataObject):
    stop, shown, rest = StopWords(tuple(words)), "", text
    while rest and not stop.is_found:
        n = data.draw(st.integers(1, len(rest)))
        shown += stop.feed(rest[:n])
        rest = rest[n:]
    shown += stop.flush()
    # Words found as they are completed: the earliest end decides, and of those the earliest start within a piece.
    found = [text.find(word) for word in words if word in text]
    assert text.startswith(shown)
    assert stop.is_found == bool(found)
    assert shown == text if not found else not any(word in shown for word in words)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
NAMES = ["model", "messages", "prompt", "stream", "stream_options", "n", "best_of", "seed", "stop", "temperature"]
NAMES += ["top_p", "top_k", "min_p", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "echo"]
NAMES += ["reasoning_effort", "localreason", "tools", "response_format", "logit_bias", "user", "functions"]
OWN = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("budget", "preset", "controls", "search", "think", "x"), VALUES)
)
ROLES = st.sampled_from(["user", "system", "assistant", "tool", "developer", ""])
TURNS = st.lists(st.fixed_dictionaries({"role": ROLES, "content": VALUES | st.text(max_size=20)}), max_size=4)
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4)
GOOD = st.sampled_from([{"messages": [USER]}, {"prompt": "hello"}])


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """From sheer bytes to what is nearly right."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(st.binary(max_size=40))
    if kind == 1:
        return json.dumps(draw(VALUES)).encode()
    body = {**draw(GOOD), **draw(BODIES)}
    if draw(st.booleans()):
        body["messages"] = draw(TURNS)
    if draw(st.booleans()):
        body["localreason"] = draw(OWN)
    return json.dumps(body).encode()


@pytest.fixture(scope="module")
def tiny_http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    path = tmp_path_factory.mktemp("schema") / "tiny.gguf"
    write_model(path, values={"llama.context_length": 4096})
    limits = Limits(Recipe(combine("safe", ["budget:max=4"])), 6, 4, "safe", (), 16, 265)
    options = EngineOptions(n_context=8192, n_sequences=9, n_threads=1)
    with (
        Model.open(path, options) as model,
        serving(model, limits=limits) as running,
        running.http() as http,
    ):
        yield http


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(["/v1/chat/completions", "/v1/completions"]), bodies())
@example("/v1/chat/completions", b"[" * 100_000)
@example("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800\\u0000<|im_end|>"}]}')
@example("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "\\ud800": 1, "max_tokens": 2}')
@example("/v1/completions", b'{"prompt": "", "max_tokens": 1}')
@example("/v1/completions", b'{"prompt": [256, 257], "logprobs": 5, "n": 2}')
@example("/v1/completions", b'{"prompt": "x", "seed": -1, "temperature": 1e-300, "top_p": 0}')
@example("/v1/chat/completions", b'{"messages": [{"role": "system", "content": ""}, {"role": "user", "content": ""}]}')
@example("/v1/completions", b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}")
@example("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}')
@example("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}')
def test_no_body_however_shaped_is_more_than_refused(tiny_http: httpx.Client, path: str, body: bytes):
    response = tiny_http.post(path, content=body, headers={"Content-Type": "application/json"})
    if response.status_code == 200:
        assert b"server_error" not in response.content
        return
    assert 400 <= response.status_code < 500
    error = response.json()["error"]
    assert error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/", "/v1", "/v1/requests/x/cancel", "/v1/models/x", "/v1/chat/completions/", "/%00"])
def test_every_error_is_an_error_object(tiny_http: httpx.Client, path: str):
    response = tiny_http.post(path)
    assert response.status_code in (404, 405)
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff", b'{"a": Infinity}', b"[" * 10**6])
def test_what_is_no_object_is_refused(body: bytes):
    with pytest.raises(Refused):
        parse_json(body)
