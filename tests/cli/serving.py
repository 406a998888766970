"""A running server for tests: a tiny model of random weights, or a script, behind uvicorn on a free port."""

import contextlib
import math
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx
import openai

from localreason.cli.server_app import Access
from localreason.cli.server_runner import Runner
from localreason.cli.server_schema import Limits
from localreason.cli.server_stop import Server
from localreason.runtime.controls import combine
from localreason.runtime.errors import DecodeFailed
from localreason.runtime.model import Model, Recipe
from tests.fakes import ByteTokenizer, ScriptedEngine

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:<think>{% endif %}"
)
LIMITS = Limits(Recipe(combine("safe", ["budget:max=64"])), max_tokens=256, max_thinking=64, preset="safe")


DEADLINE_SECONDS = 30.0
"""Of every wait in a test, so that a fault fails it instead of holding it up."""


class ScriptedTokenizer(ByteTokenizer):
    """The byte tokenizer with what a model file says besides."""

    def __init__(self) -> None:
        super().__init__()
        self.prefix: list[int] = []
        self.control_texts = frozenset({"<|end|>"})
        self.metadata: dict[str, str] = {}
        self.template_tokens: dict[str, str] = {}
        self.chat_template = TEMPLATE

    def close(self) -> None:
        pass


class Gate:
    """Lets the engine of a scripted model pass a number of steps; open from the start."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._n_left: float = math.inf

    def pass_one(self) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._n_left > 0, DEADLINE_SECONDS):
                raise DecodeFailed(f"the gate was shut for {DEADLINE_SECONDS} s")
            self._n_left -= 1

    def shut(self) -> None:
        with self._changed:
            self._n_left = 0

    def let(self, n: float) -> None:
        with self._changed:
            self._n_left += n
            self._changed.notify_all()

    def open(self) -> None:
        self.let(math.inf)


class GatedEngine(ScriptedEngine):
    """Echoes the last line of the user, letter by letter, after a thought; waits at its gate before each step."""

    def __init__(self, tokenizer: ScriptedTokenizer, gate: Gate, **options: Any) -> None:
        super().__init__(self._next, tokenizer.n_vocab, **options)
        self._tokenizer, self.gate = tokenizer, gate
        self.is_failing = False

    def submit(self, batch: Any) -> None:
        self.gate.pass_one()
        if self.is_failing:
            self.is_failing = False
            raise ZeroDivisionError("scripted")
        super().submit(batch)

    def _next(self, tokens: list[int]) -> int:
        text = self._tokenizer.text(tokens)
        prompt, _, written = text.rpartition("assistant:<think>")
        line = prompt.rpartition("user: ")[2].rstrip("\n")
        thought = "hm\n" * (1000 if "think long" in line else 2)
        if "</think>" not in written:
            rest = (thought + "</think>")[len(written) :]
        else:
            answer = written.partition("</think>")[2].lstrip()
            answer = answer.removeprefix("Final Answer:")
            rest = f"You said {line}!"[len(answer) :]
        return self._tokenizer.encode(rest, special=True)[0] if rest else ByteTokenizer.END


def scripted_model(gate: Gate | None = None, **options: Any) -> Model:
    tokenizer = ScriptedTokenizer()
    engine = GatedEngine(tokenizer, gate or Gate(), **options)
    return Model(Path("scripted.gguf"), engine, tokenizer)  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, slots=True)
class Running:
    runner: Runner
    port: int
    server: Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def openai(self, api_key: str = "none") -> openai.OpenAI:
        return _client(f"{self.url}/v1", api_key)

    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=DEADLINE_SECONDS, verify=False)


@lru_cache
def _client(url: str, api_key: str) -> openai.OpenAI:
    # Certificates take longer to read than all else in a test.
    http = httpx.Client(verify=False, timeout=DEADLINE_SECONDS, limits=httpx.Limits(max_keepalive_connections=0))
    return openai.OpenAI(base_url=url, api_key=api_key, max_retries=0, http_client=http)


@contextlib.contextmanager
def serving(
    model: Model,
    n_parallel: int = 4,
    n_queue: int = 64,
    limits: Limits = LIMITS,
    access: Access | None = None,
    grace_seconds: float = 0.0,
) -> Iterator[Running]:
    runner = Runner(model, n_parallel, n_queue)
    if access is None or access.pause_seconds >= DEADLINE_SECONDS / 2:
        # A comment in the stream would begin the client's deadline anew.
        access = replace(access or Access(), pause_seconds=10 * DEADLINE_SECONDS)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that unread data is soon felt
        server = Server(runner, limits, access, grace_seconds)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield Running(runner, listener.getsockname()[1], server)
        finally:
            server.should_exit = True
            if isinstance(model.engine, GatedEngine):
                model.engine.gate.open()
            thread.join(DEADLINE_SECONDS)
            assert not thread.is_alive()
    runner.stop()
