"""Seconds to plan a model of 128 layers for 16 machines.

    python bench/plans.py [--homes 5] [--out FILE.json]

Homes are drawn at random, with links that differ and layers of different sizes, with GPUs in none, half and all of the
machines, with memory for the whole model, and with less and the disk allowed. Each is planned for a token, for one in a
ring that guesses 0.3 of them right, for tokens of a full ring, of 4, 16 and 64 samples, and for a prompt in pieces of
64, with as many rounds as are best; the least of three times counts, the median and the largest of all homes are given.
The last line is JSON.
"""

import argparse
import json
import random
import statistics
import time
from itertools import product
from pathlib import Path

from record import describe_command, write

from localreason.cluster.costs import Links, ModelCosts
from localreason.cluster.device import Device
from localreason.cluster.plan import plan

N_LAYERS, N_MACHINES = 128, 16
WISHES = {
    "a token": ("latency", None, 0.0),
    "a token, guessed": ("latency", None, 0.3),
    "a full ring": ("throughput", None, 0.0),
    "4 samples": ("throughput", 4, 0.0),
    "16 samples": ("throughput", 16, 0.0),
    "64 samples": ("throughput", 64, 0.0),
    "a prompt": ("prefill", None, 0.0),
}


def home(draw, n_gpus, is_short):
    """A model of 70 GB, machines with a fifth of it each, or together four fifths, and links."""
    layers = tuple(int(5e8 * draw.uniform(0.9, 1.1)) for _ in range(N_LAYERS))
    costs = ModelCosts(layers, ("Q4_K",) * N_LAYERS, 4096, 8192, 10**9, "Q6_K", 8192, 400 << 20)

    def machine(i):
        speed = 10 ** draw.uniform(9.9, 10.7)
        return Device(
            name=f"d{i}",
            memory_bytes=int((3.5e9 if is_short else 14e9) * draw.uniform(0.8, 1.2)),
            weight_speeds={"Q4_K": speed, "Q6_K": 0.9 * speed},
            prefill_speeds={"Q4_K": 3 * speed, "Q6_K": 3 * speed},
            memory_bandwidth=1.3 * speed,
            disk_sequential=draw.uniform(5e8, 3e9),
            gpu_memory_bytes=int(4e9 * draw.uniform(0.5, 3)) * (i < n_gpus),
            gpu_speed=speed * draw.uniform(4, 10) * (i < n_gpus),
        )

    machines = [machine(i) for i in range(N_MACHINES)]
    pairs = {
        (f"d{i}", f"d{j}"): (draw.uniform(2e-4, 8e-3), draw.uniform(1e7, 1.2e8)) for i in range(16) for j in range(i)
    }
    return costs, machines, Links(pairs)


def seconds(costs, machines, links, objective, n_samples, guessed, is_short):
    """The least of three times."""
    found = []
    for _ in range(3):
        started = time.perf_counter()
        plan(costs, machines, links, objective, n_samples, is_disk_allowed=is_short, n_batch=64, guessed=guessed)
        found.append(time.perf_counter() - started)
    return min(found)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--homes", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    for n_gpus, is_short, (wish, how) in product((0, 8, 16), (False, True), WISHES.items()):
        draw = random.Random(1)
        homes = [home(draw, n_gpus, is_short) for _ in range(options.homes)]
        taken = [seconds(*one, *how, is_short) for one in homes]
        row = {"gpus": n_gpus, "disk": is_short, "for": wish, "median": statistics.median(taken), "most": max(taken)}
        rows.append(row)
        print(json.dumps(row), flush=True)
    write({**describe_command(), "homes": options.homes, "rows": rows}, options.out)


if __name__ == "__main__":
    main()
