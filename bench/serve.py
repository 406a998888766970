"""Time to first token and tokens per second of `localreason serve` against the bare loop at the same batch size.

    python bench/serve.py MODEL.gguf [--clients 1 4 16] [--tokens 96] [--runs 5] [--out bench/results/serve-NAME.json]

The bare loop is llama_decode over a batch of as many sequences and an argmax of each row, in the same process over the
same context and weights; the server is a real one on loopback, and its clients, in a process of their own, stream over
HTTP. Both have the same prompt and end after the same number of tokens, and take turns forth and back. What counts is
the ratio within a turn of tokens per second of the decode, from the first token of any client to the last one of all.
With `--llama-server PATH` llama.cpp's own server takes its turns too. The last line is JSON.
"""

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
from record import describe_run, write
from turns import Turns

from localreason.cli.server_app import Access
from localreason.cli.server_runner import Runner
from localreason.cli.server_schema import Limits
from localreason.cli.server_stop import Server
from localreason.runtime.controls import combine
from localreason.runtime.engine import Span
from localreason.runtime.llama import EngineOptions
from localreason.runtime.model import Model, Recipe

TEXT = "Think about this step by step: a farmer has 17 sheep, buys 5 more and sells a third of all of them. "


class Endless:
    """A tokenizer without ends of generation, so that every reply has the same number of tokens."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def is_end(self, token):
        return False


def bare(engine, prompt, n_clients, n_tokens):
    """Tokens per second of all sequences, and seconds to the first token of all."""
    start = time.perf_counter()
    for i in range(0, len(prompt), engine.n_batch):
        part = prompt[i : i + engine.n_batch]
        rows = engine.decode([Span(0, i, part)])
    for i in range(1, n_clients):
        engine.fork(0, i, len(prompt) - 1)
    if n_clients > 1:
        engine.rewind(0, len(prompt) - 1)
        rows = engine.decode([Span(i, len(prompt) - 1, prompt[-1:]) for i in range(n_clients)])
    tokens = [int(i) for i in np.argmax(rows, axis=1)]
    first = time.perf_counter()
    for n in range(n_tokens - 1):
        rows = engine.decode([Span(i, len(prompt) + n, [token]) for i, token in enumerate(tokens)])
        tokens = [int(i) for i in np.argmax(rows, axis=1)]
    seconds = time.perf_counter() - first
    for i in range(n_clients):
        engine.rewind(i, 0)
    return n_clients * (n_tokens - 1) / seconds, first - start


async def one_client(port, body):
    """Times of the first and the last token, with the number of tokens; no library between the socket and the clock."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n"
    start = time.perf_counter()
    writer.write(head.encode() + b"\r\n" + body)
    first = last = 0.0
    n_tokens = 0
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            now = time.perf_counter()
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise SystemExit(chunk["error"]["message"])
            if any(choice["text"] for choice in chunk["choices"]):
                first, last = first or now, now
            n_tokens = (chunk.get("usage") or {}).get("completion_tokens", n_tokens)
        elif line.startswith(b"data: [DONE]"):
            break
    writer.close()
    return start, first, last, n_tokens


def clients(port, n_clients, n_tokens, extra):
    """Run in a process of its own: JSON of tokens per second and of each client's seconds to its first token."""
    body = {"prompt": TEXT, "max_tokens": n_tokens, "temperature": 0, "stream": True, **extra}
    data = json.dumps({**body, "stream_options": {"include_usage": True}}).encode()

    async def run():
        return await asyncio.gather(*(one_client(port, data) for _ in range(n_clients)))

    rows = asyncio.run(run())
    begun, ended = min(row[1] for row in rows), max(row[2] for row in rows)
    n = sum(row[3] - 1 for row in rows)
    print(json.dumps({"rate": n / (ended - begun), "first": [row[1] - row[0] for row in rows], "n": n + n_clients}))


@contextlib.contextmanager
def served(model, n_clients, n_tokens):
    """The port of a server over the model, which is free again afterwards."""
    limits = Limits(Recipe(combine("safe", [])), n_tokens, n_tokens, "safe", (), n_clients, model.engine.n_vocab)
    runner = Runner(model, n_clients, n_clients)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(runner, limits, Access(), 1.0)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def peer(program, path, n_clients, n_context, n_threads):
    """The port of llama.cpp's server over the model, with OpenMP's own settings, not ours."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [program, "-m", path, "--host", "127.0.0.1", "--port", port, "-c", n_context, "-np", n_clients]
    command += ["-t", n_threads] if n_threads else []
    words = list(map(str, command))
    own = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    with tempfile.TemporaryFile() as log, subprocess.Popen(words, stdout=log, stderr=log, env=own) as process:
        try:
            deadline = time.monotonic() + 120
            while True:
                try:
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                        break
                except OSError:
                    if process.poll() is not None or time.monotonic() > deadline:
                        log.seek(0)
                        raise SystemExit(log.read().decode("utf-8", "replace")[-2000:]) from None
                    time.sleep(0.2)
            yield port
        finally:
            process.terminate()


def ask(port, n_clients, n_tokens, **extra):
    words = ["--port", port, "--clients", n_clients, "--tokens", n_tokens, "--extra", json.dumps(extra)]
    command = [sys.executable, __file__, "-", *map(str, words)]
    reply = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert reply["n"] == n_clients * n_tokens, "a reply was shorter than asked for"
    return reply["rate"], statistics.median(reply["first"])


def measure(path, n_clients, n_tokens, n_runs, n_threads, program):
    n_context = (n_tokens + 64) * (n_clients + 1)
    options = EngineOptions(n_context, n_sequences=n_clients + 1, n_threads=n_threads)
    with contextlib.ExitStack() as stack:
        peer_port = stack.enter_context(peer(program, path, n_clients, n_context, n_threads)) if program else None
        model = stack.enter_context(Model.open(path, options))
        model.tokenizer = Endless(model.tokenizer)
        prompt = model.text_prompt(TEXT).tokens

        def ask_ours():
            with served(model, n_clients, n_tokens) as port:
                return ask(port, n_clients, n_tokens)

        cases = {"bare": lambda: bare(model.engine, prompt, n_clients, n_tokens), "served": ask_ours}
        if peer_port:
            cases["peer"] = lambda: ask(peer_port, n_clients, n_tokens, ignore_eos=True, cache_prompt=False)
        turns = Turns(cases, n_runs, ("rate", "first"))
    row = {"clients": n_clients}
    medians = turns.medians()
    for name in cases:
        row[f"{name}_tokens_per_second"] = round(medians[f"{name}, rate"], 1)
        row[f"{name}_first_token_ms"] = round(1000 * medians[f"{name}, first"], 1)
        if name != "bare":
            row[name] = turns.ratio(f"{name}, rate", "bare, rate")
    return row


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of llama.cpp, in both; the physical cores if not given")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--llama-server", type=Path, help="llama.cpp's server, built from the same source")
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--extra", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.port:
        clients(options.port, options.clients[0], options.tokens, options.extra)
        return
    rows = [
        measure(options.model, n, options.tokens, options.runs, options.threads, options.llama_server)
        for n in options.clients
    ]
    record = {**describe_run(options.model), "n_tokens": options.tokens, "n_runs": options.runs, "rows": rows}
    write(record, options.out)


if __name__ == "__main__":
    main()
