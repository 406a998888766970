"""One answer at a time in a ring that guesses next tokens, against one that does not and one machine.

    python bench/guesses.py MODEL.gguf --split 17,11 --problems gsm8k.jsonl [--limit 8] [--tokens 200]

Replies are those of `localreason solve`: thinking, sampled, seed 0. Each node is a process with one thread, each of the
rings has its own. The cases take turns with each problem, forth with one and back with the next; a ratio is of one
problem, and medians and quartiles are given. "First question" forgets after each problem what it has seen. The last
line is JSON.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path

from record import describe_run, write
from ring import Bench, Home
from turns import quartiles

from localreason.cluster.formation import HEAD
from localreason.cluster.guess import Guesses
from localreason.runtime.controls import combine
from localreason.runtime.events import Token
from localreason.runtime.llama import load_tokenizer
from localreason.runtime.model import Model, Recipe


def reply(model, text, recipe):
    """Its tokens, and tokens a second behind the first one."""
    tokens, times = [], []
    for event in model.ask(text, recipe):
        if isinstance(event, Token) and not event.is_continued:
            tokens.append(event.id)
            times.append(time.perf_counter())
    return tokens, (len(times) - 1) / (times[-1] - times[0])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("--split", required=True, help="layers of the node and of the head, e.g. 17,11")
    parser.add_argument("--problems", type=Path, required=True, help="JSONL with the key problem")
    parser.add_argument("--limit", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    problems = [json.loads(line)["problem"] for line in options.problems.open()][: options.limit]
    bench, recipe = Bench(options), Recipe(combine("safe", []), max_tokens=options.tokens)
    speeds, tokens, found = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        home = Home(Path(folder), (1, 1, 1), options.model)
        stack.callback(home.close)

        def ring(node, is_guessing):
            windows = [(node, bench.node_layers), (HEAD, bench.head_layers)]
            return home.ring(windows, 2, n_threads=1, is_guessing=is_guessing)

        engines = {
            "one machine": bench.whole(2),
            "ring": ring("n0", False),
            "ring that guesses, first question": ring("n1", True),
            "ring that guesses": ring("n2", True),
        }
        models = {
            name: stack.enter_context(Model(options.model, engine, load_tokenizer(options.model)))
            for name, engine in engines.items()
        }
        for model in models.values():
            reply(model, "Count to ten.", Recipe(max_tokens=16))
        for i, problem in enumerate(problems):
            for name, model in list(models.items())[:: 1 if i % 2 else -1]:
                guesses = getattr(model.engine, "_guesses", Guesses())
                if "first" in name:
                    guesses = model.engine._guesses = Guesses()
                before = guesses.n_made, guesses.n_right
                ids, speed = reply(model, problem, recipe)
                speeds.setdefault(name, []).append(speed)
                tokens.setdefault(name, []).append(ids)
                made = guesses.n_made - before[0], guesses.n_right - before[1]
                found.setdefault(name, []).append({"tokens": len(ids), "guessed": made[0], "right": made[1]})
                print(f"{i} {name}: {speed:.2f} tokens a second, {found[name][-1]}", flush=True)
    pairs = [(one, other) for other in list(models)[:2] for one in list(models)[1:] if one != other]
    ratios = {
        f"{one}, to {other}": quartiles([a / b for a, b in zip(speeds[one], speeds[other], strict=True)])
        for one, other in pairs
    }
    plain, *guessed = [tokens[name] for name in list(models)[1:]]
    record = {
        **describe_run(options.model),
        "split": options.split,
        "problems": len(problems),
        "tokens": options.tokens,
        "tokens_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "ratios": ratios,
        "guesses": {name: {key: sum(one[key] for one in rows) for key in rows[0]} for name, rows in found.items()},
        "same_tokens": all(each == plain for each in guessed),
    }
    write(record, options.out)


if __name__ == "__main__":
    main()
