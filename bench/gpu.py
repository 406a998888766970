"""What a GPU changes: speed, and the logits of a whole model and of layer windows beside those of the CPU.

    python bench/gpu.py MODEL.gguf --cut 14 [--tokens 128] [--steps 16] [--out FILE.json]

A text is evaluated in batches, then token by token: with all layers on the CPU, with all on the GPU, with half of them
there, and in two windows cut before layer `--cut`, both on the GPU, the first, or the second. One context is open at a
time. Divergences are of the next-token distributions, in nats; `far` is the largest difference of logits, over the
largest of them. The last line is JSON.
"""

import argparse
import contextlib
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
from record import describe_run
from ring import N_CONTEXT, TEXT
from ring_tools import compare

from localreason.cluster.window import LayerWindow, WindowOptions
from localreason.quant.gguf import ModelFile, padded
from localreason.runtime.devices import gpu_memory
from localreason.runtime.engine import Span
from localreason.runtime.llama import EngineOptions, load, load_tokenizer, physical_cores

N_BATCH, ALL = 64, 999


class Bench:
    def __init__(self, options, folder):
        self.options, self.folder = options, folder
        options.threads = options.threads or physical_cores()
        self.file = ModelFile(options.model)
        ids = load_tokenizer(options.model).encode(TEXT * 40)[: options.tokens + options.steps]
        ends = [*range(0, options.tokens, N_BATCH), *range(options.tokens, len(ids) + 1)]
        self.spans = [Span(0, a, ids[a:b], b - a) for a, b in pairwise(ends)]

    def run(self, step, inputs):
        """What `step` makes of each batch, and tokens a second of the batches and of the single tokens."""
        n_pieces = len(self.spans) - self.options.steps
        out, times = [], [time.perf_counter()]
        for span, rows in zip(self.spans, inputs, strict=True):
            out.append(np.array(step(span, rows)))
            times.append(time.perf_counter())
        speeds = self.options.tokens / (times[n_pieces] - times[0]), self.options.steps / (times[-1] - times[n_pieces])
        return out, speeds

    def whole(self, n_gpu_layers):
        chosen = EngineOptions(N_CONTEXT, 1, self.options.threads, n_gpu_layers, "f16", N_BATCH)
        with contextlib.closing(load(self.options.model, chosen)[0]) as engine:
            engine.decode([Span(0, 0, [0], 1)])  # a warm-up
            engine.rewind(0, 0)
            return self.run(lambda span, _: engine.decode([span]), self.spans)

    def windows(self, *n_gpu_layers):
        rows, seconds = [self.file.embed(span.tokens) for span in self.spans], np.zeros(2)
        bounds = (0, self.options.cut, self.file.n_layers)
        for i, n in enumerate(n_gpu_layers):
            part = self.file.window(bounds[i], bounds[i + 1], i == 1)
            path = self.folder / f"{i}.gguf"
            with path.open("wb") as target:
                target.write(part.header)
                for piece in part.parts:
                    data = piece.data + b"".join(self.file.read(piece))
                    target.write(data.ljust(padded(len(data)), b"\0"))
            chosen = WindowOptions(N_CONTEXT, 1, N_BATCH)
            with contextlib.closing(LayerWindow(path, chosen, self.options.threads, n, i == 1)) as window:
                window.warm()
                rows, speeds = self.run(lambda span, given, window=window: window.run([span], given), rows)
                seconds += 1 / np.array(speeds)
        return rows, tuple(1 / seconds)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--cut", type=int, required=True, help="layers of the first window")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    gpu = gpu_memory()
    if gpu is None:
        parser.error("llama.cpp sees no GPU here; build llama-cpp-python for one")
    record = {**describe_run(options.model), "gpu": gpu.names, "gpu_free_bytes": gpu.free_bytes, "cut": options.cut}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, Path(folder))
        cases = {
            "whole, on the CPU": lambda: bench.whole(0),
            "whole, on the GPU": lambda: bench.whole(ALL),
            "whole, half on the GPU": lambda: bench.whole(bench.file.n_layers // 2),
            "windows, on the GPU": lambda: bench.windows(ALL, ALL),
            "windows, the first on the GPU": lambda: bench.windows(ALL, 0),
            "windows, the second on the GPU": lambda: bench.windows(0, ALL),
            "windows, on the CPU": lambda: bench.windows(0, 0),
        }
        found = {}
        for name, case in cases.items():
            rows, (prompt, decode) = case()
            found[name] = np.concatenate(rows)
            record[name] = {"prompt_tokens_per_second": prompt, "tokens_per_second": decode}
            for other in ("whole, on the CPU", "whole, on the GPU"):
                if other in found:
                    record[name][f"to {other}"] = compare(found[name], found[other])
            print(f"{name}: {json.dumps(record[name])}", flush=True)
            if options.out:
                options.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
