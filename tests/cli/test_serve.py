"""`localreason serve` as its clients meet it: the real openai client against a running server."""

import asyncio
import contextlib
import json
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest

from localreason.cli.main import ExitCode, main
from localreason.cli.server_app import Access
from localreason.cli.server_job import Job
from localreason.cli.server_runner import Runner
from localreason.cli.server_schema import Limits, parse_chat
from localreason.runtime.controls import combine
from localreason.runtime.controls.budget import closing
from localreason.runtime.llama import EngineOptions
from localreason.runtime.model import Model, Recipe
from tests.cli.serving import DEADLINE_SECONDS, LIMITS, Gate, GatedEngine, Running, scripted_model, serving
from tests.gguf_models import write_model

ASKED: list[Any] = [{"role": "user", "content": "What is 3 + 4?"}]
WITHOUT_ITS_BODY = b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model of random weights, which seldom ends by itself: give a seed where it must not."""
    path = tmp_path_factory.mktemp("serve") / "tiny.gguf"
    write_model(path, values={"llama.context_length": 4096})
    options = EngineOptions(n_context=16384, n_sequences=9, n_threads=1)
    limits = Limits(Recipe(combine("safe", ["budget:max=64"])), 256, 64, "safe", (), 16, 265)
    with Model.open(path, options) as model, serving(model, limits=limits) as running:
        yield running


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def scripted(gate: Gate) -> Iterator[Running]:
    """A model that thinks twice, then repeats what the user said; steps wait while its gate is shut."""
    with serving(scripted_model(gate), n_parallel=2, n_queue=2) as running:
        yield running


def ask(client: openai.OpenAI, text: str = "hello", **more: Any) -> Any:
    return client.chat.completions.create(model="any", messages=[{"role": "user", "content": text}], **more)


def joined(chunks: Any) -> tuple[dict[int, str], dict[int, str], dict[int, str]]:
    """Reasoning, content and finish reason of each choice of a stream."""
    thinking: dict[int, str] = {}
    content: dict[int, str] = {}
    ends: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.choices:
            i = choice.index
            thinking[i] = thinking.get(i, "") + (getattr(choice.delta, "reasoning_content", None) or "")
            content[i] = content.get(i, "") + (choice.delta.content or "")
            if choice.finish_reason:
                ends[i] = choice.finish_reason
    return thinking, content, ends


def test_a_chat_answers_with_its_thinking_apart_and_counted(scripted: Running):
    reply = ask(scripted.openai())
    message = reply.choices[0].message
    assert (message.content, message.reasoning_content) == ("You said hello!", "hm\nhm\n")
    assert reply.choices[0].finish_reason == "stop"
    assert reply.usage.completion_tokens_details.reasoning_tokens == 7
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.localreason["choices"][0]["stop"] == "end"
    assert reply.localreason["choices"][0]["counters"]["budget"]["cuts"] == 0


def test_a_stream_gives_what_the_whole_reply_gives(tiny: Running):
    client = tiny.openai()
    settings: dict[str, Any] = {"seed": 7, "max_tokens": 40, "temperature": 1.0, "n": 2}
    ask(client, **settings)  # from here on the prompt is shared, so that all batches are alike to the last bit
    whole = ask(client, **settings)
    chunks = list(ask(client, **settings, stream=True, stream_options={"include_usage": True}))
    thinking, content, ends = joined(chunks)
    assert len(chunks) > 10
    for choice in whole.choices:
        assert thinking[choice.index] == choice.message.reasoning_content
        assert content[choice.index] == choice.message.content
        assert ends[choice.index] == choice.finish_reason == "length"
    assert whole.choices[0].message.content != whole.choices[1].message.content
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].choices == []


def test_the_same_seed_gives_the_same_reply_and_no_seed_another(tiny: Running):
    client = tiny.openai()
    settings: dict[str, Any] = {"max_tokens": 32, "temperature": 1.5}
    ask(client, **settings)
    texts = [ask(client, seed=seed, **settings).choices[0].message.reasoning_content for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    free = [ask(client, **settings).choices[0].message.reasoning_content for _ in range(2)]
    assert free[0] != free[1]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_word_ends_the_answer_before_it_and_not_the_thinking(scripted: Running, is_stream: bool):
    reply = ask(scripted.openai(), "one hm two", stop=["hm", " tw"], stream=is_stream)
    if is_stream:
        thinking, content, ends = joined(reply)
    else:
        [choice] = reply.choices
        thinking, content, ends = {0: choice.message.reasoning_content}, {0: choice.message.content}, {0: "stop"}
    assert (thinking, content, ends) == ({0: "hm\nhm\n"}, {0: "You said one "}, {0: "stop"})


def test_what_may_begin_a_stop_word_is_not_lost(scripted: Running):
    assert ask(scripted.openai(), "ab", stop="ab!?").choices[0].message.content == "You said ab!"


def test_log_probabilities_are_those_of_the_sampled_tokens(tiny: Running):
    reply = ask(
        tiny.openai(), max_tokens=24, temperature=0, logprobs=True, top_logprobs=3, reasoning_effort="none", seed=1
    )
    entries = reply.choices[0].logprobs.content
    assert len(entries) == reply.usage.completion_tokens == 24
    for entry in entries:
        assert entry.logprob <= 0
        assert [top.logprob for top in entry.top_logprobs] == sorted(t.logprob for t in entry.top_logprobs)[::-1]
        assert entry.top_logprobs[0].token == entry.token  # the likeliest was taken
    data = b"".join(bytes(entry.bytes) for entry in entries)
    assert data.decode("utf-8", "replace").lstrip().startswith(reply.choices[0].message.content[:3])


def test_a_completion_continues_the_text_and_takes_token_ids(tiny: Running):
    client = tiny.openai()
    settings: dict[str, Any] = {"model": "any", "max_tokens": 12, "temperature": 0, "logprobs": 2}
    one = client.completions.create(prompt="abc", **settings)
    ids = tiny.runner.model.tokenizer.encode("abc")
    other = client.completions.create(prompt=ids, **settings)
    assert one.choices[0].text == other.choices[0].text != ""
    assert one.usage is not None
    assert one.usage.prompt_tokens == len(ids)
    assert one.choices[0].logprobs is not None
    assert len(one.choices[0].logprobs.tokens or []) == 12
    chunks = client.completions.create(prompt="abc", stream=True, **settings)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == one.choices[0].text


def test_many_clients_at_once_get_each_their_own_answer(tiny: Running):
    client = tiny.openai()

    def answer(i: int) -> str:
        reply = ask(client, f"Say {i * 37}", max_tokens=12, temperature=0, reasoning_effort="none")
        return reply.choices[0].message.content

    alone = [answer(i) for i in range(32)]
    with ThreadPoolExecutor(32) as pool:
        beside = list(pool.map(answer, range(32)))
    assert len(set(alone)) > 16
    # Batches of another size take other kernels, whose last bits may turn a near tie: see test_model.py.
    assert sum(one == other for one, other in zip(alone, beside, strict=True)) >= 26
    assert not any(beside[i] in set(alone) - {alone[i]} for i in range(32))


def test_many_streams_are_never_mixed_up(gate: Gate):
    with serving(scripted_model(gate, n_sequences=9)) as running, ThreadPoolExecutor(32) as pool:
        client = running.openai()
        replies = list(pool.map(lambda i: joined(ask(client, f"number {i}", stream=True)), range(32)))
        assert [content[0] for _, content, _ in replies] == [f"You said number {i}!" for i in range(32)]
        assert {thinking[0] for thinking, _, _ in replies} == {"hm\nhm\n"}


def test_a_search_with_one_sample_gives_the_whole_answer(scripted: Running):
    body = {"search": {"rule": "majority", "n": 1}}
    for is_stream in (False, True):
        reply = ask(scripted.openai(), "ab", stop="ab!?", extra_body={"localreason": body}, stream=is_stream)
        content = joined(reply)[1][0] if is_stream else reply.choices[0].message.content
        assert content == "You said ab!"


def test_search_shows_the_winner_only_and_counts_all_samples(scripted: Running):
    body = {"search": {"rule": "majority", "n": 3, "guard": False}}
    for is_stream in (False, True):
        reply = ask(scripted.openai(), extra_body={"localreason": body}, stream=is_stream)
        if is_stream:
            assert joined(reply)[1] == {0: "You said hello!"}
        else:
            assert reply.choices[0].message.content == "You said hello!"
            assert reply.localreason["choices"][0]["counters"]["search"]["samples"] == 3


def test_a_budget_cuts_the_thinking_and_the_servers_cap_always_holds(scripted: Running):
    for own, most in (({"budget": 8}, 8), ({"budget": 10**6}, 64), ({"controls": ["budget:max=9999"]}, 64)):
        reply = ask(scripted.openai(), "think long", extra_body={"localreason": own})
        assert reply.localreason["budget"] == most
        assert reply.usage.completion_tokens_details.reasoning_tokens <= most
        assert reply.choices[0].message.content.endswith("You said think long!")


@pytest.mark.parametrize(("max_tokens", "is_thinking"), [(4, False), (8, False), (16, False), (32, False), (64, True)])
def test_a_short_reply_keeps_to_its_limit_and_room_for_its_answer(max_tokens: int, is_thinking: bool):
    model = scripted_model()
    limits = replace(LIMITS, n_closing=len(closing(model.format, model.tokenizer, model.format.lead)))
    with serving(model, limits=limits) as running:
        reply = ask(running.openai(), "think long", max_tokens=max_tokens)
    assert reply.usage.completion_tokens <= max_tokens
    assert (reply.usage.completion_tokens_details.reasoning_tokens > 0) == is_thinking
    assert max_tokens < 8 or "You" in reply.choices[0].message.content


def first_chunk(running: Running, gate: Gate, text: str = "think long") -> tuple[Any, str]:
    """A stream whose engine waits before its first step, and its id."""
    gate.shut()
    stream = ask(running.openai(), text, stream=True)
    return stream, next(iter(stream)).id


def test_answer_now_closes_the_thinking(scripted: Running, gate: Gate):
    stream, id = first_chunk(scripted, gate)
    gate.let(6)
    thoughts = [next(stream)]  # one chunk or more: what was decoded before the server wrote is written at once
    with scripted.http() as http:
        assert http.get("/v1/requests").json()["data"][0]["state"] == "running"
        assert http.post(f"/v1/requests/{id}/answer_now").status_code == 200
    gate.open()
    chunks = [*thoughts, *stream]
    thinking, content, _ = joined(chunks)
    assert 2 <= len(thinking[0]) < 20
    assert content[0].endswith("You said think long!")
    assert chunks[-1].localreason["choices"][0]["counters"]["budget"]["cuts"] == 1


def test_what_is_decoded_while_the_server_is_busy_arrives_with_its_end(scripted: Running, gate: Gate):
    stream, _ = first_chunk(scripted, gate, "hello")
    held = threading.Event()
    loop = scripted.runner._loop  # pyright: ignore[reportPrivateUsage]
    assert loop is not None
    loop.call_soon_threadsafe(held.wait, DEADLINE_SECONDS)
    gate.open()
    wait_until(lambda: not scripted.runner.jobs)
    held.set()
    assert joined(stream) == ({0: "hm\nhm\n"}, {0: "You said hello!"}, {0: "stop"})


def test_a_stream_without_news_says_so_in_comments(gate: Gate):
    with serving(scripted_model(gate), access=Access(pause_seconds=0.01)) as running, running.http() as http:
        gate.shut()
        body = {"messages": ASKED, "stream": True}
        with http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            assert next(line for line in lines if line.startswith(":")) == ": still working"
            gate.open()
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_cancel_ends_a_request_that_runs_and_one_that_waits(gate: Gate):
    with serving(scripted_model(gate), n_parallel=1, n_queue=2) as running, running.http() as http:
        running_stream, running_id = first_chunk(running, gate)
        waiting_stream, waiting_id = first_chunk(running, gate)
        assert http.post(f"/v1/requests/{waiting_id}/cancel").status_code == 200
        chunks = list(waiting_stream)  # though no step has been made
        assert chunks[-1].localreason["choices"][0]["stop"] == "cancelled"
        assert http.post(f"/v1/requests/{running_id}/cancel").status_code == 200
        gate.open()
        assert joined(running_stream)[2] == {0: "length"}
        assert http.post(f"/v1/requests/{running_id}/cancel").status_code == 404
        assert running.runner.n_running == running.runner.n_waiting == 0


@pytest.mark.parametrize("n_steps", [0, 5])
def test_a_client_that_goes_away_frees_its_place(gate: Gate, n_steps: int):
    """Before the first step, which is within the prompt, and in the middle of the stream."""
    with serving(scripted_model(gate), n_parallel=1, n_queue=0) as running:
        gate.shut()
        body = {"messages": [{"role": "user", "content": "think long " * 40}], "stream": True}
        with running.http() as http, http.stream("POST", "/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            gate.let(n_steps)
        with running.http() as http:
            wait_until(lambda: all(sequence.cancelled for sequence in sequences(running)))
            gate.open()
            wait_until(lambda: not running.runner.jobs)
            assert 'requests_total{outcome="disconnected"} 1' in http.get("/metrics").text
        assert ask(running.openai()).choices[0].message.content == "You said hello!"


def sequences(running: Running) -> list[Any]:
    return [sequence for job in list(running.runner.jobs.values()) for sequence in job.sequences]


def wait_until(is_true: Callable[[], bool]) -> None:
    """The server works in threads of its own: look until it has done so."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not is_true():
        assert time.monotonic() < deadline, "it never came true"
        threading.Event().wait(0.001)


