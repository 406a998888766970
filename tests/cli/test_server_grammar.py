"""JSON schemas as grammars: what they let through, what is refused by name, and that thinking stays free."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import httpx
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localreason.cli.server_constraint import constrain
from localreason.cli.server_field import Refused
from localreason.cli.server_grammar import answer_rules, schema_rules
from localreason.cli.server_schema import Limits
from localreason.runtime.controls import combine
from localreason.runtime.decode import Request
from localreason.runtime.errors import InputError
from localreason.runtime.formats import FORMATS
from localreason.runtime.llama import EngineOptions, LlamaTokenizer, load_tokenizer
from localreason.runtime.model import Model, Recipe
from localreason.runtime.phase import PhaseTracker
from localreason.runtime.sequence import Phase, Sequence
from localreason.runtime.tokenizer import Tokenizer
from tests.cli.serving import Running, serving
from tests.gguf_models import write_model

END = 257
NODE = {
    "type": "object",
    "properties": {"v": {"type": "number"}, "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}},
    "required": ["v", "next"],
}
MIXED = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "string"}, "c": {"enum": ["x", "é", 3]}},
    "required": ["b"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grammar") / "tiny.gguf"
    return write_model(path, values={"llama.context_length": 4096})


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Iterator[LlamaTokenizer]:
    with load_tokenizer(path) as tokenizer:
        yield tokenizer


def allows(tokenizer: LlamaTokenizer, rules: str, text: str) -> bool:
    """True where a whole text is one of the grammar's."""
    grammar = tokenizer.grammar(rules)
    return all(grammar.take(token) for token in tokenizer.encode(text)) and grammar.take(END)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        (True, ['{"x":[1,null,"s"]}', "-3.5e2", "[]"], ["", "{,}", "01", "nul", "{} {}"]),
        ({"type": "object"}, ['{"x": {}}', "{}"], ["[]", '{"x"}']),
        ({"type": ["integer", "null"]}, ["7", "null"], ["7.5", '"7"']),
        (
            MIXED,
            ['{"b":"q"}', '{"a": -1, "b": "q\\"z"}', '{"b":"","c":"é"}', '{"a":1,"b":"","c":3}'],
            ['{"a":1}', '{"b":"q","a":1}', '{"b":"q","c":"y"}', '{"b":"q","d":1}', '{"b":"q",}', '{"a":1.5,"b":""}'],
        ),
        ({"properties": {"a": {}, "b": {}}}, ["{}", '{"a":1}', '{"b":[]}', '{"a":1,"b":2}'], ['{,"b":2}']),
        ({"additionalProperties": {"type": "boolean"}}, ["{}", '{"any":true,"x":false}'], ['{"any":1}']),
        ({"type": "object", "additionalProperties": False}, ["{}"], ['{"x":1}']),
        (
            {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
            ["[true]", "[true, false,true]"],
            ["[]", "[true,true,true,true]", "[1]"],
        ),
        ({"items": {"type": "null"}, "maxItems": 0}, ["[]"], ["[null]"]),
        (
            {"prefixItems": [{"type": "integer"}, {"type": "string"}], "items": False},
            ["[]", "[1]", '[1,"x"]'],
            ['[1,"x",2]', '["x"]'],
        ),
        ({"prefixItems": [{"type": "integer"}], "minItems": 2, "maxItems": 3}, ["[1,[]]", "[1,2,3]"], ["[1]"]),
        ({"type": "string", "minLength": 2, "maxLength": 3}, ['"ab"', '"aé😀"', '"\\n\\n"'], ['"a"', '"abcd"']),
        ({"const": {"k": ["\x7f\\"]}}, ['{"k":["\x7f\\\\"]}'], ["{}"]),
        ({"$defs": {"n": NODE}, "$ref": "#/$defs/n"}, ['{"v":1,"next":{"v":-2,"next":null}}'], ['{"v":1}']),
        ({"allOf": [{"type": "null"}], "description": "nothing"}, ["null"], ["1"]),
    ],
)
def test_a_grammar_lets_through_what_is_valid(
    tokenizer: LlamaTokenizer, schema: Any, right: list[str], wrong: list[str]
):
    rules = schema_rules(schema)
    assert [text for text in right if not allows(tokenizer, rules, text)] == []
    assert [text for text in wrong if allows(tokenizer, rules, text)] == []
    assert all(json.loads(text) is not ... for text in right)


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"type": "string", "pattern": "^a"}, "schema.pattern"),
        ({"type": "integer", "minimum": 3}, "schema.minimum"),
        ({"type": "string", "items": {}}, "schema.items"),
        ({"oneOf": [{"type": "null"}]}, "schema.oneOf"),
        ({"anyOf": []}, "schema.anyOf"),
        ({"enum": [1e999]}, "too large"),
        ({"type": "date"}, "schema.type"),
        ({"type": []}, "schema.type"),
        ({"$ref": "https://example.com/x"}, "outside itself"),
        ({"$ref": "#/$defs/x"}, "not there"),
        ({"properties": {"a": {"type": "array", "items": {"not": {}}}}}, "schema.a.items.not"),
        ({"properties": {}, "required": ["a"]}, "'a'"),
        ({"maxLength": 501}, "maxLength"),
        ({"minItems": 3, "maxItems": 2}, "minItems"),
        ({"const": "\ud800"}, "surrogate"),
        ({"enum": list(range(600))}, "512"),
        ({"const": "x" * 70_000}, "70"),
        (False, "schema"),
        (None, "schema"),
    ],
)
def test_what_a_grammar_cannot_keep_to_is_refused_by_name(schema: Any, named: str):
    with pytest.raises(Refused, match="response_format: ") as refused:
        schema_rules(schema)
    assert named in str(refused.value)


