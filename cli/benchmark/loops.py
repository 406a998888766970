"""The loops whose speed is measured: the project's own, and a bare one of llama.cpp over the same context."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...runtime.controls import CONTROLS, Setup, combine
from ...runtime.controls.search import FirstFinishSearch
from ...runtime.decode import Request, decode
from ...runtime.engine import Engine, Row, Span
from ...runtime.events import Token
from ...runtime.formats import FORMATS
from ...runtime.native import library
from ...runtime.phase import PhaseTracker
from ...runtime.sequence import Sequence as Tokens
from ...runtime.tokenizer import Tokenizer

TEXT = "Think about this step by step: a farmer has 17 sheep, buys 5 more and sells a third of all of them. "
_NEVER = 100_000
"""A limit that no run reaches, so that a control is armed and never acts."""
ARMED: Mapping[str, tuple[str, ...]] = {
    "no control": (),
    "budget": (f"budget:max={_NEVER}",),
    "hint": (f"hint:alpha={_NEVER}",),
    "suppress": ("suppress:task=none",),
    "search": ("search:n=1",),
    "all three": (f"budget:max={_NEVER}", f"hint:alpha={_NEVER}", "suppress:task=none"),
    "all three, with probes": (f"budget:max={_NEVER}", f"hint:alpha={_NEVER}", "suppress:task=math"),
}
"""What is armed while thinking is open. A probe is the work of another sequence, so its cost is apart."""


class Endless:
    """A tokenizer without ends of generation, so that every run has the same number of tokens."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.n_vocab = tokenizer.n_vocab
        self.encode, self.piece = tokenizer.encode, tokenizer.piece

    def is_end(self, token: int) -> bool:
        return False


@dataclass(frozen=True, slots=True)
class Timing:
    """Of one run: seconds until every sequence had its first token, then tokens a second of all together."""

    first_seconds: float
    tokens_per_second: float
    n_probe: int = 0


def prompt_of(tokenizer: Any, n_tokens: int) -> list[int]:
    """A text of that many tokens, BOS first where the model wants one."""
    ids = [*tokenizer.prefix, *tokenizer.encode(TEXT)]
    while len(ids) < n_tokens:
        ids += tokenizer.encode(TEXT)
    return ids[:n_tokens]


def run_bare(engine: Any, prompt: list[int], n_tokens: int) -> float:
    """Seconds of `n_tokens` steps of llama_decode and llama.cpp's greedy sampler behind the prompt, one at a time; of
    a `LlamaEngine`, or anything else with its `context`."""
    llama = library()
    context = engine.context
    memory = llama.llama_get_memory(context)
    llama.llama_memory_seq_rm(memory, 0, -1, -1)
    sampler = llama.llama_sampler_init_greedy()
    ids = (llama.llama_token * len(prompt))(*prompt)
    assert llama.llama_decode(context, llama.llama_batch_get_one(ids, len(prompt))) == 0
    one = (llama.llama_token * 1)()
    start = time.perf_counter()
    for _ in range(n_tokens):
        one[0] = llama.llama_sampler_sample(sampler, context, -1)
        assert llama.llama_decode(context, llama.llama_batch_get_one(one, 1)) == 0
    seconds = time.perf_counter() - start
    llama.llama_sampler_free(sampler)
    llama.llama_memory_seq_rm(memory, 0, -1, -1)
    return seconds


def run_armed(
    engine: Engine, tokenizer: Tokenizer, prompt: list[int], n_tokens: int, controls: Sequence[str]
) -> Timing:
    """The decode loop with controls armed and thinking open, greedy, over the same steps as `run_bare`."""
    chosen = combine(None, controls, insist=True)
    setup = Setup(tokenizer, FORMATS["think"])
    sequence = Tokens(list(prompt), limit=n_tokens + 1)
    armed = [CONTROLS[parameters.control](parameters, setup) for parameters in chosen]
    for control in armed:
        if isinstance(control, FirstFinishSearch):
            control.join(sequence)
    request = Request(sequence, PhaseTracker(FORMATS["think"], "<think>\n"), _greedy, armed)
    begun = time.perf_counter()
    started = 0.0
    for event in decode(engine, Endless(tokenizer), [request]):
        if not started and isinstance(event, Token):
            started = time.perf_counter()  # the first token comes out of the prefill
    ended = time.perf_counter()
    return Timing(started - begun, n_tokens / max(1e-9, ended - started), sequence.counts.probe)


def run_batch(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt: list[int],
    n_sequences: int,
    n_tokens: int,
    sample: Callable[[Row], int] | None = None,
) -> Timing:
    """The decode loop with this many sequences over one prompt and no control."""

    def requests() -> Any:
        for i in range(n_sequences):
            sequence = Tokens(list(prompt), id=str(i), limit=n_tokens)
            yield Request(sequence, PhaseTracker(FORMATS["none"], ""), sample or _greedy, [])

    started, first, n = time.perf_counter(), dict[str, float](), 0
    for event in decode(engine, Endless(tokenizer), requests()):
        if isinstance(event, Token) and not event.is_continued:
            first.setdefault(event.sequence.id, time.perf_counter())
            n += len(first) == n_sequences
    ended = time.perf_counter()
    begun = max(first.values())
    return Timing(begun - started, (n - 1) / max(1e-9, ended - begun))


def run_prefill(engine: Engine, prompt: list[int]) -> float:
    """Seconds until the logits behind a prompt are there, in pieces of the engine's batch."""
    engine.rewind(0, 0)
    start = time.perf_counter()
    for position in range(0, len(prompt), engine.n_batch):
        piece = prompt[position : position + engine.n_batch]
        is_last = position + len(piece) == len(prompt)
        engine.submit([Span(0, position, piece, int(is_last))])
        engine.collect()
    seconds = time.perf_counter() - start
    engine.rewind(0, 0)
    return seconds


def _greedy(row: Row) -> int:
    return int(np.argmax(row))
