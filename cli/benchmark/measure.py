"""The measurement itself: what takes turns with what, and the numbers that come of it."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...runtime.engine import Engine
from ...runtime.errors import InputError
from ...runtime.tokenizer import Tokenizer
from .loops import ARMED, prompt_of, run_armed, run_bare, run_batch, run_prefill
from .machine import peak_bytes

METHOD = (
    "Greedy, ends of generation passed over, so that every run has the same number of tokens. The cases of a part "
    "take turns, after a warm-up of each; medians of the runs are given, and ratios are medians of the ratios within "
    "a turn, so that a machine that becomes slower does so for all. The bare loop is llama_decode with llama.cpp's "
    "greedy sampler over the same context. Prefill is of one prompt in pieces of the engine's batch. Peak memory is "
    "the most resident memory of the process, with the weights as far as they were read."
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured."""

    n_tokens: int = 64
    n_runs: int = 5
    lengths: tuple[int, ...] = (32, 128, 512)
    batches: tuple[int, ...] = (1, 2, 4, 8)

    @property
    def n_context(self) -> int:
        """Cells that hold every case."""
        batch = max(self.lengths[0], 32) + max(self.batches) * (self.n_tokens + 1)
        return max(batch, max(self.lengths) + 1 + self.n_tokens, 2 * (32 + self.n_tokens)) + 256


def measure(engine: Any, tokenizer: Any, sizes: Sizes, load_seconds: float) -> dict[str, Any]:
    """Speeds of a `LlamaEngine`. Raises InputError where the sizes do not fit its context."""
    _check(engine, sizes)
    prompt = prompt_of(tokenizer, min(32, sizes.lengths[0]))
    return {
        **_about(sizes, load_seconds),
        "prefill": _prefill(engine, tokenizer, sizes),
        "decode": _decode(engine, tokenizer, sizes, prompt),
        "context": _behind_context(engine, tokenizer, sizes),
        "controls": _controls(engine, tokenizer, sizes, prompt),
        "peak_bytes": peak_bytes(),
        "weights_bytes": engine.memory.weights_bytes,
        "cache_bytes": engine.memory.cache_bytes,
    }


def _about(sizes: Sizes, load_seconds: float) -> dict[str, Any]:
    return {
        "method": METHOD,
        "n_tokens": sizes.n_tokens,
        "n_runs": sizes.n_runs,
        "n_prompt": min(32, sizes.lengths[0]),
        "load_seconds": load_seconds,
    }


def measure_ring_alone(ring: Engine, tokenizer: Any, sizes: Sizes, load_seconds: float) -> dict[str, Any]:
    """Speeds of a model that no single machine here holds. Raises InputError as `measure` does."""
    _check(ring, sizes)
    return {**_about(sizes, load_seconds), **measure_ring(ring, None, tokenizer, sizes), "peak_bytes": peak_bytes()}


def measure_ring(ring: Engine, whole: Engine | None, tokenizer: Any, sizes: Sizes) -> dict[str, list[dict[str, Any]]]:
    """The ring, against the whole model where this machine holds it: with several sequences in flight, and prompts."""
    prompt = prompt_of(tokenizer, min(32, sizes.lengths[0]))
    engines = {"ring": ring} if whole is None else {"ring": ring, "whole": whole}

    def compare(speed: Callable[[Engine], float]) -> dict[str, float]:
        cases = {name: lambda engine=engine: speed(engine) for name, engine in engines.items()}
        found = take_turns(cases, sizes.n_runs)
        rows = {"tokens_per_second": statistics.median(found["ring"])}
        if whole is not None:
            rows["whole_tokens_per_second"] = statistics.median(found["whole"])
            rows["ratio"] = statistics.median(a / b for a, b in zip(found["ring"], found["whole"], strict=True))
        return rows

    def decode(n: int) -> Callable[[Engine], float]:
        return lambda engine: run_batch(engine, tokenizer, prompt, n, sizes.n_tokens).tokens_per_second

    def prefill(n: int) -> Callable[[Engine], float]:
        ids = prompt_of(tokenizer, n)
        # By the loop, which has several pieces of the prompt under way.
        return lambda engine: n / run_batch(engine, tokenizer, ids, 1, 1).first_seconds

    return {
        "ring": [{"sequences": n, **compare(decode(n))} for n in sizes.batches],
        "ring_prefill": [{"tokens": n, **compare(prefill(n))} for n in sizes.lengths],
    }