def test_a_full_queue_is_told_and_a_place_that_is_freed_is_given(scripted: Running, gate: Gate):
    streams = [first_chunk(scripted, gate) for _ in range(4)]
    with pytest.raises(openai.RateLimitError, match="4 replies are running or waiting") as refused:
        ask(scripted.openai())
    assert int(refused.value.response.headers["retry-after"]) >= 1
    gate.open()
    for stream, _ in streams:
        assert joined(stream)[2] == {0: "stop"}
    assert ask(scripted.openai()).choices[0].message.content == "You said hello!"


def test_a_request_of_many_replies_lets_others_in_between(gate: Gate):
    async def run() -> list[Job]:
        with scripted_model(gate) as model:
            runner = Runner(model, n_parallel=1, n_queue=64)
            runner.start()
            jobs = [await runner.submit(parse_chat({"messages": ASKED, "n": n}, LIMITS)) for n in (1, 3, 1, 1)]
            gate.open()
            for job in jobs:
                while not job.is_done:
                    await asyncio.wait_for(job.updates(), DEADLINE_SECONDS)
            runner.stop()
            return jobs

    gate.shut()
    first, many, one, other = asyncio.run(run())
    assert sorted((first, many, one, other), key=lambda job: job.ended or 0) == [first, one, other, many]


