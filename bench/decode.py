"""Speed of the full decode loop with all controls armed against a bare loop of llama_decode and a greedy sampler.

    python bench/decode.py MODEL.gguf [--tokens 128] [--runs 7] [--out bench/results/decode-NAME.json]

Both loops run in one process over one context, in turns, the stop tokens passed over; what counts is the median of the
ratios within a turn. The last line is JSON. Peak memory is measured in a process of its own for each loop.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from record import describe_run, write

from localreason.cli.benchmark.loops import ARMED, TEXT, prompt_of, run_armed, run_bare
from localreason.cli.benchmark.machine import peak_bytes
from localreason.cli.benchmark.measure import take_turns
from localreason.runtime.llama import EngineOptions, load
from localreason.runtime.native import library

llama_cpp = library()
N_PROMPT = 24


def measure(path, n_tokens, n_runs):
    engine, tokenizer = load(path, EngineOptions(n_context=4096, n_sequences=4))
    prompt = prompt_of(tokenizer, N_PROMPT)

    def full(name):
        return run_armed(engine, tokenizer, prompt, n_tokens, ARMED[name])

    cases = {
        "bare": lambda: n_tokens / run_bare(engine, prompt, n_tokens),
        "full": lambda: full("all three").tokens_per_second,
        "probed": lambda: full("all three, with probes").tokens_per_second,
    }
    found = take_turns(cases, n_runs)
    n_probe = full("all three, with probes").n_probe
    engine.close()
    ratios = {name: [a / b for a, b in zip(speeds, found["bare"], strict=True)] for name, speeds in found.items()}
    return {
        "bare_tokens_per_second": round(statistics.median(found["bare"]), 1),
        "full_tokens_per_second": round(statistics.median(found["full"]), 1),
        "ratio": round(statistics.median(ratios["full"]), 4),
        "ratio_per_run": [round(ratio, 4) for ratio in ratios["full"]],
        "ratio_with_probes": round(statistics.median(ratios["probed"]), 4),
        "probe_tokens": n_probe,
    }


def peak(path, n_tokens, which):
    """Peak resident bytes of a process that runs one of the loops only."""
    if which == "full":
        engine, tokenizer = load(path, EngineOptions(n_context=4096, n_sequences=4))
        run_armed(engine, tokenizer, tokenizer.encode(TEXT), n_tokens, ARMED["all three"])
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
        run_bare(engine, list(range(100, 124)), n_tokens)
    return peak_bytes()


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
    write(record, options.out)


if __name__ == "__main__":
    main()