def take_turns(cases: Mapping[str, Callable[[], float]], n_runs: int) -> dict[str, list[float]]:
    """The results of each case, the cases in turns after a warm-up."""
    for case in cases.values():
        case()
    found: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(n_runs):
        for name, case in cases.items():
            found[name].append(case())
    return found


def _check(engine: Engine, sizes: Sizes) -> None:
    longest = max(sizes.lengths) + 1 + sizes.n_tokens
    if longest > engine.n_context_sequence:
        raise InputError(
            f"a case of {longest} tokens is above the {engine.n_context_sequence} that the model holds; "
            f"give smaller --lengths or --tokens"
        )
    if max(sizes.batches) > engine.n_sequences:
        raise InputError(f"{max(sizes.batches)} sequences are above the {engine.n_sequences} of the engine")


def _prefill(engine: Engine, tokenizer: Any, sizes: Sizes) -> list[dict[str, Any]]:
    prompts = {str(n): prompt_of(tokenizer, n) for n in sizes.lengths}
    found = take_turns({name: lambda ids=ids: run_prefill(engine, ids) for name, ids in prompts.items()}, sizes.n_runs)
    return [
        {
            "tokens": len(prompts[name]),
            "seconds": statistics.median(seconds),
            "tokens_per_second": statistics.median(len(prompts[name]) / each for each in seconds),
        }
        for name, seconds in found.items()
    ]


def _decode(engine: Engine, tokenizer: Tokenizer, sizes: Sizes, prompt: list[int]) -> list[dict[str, Any]]:
    return _to_first(
        "sequences",
        {
            n: lambda n=n: run_batch(engine, tokenizer, prompt, n, sizes.n_tokens).tokens_per_second
            for n in sizes.batches
        },
        sizes.n_runs,
    )


def _behind_context(engine: Engine, tokenizer: Tokenizer, sizes: Sizes) -> list[dict[str, Any]]:
    """What a longer context leaves of the speed of one sequence."""
    prompts = {n: prompt_of(tokenizer, n) for n in sizes.lengths}
    return _to_first(
        "context_tokens",
        {
            n: lambda ids=ids: run_batch(engine, tokenizer, ids, 1, sizes.n_tokens).tokens_per_second
            for n, ids in prompts.items()
        },
        sizes.n_runs,
    )


def _to_first(what: str, cases: Mapping[int, Callable[[], float]], n_runs: int) -> list[dict[str, Any]]:
    """The median speed of each case, and its ratio to the first one's."""
    found = take_turns({str(n): case for n, case in cases.items()}, n_runs)
    first = next(iter(found.values()))
    return [
        {
            what: int(name),
            "tokens_per_second": statistics.median(speeds),
            "ratio": statistics.median(a / b for a, b in zip(speeds, first, strict=True)),
        }
        for name, speeds in found.items()
    ]


def _controls(engine: Any, tokenizer: Tokenizer, sizes: Sizes, prompt: list[int]) -> list[dict[str, Any]]:
    probes: dict[str, int] = {}

    def armed(name: str, controls: Sequence[str]) -> float:
        timing = run_armed(engine, tokenizer, prompt, sizes.n_tokens, controls)
        probes[name] = timing.n_probe
        return timing.tokens_per_second

    cases: dict[str, Callable[[], float]] = {
        "bare loop": lambda: sizes.n_tokens / run_bare(engine, prompt, sizes.n_tokens)
    }
    for name, controls in ARMED.items():
        cases[name] = lambda name=name, controls=controls: armed(name, controls)
    found = take_turns(cases, sizes.n_runs)
    bare = found["bare loop"]
    return [
        {
            "armed": name,
            "tokens_per_second": statistics.median(speeds),
            "ratio": statistics.median(a / b for a, b in zip(speeds, bare, strict=True)),
            "ratio_per_run": [a / b for a, b in zip(speeds, bare, strict=True)],
            "probe_tokens": probes.get(name, 0),
        }
        for name, speeds in found.items()
    ]
