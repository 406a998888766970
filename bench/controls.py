"""Condenses results of `localreason eval` into one JSON file for bench/results, from which tables.py makes a table.

    localreason eval gsm8k --data gsm8k.jsonl --limit 100 -p safe -p fast -c budget:max=512 -m MODEL.gguf -o out
    python bench/controls.py out/safe.jsonl out/fast.jsonl --out bench/results/controls-gsm8k.json

A configuration counts up to the first problem of the task that it has not run, since the order in which problems end is
no fair choice; its difference is to the same problems of the first configuration. `right` and `sampled_tokens` have one
digit and one number for each row, in the order of the problems, from which intervals and p can be computed again. The
last line is JSON.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from record import describe_command, write

from localreason.cli.evaluation.compare import Run, load
from localreason.cli.evaluation.statistics import is_cut, pair, summarise
from localreason.cli.row import Row, n_sampled


def condense(rows: Sequence[Row], baseline: Sequence[Row], before: Sequence[Row]) -> dict[str, object]:
    """`before` are the rows of earlier configurations: those that derive.py took from them have the same times."""
    found, to_first = summarise(rows), pair(baseline, rows)
    times = {(row.key, row.seconds, row.wall_seconds) for row in before}
    n_derived = sum((row.key, row.seconds, row.wall_seconds) in times for row in rows)
    budgets = [row.counters.get("budget", {}) for row in rows]

    def mean(values):
        return round(statistics.mean(values), 1)

    return {
        "problems": found.n_problems,
        "rows": found.n_rows,
        "accuracy": round(found.accuracy.mean, 4),
        "accuracy_interval": [round(found.accuracy.low, 4), round(found.accuracy.high, 4)],
        "difference": round(to_first.accuracy.mean, 4),
        "difference_interval": [round(to_first.accuracy.low, 4), round(to_first.accuracy.high, 4)],
        "p": float(f"{to_first.p:.3g}"),
        "no_answer": round(found.no_answer, 4),
        "cut": round(statistics.mean(bool(budget.get("cuts")) for budget in budgets), 4),
        "cut_or_stopped": round(statistics.mean(map(is_cut, rows)), 4),
        "closed_for_it": round(statistics.mean(bool(budget.get("closed_at_end")) for budget in budgets), 4),
        "unclosed": round(found.unclosed, 4),
        "stopped_by_length": round(statistics.mean(row.stop in ("length", "context") for row in rows), 4),
        "mean_thinking_tokens": round(found.thinking, 1),
        "mean_thinking_tokens_right": found.thinking_right and round(found.thinking_right, 1),
        "mean_thinking_tokens_wrong": found.thinking_wrong and round(found.thinking_wrong, 1),
        "mean_answer_tokens": mean(row.tokens["answer"] for row in rows),
        "mean_all_sampled_tokens": mean(map(n_sampled, rows)),
        "mean_hint_tokens": mean(row.tokens["hint"] for row in rows),
        "mean_probe_tokens": round(found.probe, 1),
        "mean_injected_tokens": round(found.injected, 1),
        "derived_rows": n_derived,
        "right": "".join(str(int(bool(row.correct))) for row in rows),
        "sampled_tokens": " ".join(str(n_sampled(row)) for row in rows),
        "seconds_per_problem": None if n_derived else round(found.seconds, 2),
        "tokens_per_second": None if n_derived else round(found.tokens_per_second, 1),
    }


def unbroken_rows(runs: Sequence[Run]) -> dict[str, list[Row]]:
    ran = {run.name: {row.key: row for row in run.rows if row.correct is not None} for run in runs}
    keys = sorted(ran[runs[0].name])
    n = {name: next((i for i, key in enumerate(keys) if key not in rows), len(keys)) for name, rows in ran.items()}
    return {name: [rows[key] for key in keys[: n[name]]] for name, rows in ran.items() if n[name]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("results", nargs="+", help="FILE or NAME=FILE, the baseline first")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs, _ = load(options.results)
    rows = unbroken_rows(runs)
    header = runs[0].header
    configurations, before = {}, []
    for name, each in rows.items():
        configurations[name] = condense(each, rows[runs[0].name], before)
        before += each
    record = {
        **describe_command(),
        "model": f"{header['model']['name']}.gguf",
        "sha256": header["model"]["sha256"],
        "versions": header["versions"],
        "machine": header["machine"],
        "problems": header["task"]["name"],
        "problems_sha256": header["task"]["sha256"],
        "grader": header["grader"],
        "seeds": sorted({row.seed for row in rows[runs[0].name]}),
        "recipes": {run.name: run.header["recipe"] for run in runs},
        "configurations": configurations,
    }
    write(record, options.out)


if __name__ == "__main__":
    main()