def test_a_vote_that_is_decided_does_not_wait_for_the_turns_of_the_other_samples(gate: Gate):
    async def run() -> tuple[Job, list[Job]]:
        with scripted_model(gate) as model:
            runner = Runner(model, n_parallel=1, n_queue=64)
            runner.start()
            search = {"localreason": {"search": {"rule": "majority", "n": 9}}}
            said = [{"role": "user", "content": "\\boxed{7}"}]  # which the model repeats
            vote = await runner.submit(parse_chat({"messages": said, **search}, LIMITS))
            others = [await runner.submit(parse_chat({"messages": ASKED}, LIMITS)) for _ in range(12)]
            gate.open()
            for job in (vote, *others):
                while not job.is_done:
                    await asyncio.wait_for(job.updates(), DEADLINE_SECONDS)
            assert runner._n_held == 0
            runner.stop()
            return vote, others

    gate.shut()
    vote, others = asyncio.run(run())
    assert sum(job.ended < vote.ended for job in others) <= 9, "those after the fifth sample come behind it"


@pytest.mark.parametrize(("rule", "is_race"), [("first", True), ("short", True), ("majority", False)])
def test_samples_that_race_stay_together_in_the_queue(gate: Gate, rule: str, is_race: bool):
    search = {"localreason": {"search": {"rule": rule, "n": 3, "m": 2}}}

    async def run() -> list[str]:
        with scripted_model(gate) as model:
            runner = Runner(model, n_parallel=3, n_queue=64)
            race, one = [await runner.submit(parse_chat({"messages": ASKED, **more}, LIMITS)) for more in (search, {})]
            names = {race.id: "race", one.id: "one"}
            return [names[request.sequence.id.split("/")[0]] for _, request in runner._waiting]

    wanted = ["race", "race", "race", "one"] if is_race else ["race", "one", "race", "race"]
    assert asyncio.run(run()) == wanted