def test_a_schema_nested_too_deeply_is_refused():
    schema: Any = {}
    for _ in range(40):
        schema = {"items": schema}
    with pytest.raises(Refused, match="deeper than 32"):
        schema_rules(schema)


def test_a_schema_that_is_only_itself_is_refused_and_does_not_hang(tokenizer: LlamaTokenizer):
    with pytest.raises(InputError, match="cannot read the grammar"):
        tokenizer.grammar(schema_rules({"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}))


@pytest.mark.parametrize("value", ["json", {"type": "yaml"}, {"type": "json_schema"}, {"type": "json_schema", "x": 1}])
def test_other_formats_are_refused(value: Any):
    with pytest.raises(Refused, match="response_format"):
        answer_rules(value)


def test_text_is_no_grammar():
    assert answer_rules(None) is answer_rules({"type": "text"}) is None


def test_a_mask_leaves_what_is_allowed_and_reads_the_row_only(tokenizer: LlamaTokenizer):
    grammar = tokenizer.grammar(schema_rules({"enum": ["a", "b"]}))
    assert all(grammar.take(token) for token in tokenizer.encode('"'))
    row = np.linspace(0, 1, tokenizer.n_vocab, dtype=np.float32)
    before = row.copy()
    masked = grammar.mask(row)
    assert (row == before).all()
    allowed = np.flatnonzero(np.isfinite(masked))
    assert {tokenizer.piece(int(token)) for token in allowed} == {b"a", b"b"}
    assert (masked[allowed] == row[allowed]).all()


def test_bytes_that_are_no_character_are_not_taken_for_one(tokenizer: LlamaTokenizer):
    grammar = tokenizer.grammar(schema_rules({"type": "string"}))
    token_of = {tokenizer.piece(token): token for token in range(256)}
    taken = [grammar.take(token_of[bytes([byte])]) for byte in b'"\xe0\x80\xa9\xc3\xa9"']
    assert taken == [True, True, False, True, False, True, True]  # neither an overlong form nor half a character


def test_half_a_surrogate_pair_is_not_begun(tokenizer: LlamaTokenizer):
    token_of = {tokenizer.piece(token): token for token in range(tokenizer.n_vocab)}
    grammar = tokenizer.grammar(schema_rules({"type": "string"}))
    taken = [grammar.take(token_of[bytes([byte])]) for byte in b'"\xed\xa0\xbf\x9f\xbf"']
    assert taken == [True, True, False, False, True, True, True]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
WORDS = ["type", "properties", "required", "items", "enum", "const", "anyOf", "$ref", "minLength", "maxItems"]
SCHEMAS = st.recursive(
    JSON | st.sampled_from([{"type": name} for name in ("object", "array", "string", "integer", "null")]),
    lambda inner: (
        st.dictionaries(st.sampled_from(WORDS), inner | st.lists(inner, max_size=3), max_size=3)
        | st.fixed_dictionaries({"properties": st.dictionaries(st.text(max_size=4), inner, max_size=3)})
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCHEMAS)
def test_no_schema_however_shaped_is_more_than_refused(tokenizer: LlamaTokenizer, schema: Any):
    try:
        grammar = tokenizer.grammar(schema_rules(schema))
    except InputError:
        return
    grammar.mask(np.zeros(tokenizer.n_vocab, np.float32))


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON)
def test_every_value_is_its_own_constant_and_a_value(tokenizer: LlamaTokenizer, value: Any):
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    assert allows(tokenizer, schema_rules({"const": value}), text)
    assert allows(tokenizer, schema_rules(True), text) or "\x7f" in text


# --- in a reply -----------------------------------------------------------------------------------------------------


def row_of(tokenizer: LlamaTokenizer, *tokens: int) -> np.ndarray:
    """Logits that fall from the first token to the last; the others are far below."""
    row = np.full(tokenizer.n_vocab, -20.0, np.float32)
    for i, token in enumerate(tokens):
        row[token] = 10.0 - i
    return row


def constrained(tokenizer: LlamaTokenizer, schema: Any, opening: list[int]) -> Request:
    sequence = Sequence([1])
    sequence.phase = Phase.ANSWER
    request = Request(sequence, PhaseTracker(FORMATS["think"]), lambda row: int(row.argmax()))
    constrain(request, tokenizer.grammar(schema_rules(schema)), opening, tokenizer)
    return request


def test_thinking_is_free_and_the_answer_is_not(tokenizer: LlamaTokenizer):
    request = constrained(tokenizer, {"enum": ["a"]}, [])
    x, quote = tokenizer.encode('x"')
    request.sequence.phase = Phase.THINK
    assert request.sample(row_of(tokenizer, x, quote)) == x
    request.sequence.phase = Phase.ANSWER
    assert request.sample(row_of(tokenizer, x, quote)) == quote
    assert request.sample(row_of(tokenizer, END, x)) == tokenizer.encode("a")[0]


class Merged:
    """A vocabulary that has a token for `nk>{` in the place of `x`."""

    def __init__(self, tokenizer: LlamaTokenizer) -> None:
        self.encode, self._piece, self.token = tokenizer.encode, tokenizer.piece, tokenizer.encode("x")[0]

    def piece(self, token: int) -> bytes:
        return b"nk>{" if token == self.token else self._piece(token)


def test_a_token_that_ends_the_thinking_and_begins_the_answer_is_cut(tokenizer: LlamaTokenizer):
    merged = Merged(tokenizer)
    request = Request(Sequence([1]), PhaseTracker(FORMATS["think"], "<think>\n"), lambda row: int(row.argmax()))
    request.sequence.phase = Phase.THINK
    grammar = tokenizer.grammar(schema_rules({"enum": ["a"]}))
    constrain(request, grammar, [], cast(Tokenizer, merged))
    row = row_of(tokenizer, merged.token)
    assert request.sample(row) == merged.token, "no tag yet"
    request.tracker.feed(b"so a.</thi", 0)
    assert [request.sample(row) for _ in "nk>"] == tokenizer.encode("nk>")


def test_a_model_may_open_its_thinking_itself(tokenizer: LlamaTokenizer):
    opening = tokenizer.encode("<thi")  # as where the tag is no single token
    request = constrained(tokenizer, {"enum": ["a"]}, opening)
    x, quote = tokenizer.encode('x"')
    assert request.sample(row_of(tokenizer, opening[0])) == opening[0]
    assert [request.sample(row_of(tokenizer, x)) for _ in opening[1:]] == opening[1:]
    request.sequence.n_blocks = 1
    assert request.sample(row_of(tokenizer, opening[0], quote)) == quote


def test_a_vocabulary_without_what_has_to_follow_ends_the_reply(tokenizer: LlamaTokenizer):
    request = constrained(tokenizer, {"enum": ["a"]}, [])
    x = tokenizer.encode("x")[0]
    row = np.full(tokenizer.n_vocab, -np.inf, np.float32)
    row[x] = 1.0  # all others are banned
    assert request.sample(row) == x
    assert request.sequence.cancelled == "grammar"


@pytest.fixture(scope="module")
def running(path: Path) -> Iterator[Running]:
    limits = Limits(Recipe(combine("safe", ["budget:max=12"])), 256, 12, "safe", (), 16, 265)
    with (
        Model.open(path, EngineOptions(n_context=16384, n_sequences=9, n_threads=1)) as model,
        serving(model, limits=limits) as running,
    ):
        yield running


PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "ages": {"type": "array", "items": {"type": "integer"}, "maxItems": 2},
        "kind": {"enum": ["big", "small"]},
    },
    "required": ["name", "kind"],
    "additionalProperties": False,
}


def ask(client: openai.OpenAI, **more: Any) -> Any:
    format = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    settings = {"model": "any", "response_format": format, "temperature": 1.5, **more}
    return client.chat.completions.create(messages=[{"role": "user", "content": "Who?"}], **settings)


def test_replies_of_a_model_without_any_sense_are_valid_all_the_same(running: Running):
    reply = ask(running.openai(), n=8, seed=3, logprobs=True)
    for choice in reply.choices:
        person = json.loads(choice.message.content)
        assert set(person) <= {"name", "ages", "kind"}
        assert len(person["name"]) <= 4
        assert person["kind"] in ("big", "small")
        assert len(choice.message.reasoning_content) > 0
        pieces = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
        assert pieces.decode().strip() == choice.message.content
        assert choice.finish_reason == "stop"
    assert len({choice.message.content for choice in reply.choices}) > 1
    assert reply.localreason["choices"][0]["counters"]["budget"]["cuts"] == 1  # the lead-in is not written


def test_a_stream_and_a_search_follow_the_schema_too(running: Running):
    own = {"localreason": {"search": {"rule": "majority", "n": 3, "guard": False}}}
    for more in ({}, {"extra_body": own}, {"reasoning_effort": "none"}):
        chunks = ask(running.openai(), stream=True, seed=5, **more)
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        assert json.loads(text)["kind"] in ("big", "small")


def test_a_faulty_schema_is_told_and_a_completion_takes_none(running: Running):
    format = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "#"}}}
    with pytest.raises(openai.BadRequestError) as refused:
        ask(running.openai(), response_format=format)
    assert refused.value.param == "response_format"
    with running.http() as http:
        body = {"prompt": "x", "response_format": {"type": "json_object"}}
        response: httpx.Response = http.post("/v1/completions", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "response_format")


