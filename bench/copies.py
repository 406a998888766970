"""Whole copies of a model on several machines, beside the ring that the plan makes of them, by the plan's own costs.

    python bench/copies.py [--homes 100] [--out FILE.json]

Homes of two to four machines are drawn at random, with and without GPUs. Each sample lives in one copy; the head
samples for all, since no token leaves it, so another machine runs all layers but the last, which the head runs with the
output matrix. Every way to share out the samples is tried, and the best counts. Prompts are not counted; a copy has to
evaluate each anew. Given is how many times as fast as the ring the copies are: the median and the largest, and the
share of homes where they are more than 1.05 times. The last line is JSON.
"""

import argparse
import itertools
import json
import random
import statistics
from pathlib import Path

import numpy as np
from record import describe_command, write

from localreason.cluster.costs import Links, ModelCosts, Step, has_gpu, rates
from localreason.cluster.device import Device
from localreason.cluster.plan import plan

SIZES = {"0.1B": (30, 0.1e9, 576, 49152), "1.5B": (28, 1.1e9, 1536, 151936), "14B": (48, 9e9, 5120, 152064)}
"""Layers, bytes, width and vocabulary."""


def model(n_layers, n_bytes, n_embd, n_vocab):
    output = int(0.82 * n_vocab * n_embd)
    layers = (int((n_bytes - output) / n_layers),) * n_layers
    return ModelCosts(layers, ("Q4_K",) * n_layers, 2048, 8192, output, "Q6_K", n_embd, 200 << 20, 1024)


def machine(draw, name, may_have_gpu):
    """Everything fits into its memory, of the GPU too."""
    speed, prefill = 10 ** draw.uniform(9.9, 10.7), draw.uniform(1.3, 5)
    is_with_gpu = may_have_gpu and draw.random() < 0.7
    return Device(
        name=name,
        memory_bytes=64 << 30,
        weight_speeds={"Q4_K": speed, "Q6_K": 0.9 * speed},
        prefill_speeds={"Q4_K": prefill * speed, "Q6_K": prefill * speed},
        memory_bandwidth=1.3 * speed,
        gpu_memory_bytes=(24 << 30) * is_with_gpu,
        gpu_speed=speed * draw.uniform(4, 10) * is_with_gpu,
    )


def step(costs, device, n_rows):
    """Seconds of a step of all layers, of the last one and of the output matrix."""
    found, is_there = rates(costs, device, Step(n_rows)), has_gpu(device)
    layers = found.gpu if is_there else found.cpu
    return float(layers.sum()), float(layers[-1]), found.output_gpu if is_there else found.output_cpu


def copies_seconds(costs, devices, links, n_samples):
    """Seconds between tokens of all samples together, at best."""
    head, *workers = devices

    def seconds(n_own, *shares):
        all, _, output = step(costs, head, n_own) if n_own else (0.0, 0.0, 0.0)
        busy, slowest = all + output, 0.0
        for worker, n in zip(workers, shares, strict=True):
            if n:
                (there, kept, _), (_, last, output) = step(costs, worker, n), step(costs, head, n)
                hop = 2 * links.seconds(head.name, worker.name, costs.n_embd * costs.value_bytes * n)
                busy += last + output
                slowest = max(slowest, there - kept + hop + last + output)
        return max(busy, slowest) / n_samples

    ways = itertools.product(range(n_samples + 1), repeat=len(devices))
    return min(seconds(*shares) for shares in ways if sum(shares) == n_samples)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--homes", type=int, default=100)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    draw, rows = random.Random(1), []
    cases = itertools.product(SIZES, (False, True), (0.3, 3.0, 10.0), (2, 4, 8))
    for size, may_have_gpu, milliseconds, n_samples in cases:
        costs, ratios = model(*SIZES[size]), []
        links = Links({}, (milliseconds / 1000, 110e6 if milliseconds < 1 else 30e6))
        for _ in range(options.homes):
            devices = [machine(draw, f"d{i}", may_have_gpu) for i in range(draw.choice([2, 3, 4]))]
            ring = plan(costs, devices, links, "throughput", n_samples).throughput_seconds
            ratios.append(ring / copies_seconds(costs, devices, links, n_samples))
        rows.append(
            {
                "model": size,
                "gpus": may_have_gpu,
                "link_ms": milliseconds,
                "samples": n_samples,
                "median": statistics.median(ratios),
                "most": max(ratios),
                "faster": float(np.mean(np.array(ratios) > 1.05)),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    write({**describe_command(), "homes": options.homes, "rows": rows}, options.out)


if __name__ == "__main__":
    main()