def test_a_reader_that_does_not_read_holds_up_nobody_and_is_given_up():
    """Both places of the batch go to readers of long replies that never read a byte."""
    turns = [{"role": "user", "content": "x" * 300}]
    data = json.dumps({"messages": turns, "stream": True, "logprobs": True, "top_logprobs": 20}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(data)}\r\n\r\n"
    with (
        serving(scripted_model(), n_parallel=2, access=Access(write_seconds=0.1)) as running,
        contextlib.ExitStack() as stack,
    ):
        lazy = [stack.enter_context(socket.socket()) for _ in range(2)]
        for connection in lazy:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", running.port))
            connection.sendall(head.encode() + data)
        for connection in lazy:
            connection.settimeout(DEADLINE_SECONDS)
            connection.recv(1, socket.MSG_PEEK)  # its reply has begun
        for i in range(4):
            assert ask(running.openai(), f"{i}").choices[0].message.content == f"You said {i}!"
        wait_until(lambda: not running.server.server_state.tasks)
        for connection in lazy:
            received = b""
            while part := connection.recv(1 << 16):
                received += part
            assert b"data: " in received
            assert b"[DONE]" not in received


def test_a_failing_engine_fails_the_requests_that_run_and_no_later_ones(scripted: Running):
    engine = scripted.runner.model.engine
    assert isinstance(engine, GatedEngine)
    engine.is_failing = True
    with pytest.raises(openai.InternalServerError, match="scripted"):
        ask(scripted.openai())
    with scripted.http() as http:
        assert http.get("/health").json()["status"] == "failing"
        assert ask(scripted.openai()).choices[0].message.content == "You said hello!"
        assert http.get("/health").json() == {"status": "ok", "problem": None}