def operation(name: str, *before: str) -> dict[str, Any]:
    """An expression of two others; `before` are its properties that come first."""
    parts = {"left": {"$ref": "#/$defs/E"}, "right": {"$ref": "#/$defs/E"}}
    properties = {"op": {"const": name}, **parts} if before else {**parts, "op": {"const": name}}
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def expressions(*before: str) -> dict[str, Any]:
    names = ("add", "mul", "sub")
    either = {"anyOf": [*({"$ref": f"#/$defs/{name}"} for name in names), {"type": "number"}]}
    return {"$ref": "#/$defs/E", "$defs": {"E": either, **{name: operation(name, *before) for name in names}}}


ARRAYS = {"type": "array", "items": {"$ref": "#"}, "minItems": 1}
PAIRS = {"anyOf": [{"type": "array", "items": True}, {"type": "array", "items": {"type": "number"}}]}


def nested(schema: dict[str, Any], depth: int) -> dict[str, Any]:
    for _ in range(depth):
        schema = {"anyOf": [{"type": "array", "items": schema}, {"type": "array", "items": schema, "minItems": 2}]}
    return schema


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        (expressions(), "nests itself through alternatives that begin alike"),
        ({"anyOf": [ARRAYS, {**ARRAYS, "maxItems": 400}]}, "nests itself through alternatives that begin alike"),
        (nested({"type": "null"}, 7), "has more than 64 alternatives in one another"),
        (
            {"$defs": {"x": nested({"type": "null"}, 4)}, "anyOf": [nested({"$ref": "#/$defs/x"}, 3)]},
            "has more than 64 alternatives in one another",
        ),
    ],
)
def test_alternatives_that_multiply_the_ways_to_read_a_text_are_refused(schema: dict[str, Any], fault: str):
    with pytest.raises(Refused, match=fault):
        schema_rules(schema)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        (expressions("op"), '{"op":"add","left":' * 20),
        (nested({"type": "null"}, 6), "[" * 6),
        (PAIRS, "[[1,"),
    ],
)
def test_alternatives_that_are_told_apart_in_time_are_read_fast(tokenizer: LlamaTokenizer, schema: Any, text: str):
    grammar = tokenizer.grammar(schema_rules(schema))
    started = time.monotonic()
    assert all(grammar.take(token) for token in tokenizer.encode(text))
    assert time.monotonic() - started < 5
