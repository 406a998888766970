"""The ring against one machine: each node a process with one thread and a core, all on this machine, over mutual TLS.

    python bench/ring.py MODEL.gguf --split 16,12 [--repeats 5] [--tokens 64] [--only decode,prefill]

`--split` are the layers of the node and of the head, balanced for throughput: the output matrix counts too. The cases
of a comparison take turns `--repeats` times, forth and back; ratios are of one turn, and their medians and quartiles
are given, for the machine is shared. Two independent processes take their turns too: what they gain over one is what
this machine allows a ring of two. The last line is JSON.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from record import describe_run
from ring_tools import awake_cores, compare, hold_back, on_core, stay_on_core
from turns import Turns

from localreason.cli.benchmark.loops import Endless, run_batch
from localreason.cluster.formation import HEAD, Assignment, Placement
from localreason.cluster.gate import TlsGate
from localreason.cluster.identity import Identity, Peers
from localreason.cluster.member import Address
from localreason.cluster.ring import RingEngine, RingOptions
from localreason.cluster.store import Store
from localreason.quant.gguf import ModelFile
from localreason.runtime.decode import Request, decode
from localreason.runtime.engine import Span
from localreason.runtime.events import Token
from localreason.runtime.formats import FORMATS
from localreason.runtime.llama import EngineOptions, load, load_tokenizer
from localreason.runtime.phase import PhaseTracker
from localreason.runtime.sequence import Sequence

TEXT = (
    "A baker makes 12 trays of 18 rolls each morning. She sells three quarters of them by noon at 40 cents each and "
    "the rest in the afternoon at half the price. Work out step by step how much money she takes in on one day. "
)
N_CONTEXT = 2048


class Home:
    """Nodes and a head in a temporary folder, each with one core; this process, the head, has the first from now on.

    `cores` has that of each node, taken again from the first where there are fewer."""

    def __init__(self, folder, cores, model):
        stay_on_core(0)
        self.folder, self.model, self.file = folder, model, ModelFile(model)
        self.cores = {f"n{i}": core for i, core in enumerate(cores)}
        self.head = Identity.load(folder / "head", "head")
        self.gate = TlsGate(self.head, Peers(folder / "head"))
        self.nodes = {}
        for name in self.cores:
            self.start(name)

    def start(self, name):
        node = Identity.load(self.folder / name, name)
        Peers(self.folder / name).add(self.head.certificate)
        Peers(self.folder / "head").add(node.certificate)
        command = [
            sys.executable,
            "-c",
            "from localreason.cli.main import run; run()",
            "node",
            "--loopback",
            "--port",
            "0",
        ]
        command += ["--threads", "1", "--name", name, "--folder", str(self.folder / name)]
        command += ["--cache", str(self.folder / f"{name}-cache")]
        log = (self.folder / f"{name}.log").open("w")
        with on_core(self.cores[name]):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        port = int(re.search(r"\d+", process.stdout.readline())[0])
        self.nodes[name] = (process, Address(name, "127.0.0.1", port, node.certificate.decode()))

    def ring(self, windows, n_sequences=4, addresses=None, place=None, n_spread=0, **options):
        """An engine over `windows`, [(name, layers), ...] with the head last, its sequences over `n_spread` batches.

        It guesses nothing: what is measured is a ring that waits for each token."""
        bounds = np.cumsum([0, *(n for _, n in windows)]).tolist()
        places = tuple(Assignment(name, *bounds[i : i + 2]) for i, (name, _) in enumerate(windows))
        placement = Placement(places, n_spread=n_spread)
        names = {name for name, _ in windows}
        addresses = addresses or [address for name, (_, address) in self.nodes.items() if name in names]
        store = Store(self.folder / "head-cache", 1 << 40, [self.model])
        chosen = RingOptions(N_CONTEXT, n_sequences, **{"is_guessing": False, **options})
        tell = lambda text: print(f"# {text}", file=sys.stderr)  # noqa: E731
        return RingEngine(self.file, addresses, self.gate, store, place or (lambda _: placement), chosen, tell)

    def close(self):
        for process, _ in self.nodes.values():
            process.send_signal(signal.SIGCONT)
            process.kill()


class Bench:
    def __init__(self, options):
        self.options = options
        self.tokenizer = load_tokenizer(options.model)
        ids = self.tokenizer.encode(TEXT * 40)
        self.short, self.long = ids[:32], ids[:512]
        self.node_layers, self.head_layers = map(int, options.split.split(","))
        self.n_layers = self.node_layers + self.head_layers

    def balanced(self):
        return [("n0", self.node_layers), (HEAD, self.head_layers)]

    def spread(self, names):
        """Equal shares for nodes and the head, the head's smaller by what its output matrix takes."""
        share = self.n_layers - self.head_layers
        per_node = max(1, round(self.n_layers / (len(names) + self.head_layers / share)))
        windows = [(name, per_node) for name in names]
        return [*windows, (HEAD, self.n_layers - per_node * len(names))]

    def whole(self, n_sequences=4):
        return load(self.options.model, EngineOptions(N_CONTEXT, n_sequences, 1, n_gpu_layers=0))[0]

    def speed(self, engine, n_sequences):
        """A case: tokens a second of all sequences together."""
        return lambda: run_batch(engine, self.tokenizer, self.short, n_sequences, self.options.tokens).tokens_per_second

    def prompt_speed(self, engine, n_tokens=512):
        """Tokens a second of a prompt."""
        return n_tokens / run_batch(engine, self.tokenizer, self.long[:n_tokens], 1, 1).first_seconds

    def in_turns(self, openings, sequences, pairs=()):
        """The speed of each ring with each number of sequences in flight, and the ratios of `pairs`, or of all to the
        first with one. A node serves one ring at a time, so they are opened and closed in turns."""

        def speeds(opening):
            with opening() as ring:
                self.speed(ring, 1)()  # a warm-up
                return [self.speed(ring, n)() for n in sequences]

        turns = Turns(
            {name: lambda opening=opening: speeds(opening) for name, opening in openings.items()},
            self.options.repeats,
            sequences,
        )
        names = list(turns.medians())
        ratios = turns.ratios(pairs or [(name, names[0]) for name in names[1:]])
        return {"tokens_per_second": turns.medians(), "ratios": ratios}

    def decode(self, home):
        with (
            contextlib.closing(self.whole()) as whole,
            home.ring(self.balanced(), n_threads=1) as ring,
            self.processes("decode") as processes,
        ):
            engines = {"whole": whole, "ring": ring}
            cases = ("whole, 1", "ring, 1", "ring, 2", "ring, 4", "whole, 4")
            speeds = {case: self.speed(engines[case[:-3]], int(case[-1])) for case in cases}
            turns = Turns({**speeds, **processes}, self.options.repeats)
        pairs = (
            ("ring, 1", "whole, 1"),
            ("ring, 2", "ring, 1"),
            ("ring, 4", "ring, 1"),
            ("ring, 4", "whole, 4"),
            ("processes, 2", "processes, 1"),
        )
        return {"tokens_per_second": turns.medians(), "ratios": turns.ratios(pairs)}

    def awake(self, home):
        """The same beside processes of the idle class, one a core, which get only the time that nobody else wants: a
        core that sleeps between two steps may wake up late."""

        def beside(speed):
            with awake_cores():
                return speed()

        with contextlib.closing(self.whole()) as whole, home.ring(self.balanced(), n_threads=1) as ring:
            alone = {"whole, 1": self.speed(whole, 1), "ring, 1": self.speed(ring, 1), "ring, 2": self.speed(ring, 2)}
            awake = {f"awake: {name}": lambda speed=speed: beside(speed) for name, speed in alone.items()}
            turns = Turns({**alone, **awake}, self.options.repeats)
        pairs = [(f"{state}{a}", f"{state}{b}") for state in ("", "awake: ") for a, b in pairwise(reversed(alone))]
        return {"tokens_per_second": turns.medians(), "ratios": turns.ratios(pairs)}

    @contextlib.contextmanager
    def processes(self, what):
        """Cases: the work of one independent process with a model of its own, and of two at once."""
        context = multiprocessing.get_context("spawn")
        pipes, processes = [], []
        for core in range(2):
            here, there = context.Pipe()
            process = context.Process(target=_independent, args=(self.options, what, there), daemon=True)
            with on_core(core):
                process.start()
            pipes.append(here)
            processes.append(process)

        def speed(n):
            for pipe in pipes[:n]:
                pipe.send(True)
            return sum(pipe.recv() for pipe in pipes[:n])

        try:
            yield {"processes, 1": lambda: speed(1), "processes, 2": lambda: speed(2)}
        finally:
            for process in processes:
                process.terminate()

    def prefill(self, home):
        # Of a prompt only the last token meets the output matrix, so here equal windows are balanced.
        share = self.n_layers // 2

        def ring_speed(k):
            with home.ring(_in_rounds(k, self.n_layers - share, share), 1, n_threads=1) as ring:
                self.speed(ring, 1)()  # a warm-up
                return self.prompt_speed(ring)

        rings = {f"ring, {k} rounds": lambda k=k: ring_speed(k) for k in (1, 2)}
        with contextlib.closing(self.whole(1)) as whole, self.processes("prefill") as processes:
            cases = {"whole": lambda: self.prompt_speed(whole), **rings, **processes}
            turns = Turns(cases, self.options.repeats)
        pairs = (*((name, "whole") for name in rings), ("processes, 2", "processes, 1"))
        return {"tokens_per_second": turns.medians(), "ratios": turns.ratios(pairs)}

    def prompts(self, home):
        """Short prompts, over the windows that are balanced for throughput."""
        with contextlib.closing(self.whole(1)) as whole, home.ring(self.balanced(), 1, n_threads=1) as ring:
            engines, lengths = {"whole": whole, "ring": ring}, (32, 64, 128, 256)
            cases = {
                f"{name}, {n} tokens": lambda engine=engine, n=n: self.prompt_speed(engine, n)
                for n in lengths
                for name, engine in engines.items()
            }
            turns = Turns(cases, self.options.repeats)
        pairs = [(f"ring, {n} tokens", f"whole, {n} tokens") for n in lengths]
        return {"tokens_per_second": turns.medians(), "ratios": turns.ratios(pairs)}

    def rounds(self, home):
        def opening(k):
            return home.ring(_in_rounds(k, self.node_layers, self.head_layers), n_threads=1)

        openings = {f"{k} rounds": lambda k=k: opening(k) for k in (1, 2, 4)}
        return self.in_turns(openings, (1, 4))

    def samples(self, home):
        """Many samples, in as many batches as can be under way or in fewer, whose rows share the reading of weights."""
        openings = {f"{n} batches": lambda n=n: home.ring(self.balanced(), 16, n_spread=n, n_threads=1) for n in (4, 2)}
        numbers = (4, 8, 16)
        return self.in_turns(openings, numbers, [(f"2 batches, {n}", f"4 batches, {n}") for n in numbers])

    def nodes(self, home):
        names = ["n0", "n1", "n2"]
        openings = {f"{n + 1} nodes": lambda n=n: home.ring(self.spread(names[:n]), n_threads=1) for n in (1, 2, 3)}
        return self.in_turns(openings, (1, 4))

    def delay(self, home):
        """A proxy between the machines holds every byte back for 3 ms in each direction."""
        _, near = home.nodes["n0"]
        ready = multiprocessing.Queue()
        proxy = multiprocessing.Process(target=hold_back, args=(near.port, 0.003, ready), daemon=True)
        proxy.start()
        far = replace(near, port=ready.get(timeout=10))
        openings = {
            name: lambda address=address: home.ring(self.balanced(), addresses=[address], n_threads=1)
            for name, address in (("near", near), ("3 ms away", far))
        }
        try:
            return self.in_turns(openings, (1, 2, 4))
        finally:
            proxy.terminate()

    def recovery(self, home):
        """kill -9 in mid-answer: the longest wait for a token, and whether the answer stayed the same."""

        def place(names):
            names = [*names, HEAD]
            bounds = [self.n_layers * i // len(names) for i in range(len(names) + 1)]
            return Placement(tuple(Assignment(n, *bounds[i : i + 2]) for i, n in enumerate(names)))

        def answer(ring, kill_at=None):
            tokens, times = [], []
            prompt = Request(
                Sequence(list(self.short), id="0", limit=64),
                PhaseTracker(FORMATS["none"], ""),
                lambda row: int(row.argmax()),
                [],
            )
            for event in decode(ring, Endless(self.tokenizer), [prompt]):
                if isinstance(event, Token) and not event.is_continued:
                    tokens.append(event.id)
                    times.append(time.perf_counter())
                    if len(tokens) == kill_at:
                        os.kill(home.nodes["n1"][0].pid, signal.SIGKILL)
            return tokens, max(b - a for a, b in pairwise(times))

        addresses = [home.nodes[name][1] for name in ("n0", "n1")]
        started = time.perf_counter()
        with home.ring([("n0", 1), (HEAD, self.n_layers - 1)], addresses=addresses, place=place, n_threads=1) as ring:
            first, sent_first = time.perf_counter() - started, ring.n_sent_bytes
            expected, usual = answer(ring)
        started = time.perf_counter()
        with home.ring([("n0", 1), (HEAD, self.n_layers - 1)], addresses=addresses, place=place, n_threads=1) as ring:
            second, sent_second = time.perf_counter() - started, ring.n_sent_bytes
            tokens, pause = answer(ring, 32)
            recovered = ring.timing.recoveries
        home.start("n1")
        return {
            "start_seconds": {"first": first, "second": second},
            "weight_bytes_sent": {"first": sent_first, "second": sent_second},
            "same_tokens": tokens == expected,
            "pause_seconds": pause,
            "longest_wait_without_loss_seconds": usual,
            "recovery_seconds": recovered[0][1],
        }

    def rows(self, home):
        """What smaller activations change: divergence of the next-token distribution over a text, in nats."""

        def logits(row_type):
            with home.ring(self.balanced(), 1, n_threads=1, row_type=row_type) as ring:
                rows = []
                for start in range(0, 256, 64):
                    rows.append(np.array(ring.decode([Span(0, start, self.long[start : start + 64], 64)])))
                return np.concatenate(rows)

        exact = logits("f32")
        return {row_type: compare(logits(row_type), exact) for row_type in ("f16", "i8")}


def _in_rounds(n_rounds, node_layers, head_layers):
    """The windows of the node and of the head, in rounds of shares as equal as they can be."""

    def share(n_layers, i):
        return n_layers * (i + 1) // n_rounds - n_layers * i // n_rounds

    return [(name, share(n, i)) for i in range(n_rounds) for name, n in (("n0", node_layers), (HEAD, head_layers))]


def _independent(options, what, pipe):
    """Tokens a second of each piece of work that the pipe asks for, on a whole model of this process's own."""
    bench = Bench(options)
    with contextlib.closing(bench.whole(1)) as whole:
        work = bench.speed(whole, 1) if what == "decode" else lambda: bench.prompt_speed(whole)
        while pipe.recv():
            pipe.send(work())


def main():
    names = ("recovery", "decode", "awake", "prefill", "prompts", "rounds", "samples", "nodes", "delay", "rows")
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--split", required=True, help="layers of the node and of the head, e.g. 16,12")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--only", default=",".join(names))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    bench = Bench(options)
    record = {
        **describe_run(options.model),
        "split": options.split,
        "repeats": options.repeats,
        "tokens": options.tokens,
    }
    with tempfile.TemporaryDirectory() as folder:
        home = Home(Path(folder), (1, 2, 3), options.model)
        try:
            for name in options.only.split(","):
                started = time.perf_counter()
                record[name] = getattr(bench, name)(home)
                print(f"{name}: {json.dumps(record[name])} ({time.perf_counter() - started:.0f} s)", flush=True)
                if options.out:
                    options.out.write_text(json.dumps(record, indent=1) + "\n")
        finally:
            home.close()
    print(json.dumps(record))


if __name__ == "__main__":
    main()