def test_a_second_turn_shares_the_prompt_of_the_first(scripted: Running):
    client = scripted.openai()
    first = ask(client, "a long enough question").choices[0].message
    turns: list[Any] = [{"role": "user", "content": "a long enough question"}, first.model_dump()]
    reply = client.chat.completions.create(model="x", messages=[*turns, {"role": "user", "content": "more"}])
    assert reply.choices[0].message.content == "You said more!"
    engine = scripted.runner.model.engine
    assert isinstance(engine, GatedEngine)
    n_shared = [call for call in engine.calls if call[0] == "fork"][-1][3]
    assert n_shared >= len("user: a long enough question\nassistant:")
    assert reply.usage is not None
    assert reply.usage.prompt_tokens_details is not None
    assert reply.usage.prompt_tokens_details.cached_tokens == n_shared


def test_a_prompt_that_is_too_long_is_told(tiny: Running):
    with pytest.raises(openai.BadRequestError, match="the context holds 4096"):
        ask(tiny.openai(), "word " * 5000)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"n": 17}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stop": ""}, "stop"),
        ({"extra_body": {"localreason": {"speed": 1}}}, "localreason"),
        ({"extra_body": {"localreason": {"controls": ["budget:max=x"]}}}, "localreason.controls"),
        ({"extra_body": {"localreason": {"preset": "none"}}}, "localreason.preset"),
        ({"extra_body": {"localreason": {"search": "best"}}}, "localreason.controls"),
        ({"reasoning_effort": "much"}, "reasoning_effort"),
    ],
)
def test_what_the_server_cannot_do_is_refused_by_name(scripted: Running, more: dict[str, Any], param: str):
    with pytest.raises(openai.BadRequestError) as refused:
        ask(scripted.openai(), **more)
    assert refused.value.param == param


def test_unknown_fields_are_passed_over_and_named(scripted: Running):
    assert ask(scripted.openai(), user="me", extra_body={"cache_prompt": True}).localreason["ignored"] == [
        "cache_prompt",
        "user",
    ]


def test_a_key_is_needed_where_one_is_set():
    with serving(scripted_model(), access=Access(api_key="säcret")) as running:
        with running.http() as http:
            assert http.get("/health").status_code == 200
            wrong = [{}, {b"Authorization": b"Bearer no"}, {b"Authorization": "Basic säcret".encode()}]
            for headers in wrong:
                response = http.get("/v1/models", headers=headers)
                assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            right = {b"Authorization": "Bearer säcret".encode()}
            assert http.get("/v1/models", headers=right).json()["data"][0]["id"] == "scripted"
        with pytest.raises(openai.AuthenticationError):
            ask(running.openai("wrong"))


