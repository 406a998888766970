"""Each preset on the same problems with the same seeds: accuracy, tokens, time.

    python bench/controls.py MODEL.gguf PROBLEMS.jsonl [--limit 100] [--parallel 4] [--presets safe,fast]
    python bench/controls.py MODEL.gguf PROBLEMS.jsonl --merge REPLIES.jsonl REPLIES2.jsonl --out FILE.json

Problems are JSONL with `problem` and `answer`. Presets take turns problem by problem, so that a machine that becomes
slower does so for all. Ends after `--seconds` at a whole round. Every reply is written to `--replies`, the summary to
`--out`; the last line is JSON. `--merge` joins the replies of runs over parts of the problems with the same recipes;
the seconds are then of the first file alone.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from record import describe_run

from localreason.runtime.answer import is_equal
from localreason.runtime.controls import PRESETS, combine
from localreason.runtime.llama import EngineOptions
from localreason.runtime.model import Answered, Model, Question, Recipe
from localreason.runtime.sampler import Sampling


def run_round(model, problems, recipes, parallel, rows):
    for name, recipe in recipes.items():
        questions = [Question(problem["id"], problem["problem"]) for problem in problems]
        gold = {problem["id"]: problem["answer"] for problem in problems}
        start = time.perf_counter()
        for event in model.solve(questions, recipe, parallel):
            if not isinstance(event, Answered):
                continue
            result = event.result
            search = result.counters.get("search", {})
            rows[name].append(
                {
                    "preset": name,
                    "id": result.id,
                    "gold": gold[result.id],
                    "answer": result.answer,
                    "correct": result.answer is not None and is_equal(result.answer, gold[result.id]),
                    "stop": result.stop,
                    "thinking_tokens": result.counts.thinking,
                    "answer_tokens": result.counts.answer,
                    "all_tokens": search.get("sampled_tokens", result.counts.thinking + result.counts.answer),
                    "hint_tokens": result.counts.hint,
                    "probe_tokens": result.counts.probe,
                    "forced_tokens": result.counts.forced,
                    "counters": result.counters,
                    "text": result.text,
                    "thinking": result.thinking,
                }
            )
        rows[name][-1]["round_seconds"] = time.perf_counter() - start


def summarise(rows):
    n = len(rows)
    seconds = sum(row.get("round_seconds", 0.0) for row in rows)
    budgets = [row["counters"].get("budget", {}) for row in rows]
    return {
        "problems": n,
        "accuracy": round(sum(row["correct"] for row in rows) / n, 4),
        "no_answer": round(sum(row["answer"] is None for row in rows) / n, 4),
        "cut": round(sum(bool(budget.get("cuts")) for budget in budgets) / n, 4),
        "closed_for_it": round(sum(bool(budget.get("closed_at_end")) for budget in budgets) / n, 4),
        "stopped_by_length": round(sum(row["stop"] in ("length", "context") for row in rows) / n, 4),
        "mean_thinking_tokens": round(statistics.mean(row["thinking_tokens"] for row in rows), 1),
        "mean_answer_tokens": round(statistics.mean(row["answer_tokens"] for row in rows), 1),
        "mean_all_sampled_tokens": round(statistics.mean(row["all_tokens"] for row in rows), 1),
        "mean_hint_tokens": round(statistics.mean(row["hint_tokens"] for row in rows), 1),
        "mean_probe_tokens": round(statistics.mean(row["probe_tokens"] for row in rows), 1),
        "seconds_per_problem": round(seconds / n, 2),
    }


def merge(files, rows):
    """Replies of all files, each problem once; the seconds of the first file only."""
    seen, n_first = set(), {}
    for number, file in enumerate(files):
        for row in map(json.loads, file.read_text().splitlines()):
            if (row["preset"], row["id"]) not in seen:
                seen.add((row["preset"], row["id"]))
                if number:
                    row.pop("round_seconds", None)
                rows[row["preset"]].append(row)
        if not number:
            n_first = {name: len(all) for name, all in rows.items()}
    common = set.intersection(*({row["id"] for row in all} for all in rows.values()))
    summary = {}
    for name, all in rows.items():
        summary[name] = summarise([row for row in all if row["id"] in common])
        summary[name]["seconds_per_problem"] = round(
            sum(row.get("round_seconds", 0.0) for row in all) / n_first[name], 2
        )
    return summary


def describe(options, recipes, summary):
    return {
        **describe_run(options.model),
        "problems": options.problems.name,
        "recipes": {name: recipe.describe() for name, recipe in recipes.items()},
        "parallel": options.parallel,
        "presets": summary,
    }


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("problems", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--round", type=int, default=10, help="problems a preset gets before the next one's turn")
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=36000)
    parser.add_argument("--cap", type=int, default=512, help="thinking tokens in every preset")
    parser.add_argument("--presets", default=",".join(PRESETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--replies", type=Path)
    parser.add_argument("--merge", type=Path, nargs="+")
    options = parser.parse_args()
    problems = [json.loads(line) for line in options.problems.read_text().splitlines()[: options.limit]]
    recipes = {
        name: Recipe(combine(name, [f"budget:max={options.cap}"]), Sampling(), options.seed, options.cap + 512)
        for name in options.presets.split(",")
    }
    rows = {name: [] for name in recipes}
    if options.merge:
        summary = merge(options.merge, rows)
        record = describe(options, recipes, summary)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        print(json.dumps(record))
        return
    n_sequences = max(recipe.n_sequences(options.parallel) for recipe in recipes.values())
    start = time.perf_counter()
    with Model.open(options.model, EngineOptions(n_context=24576, n_sequences=n_sequences)) as model:
        for first in range(0, len(problems), options.round):
            if time.perf_counter() - start > options.seconds:
                break
            run_round(model, problems[first : first + options.round], recipes, options.parallel, rows)
            if options.replies:
                options.replies.write_text("".join(json.dumps(row) + "\n" for all in rows.values() for row in all))
            summary = {name: summarise(all) for name, all in rows.items()}
            record = describe(options, recipes, summary)
            if options.out:
                options.out.write_text(json.dumps(record, indent=1) + "\n")
            print(f"{first + options.round} problems, {time.perf_counter() - start:.0f} s", flush=True)
    print(json.dumps(record))


if __name__ == "__main__":
    main()
