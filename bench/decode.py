"""Speed of the full decode loop with all controls armed against a bare loop of llama_decode and a greedy sampler.

    python bench/decode.py MODEL.gguf [--tokens 128] [--runs 7] [--out bench/results/decode-NAME.json]

Both loops run in one process over one context, interleaved, the stop tokens banned by going on regardless; what counts
is the ratio of the medians. The last line is JSON. Peak memory is measured in a process of its own for each loop.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from record import describe_run

from localreason.runtime.controls import CONTROLS, Setup, combine
from localreason.runtime.decode import Request, decode
from localreason.runtime.formats import FORMATS
from localreason.runtime.llama import EngineOptions, load
from localreason.runtime.native import library
from localreason.runtime.phase import PhaseTracker
from localreason.runtime.sequence import Sequence

llama_cpp = library()
TEXT = "Think about this step by step: a farmer has 17 sheep, buys 5 more and sells a third of all of them. "


class Endless:
    """A tokenizer without ends of generation, so that every run has the same number of tokens."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.n_vocab = tokenizer.n_vocab
        self.encode, self.piece = tokenizer.encode, tokenizer.piece

    def is_end(self, token):
        return False


def bare(engine, prompt, n_tokens):
    """llama_decode and llama.cpp's greedy sampler, one token at a time; seconds of the decode steps only."""
    context = engine.context
    memory = llama_cpp.llama_get_memory(context)
    llama_cpp.llama_memory_seq_rm(memory, 0, -1, -1)
    sampler = llama_cpp.llama_sampler_init_greedy()
    ids = (llama_cpp.llama_token * len(prompt))(*prompt)
    assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(ids, len(prompt))) == 0
    one = (llama_cpp.llama_token * 1)()
    start = time.perf_counter()
    for _ in range(n_tokens):
        one[0] = llama_cpp.llama_sampler_sample(sampler, context, -1)
        assert llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(one, 1)) == 0
    seconds = time.perf_counter() - start
    llama_cpp.llama_sampler_free(sampler)
    llama_cpp.llama_memory_seq_rm(memory, 0, -1, -1)
    return seconds


def full(engine, tokenizer, prompt, n_tokens, task="none"):
    """The project's loop with budget, hint and suppression armed and thinking open; seconds of the same steps.

    With the task "none" no probe is started: a probe is the work of another sequence, not overhead of the loop.
    """
    format = FORMATS["think"]
    chosen = combine(None, ["budget:max=100000", "hint:alpha=100000", f"suppress:task={task}"], insist=True)
    setup = Setup(tokenizer, format, max_thinking=100000)
    controls = [CONTROLS[p.control](p, setup) for p in chosen]
    sequence = Sequence(list(prompt), limit=n_tokens + 1)
    request = Request(sequence, PhaseTracker(format, "<think>\n"), lambda row: int(row.argmax()), controls)
    start = 0.0
    n_probe = 0
    for event in decode(engine, tokenizer, [request]):
        if not start:
            start = time.perf_counter()  # the first token comes out of the prefill
        n_probe = sequence.counts.probe
        del event
    return time.perf_counter() - start, n_probe


def measure(path, n_tokens, n_runs):
    engine, tokenizer = load(path, EngineOptions(n_context=4096, n_sequences=4))
    endless = Endless(tokenizer)
    prompt = tokenizer.prefix + tokenizer.encode(TEXT)
    bare(engine, prompt, 16)
    full(engine, endless, prompt, 16)
    runs = [
        (
            bare(engine, prompt, n_tokens),
            full(engine, endless, prompt, n_tokens)[0],
            *full(engine, endless, prompt, n_tokens, "math"),
        )
        for _ in range(n_runs)
    ]
    engine.close()
    bare_seconds, full_seconds, probed_seconds, _ = (statistics.median(values) for values in zip(*runs, strict=True))
    return {
        "bare_tokens_per_second": round(n_tokens / bare_seconds, 1),
        "full_tokens_per_second": round(n_tokens / full_seconds, 1),
        "ratio": round(bare_seconds / full_seconds, 4),
        "ratio_per_run": [round(run[0] / run[1], 4) for run in runs],
        "ratio_with_probes": round(bare_seconds / probed_seconds, 4),
        "probe_tokens": runs[-1][3],
    }


def peak(path, n_tokens, which):
    """Peak resident bytes of a process that runs one of the loops only."""
    if which == "full":
        measure_full = load(path, EngineOptions(n_context=4096, n_sequences=4))
        full(measure_full[0], Endless(measure_full[1]), measure_full[1].encode(TEXT), n_tokens)
    else:
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = 4096, 4, True
        params.n_batch = params.n_ubatch = 128
        context = llama_cpp.llama_init_from_model(model, params)

        class Bare:
            pass

        engine = Bare()
        engine.context = context
        bare(engine, list(range(100, 124)), n_tokens)
    # Not ru_maxrss: on Linux that survives exec and would be the parent's.
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--peak", choices=["bare", "full"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.model, options.tokens, options.peak))
        return
    result = measure(options.model, options.tokens, options.runs)
    for which in ("bare", "full"):
        command = [sys.executable, __file__, str(options.model), "--tokens", str(options.tokens), "--peak", which]
        result[f"{which}_peak_bytes"] = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    result["peak_ratio"] = round(result["full_peak_bytes"] / result["bare_peak_bytes"], 4)
    record = {**describe_run(options.model), "n_tokens": options.tokens, "n_runs": options.runs, **result}
    if options.out:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