@pytest.mark.parametrize(
    "asked",
    [b"", b"GET /health HTTP/1.1\r\nHo", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET", WITHOUT_ITS_BODY],
    ids=["nothing", "half a header", "half a second header", "a body that never comes"],
)
def test_a_connection_without_a_request_is_closed_while_others_are_served(gate: Gate, asked: bytes):
    with serving(scripted_model(gate), access=Access(header_seconds=0.1)) as running, running.http() as http:
        stream, _ = first_chunk(running, gate, "hello")  # before the other, so that its time would be over first
        with socket.create_connection(("127.0.0.1", running.port)) as connection:
            connection.settimeout(DEADLINE_SECONDS)
            connection.sendall(asked)
            assert http.get("/health").status_code == 200
            while connection.recv(1 << 16):
                pass
        gate.open()
        assert joined(stream)[2] == {0: "stop"}, "a request under way has all the time it needs"


def test_a_body_that_is_too_large_is_refused_announced_or_in_chunks():
    with serving(scripted_model(), access=Access(n_body_bytes=1000)) as running, running.http() as http:
        headers = {"Content-Type": "application/json"}

        def endless() -> Iterator[bytes]:
            for _ in range(20):
                yield b" " * 100

        for content in (b" " * 2000, endless()):
            response = http.post("/v1/chat/completions", content=content, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(("n_announced", "n_sent"), [(1_000_000, 1_000_000), (1 << 30, 0)])
def test_a_client_that_writes_its_whole_body_first_learns_that_it_is_too_large(n_announced: int, n_sent: int):
    """As far as what is too much is read; what is far too much is refused once it is announced."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with (
        serving(scripted_model(), access=Access(n_body_bytes=1000)) as running,
        running.http() as http,
        socket.create_connection(("127.0.0.1", running.port), DEADLINE_SECONDS) as connection,
    ):
        connection.sendall(f"{head}Content-Length: {n_announced}\r\n\r\n".encode())
        assert http.get("/health").status_code == 200  # by now the header has been read
        for _ in range(n_sent // 1000):
            connection.sendall(b" " * 1000)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413 ")


def test_a_web_page_gets_nothing():
    with serving(scripted_model(), access=Access(hosts=("localhost", "127.0.0.1"))) as running, running.http() as http:
        page = {"Origin": "https://evil.example"}
        assert "access-control-allow-origin" not in http.get("/v1/models", headers=page).headers
        assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
        assert (
            http.post("/v1/chat/completions", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
        )
        assert http.options("/v1/chat/completions", headers=page).status_code == 405


def test_what_runs_when_the_server_stops_gets_an_end(gate: Gate):
    with serving(scripted_model(gate), grace_seconds=0) as running:
        stream, _ = first_chunk(running, gate)
        running.server.should_exit = True
        wait_until(lambda: any(sequence.cancelled for sequence in sequences(running)))
        gate.open()
        chunks = list(stream)
    assert chunks[-1].localreason["choices"][0]["stop"] == "shutdown"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_serves_until_it_is_told_to_stop(tmp_path: Path, number: signal.Signals):
    path = write_model(tmp_path / "tiny.gguf", values={"llama.context_length": 4096})
    code = "import sys; from localreason.cli.main import main; sys.exit(main())"
    arguments = ["serve", "--model", str(path), "--port", "0", "--context", "8192", "-c", "budget:max=99999"]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert select.select([process.stdout], [], [], DEADLINE_SECONDS)[0], "it never listened"
            url = process.stdout.readline().split()[-1]
            client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
            assert client.models.list().data[0].id == "tiny"
            for n in (4, 8, 16, 32):
                reply = ask(client, max_tokens=n, temperature=0)
                assert (reply.usage.completion_tokens, reply.choices[0].finish_reason) == (n, "length")
            process.send_signal(number)
            assert process.wait(30) == ExitCode.OK
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("args", "code"),
    [(["--host", "0.0.0.0"], ExitCode.INPUT), (["-c", "bogus"], ExitCode.USAGE), (["--port", "70000"], ExitCode.USAGE)],
)
def test_the_command_refuses_what_it_cannot_serve(
    args: list[str], code: ExitCode, model: str, capfd: pytest.CaptureFixture[str]
):
    assert main(["serve", "--model", model, *args]) == code
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("package", ["starlette", "uvicorn"])
def test_a_missing_package_is_one_sentence_with_its_remedy(package: str, model: str):
    code = f"import sys; sys.modules['{package}'] = None; from localreason.cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, "serve", "--model", model], capture_output=True, text=True)
    assert done.returncode == ExitCode.INPUT
    assert "pip install 'localreason[serve]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_that_is_taken_is_told(model: str, capfd: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--model", model, "--port", str(taken.getsockname()[1])]) == ExitCode.INPUT
    assert "cannot be taken" in capfd.readouterr().err


def test_the_server_speaks_while_it_decodes(scripted: Running, gate: Gate):
    stream, _ = first_chunk(scripted, gate)
    with scripted.http() as http:
        wait_until(lambda: "localreason_sequences_running 1" in http.get("/metrics").text)
    gate.open()
    assert joined(stream)[2] == {0: "stop"}
