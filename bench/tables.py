"""Writes bench/RESULTS.md from bench/results/*.json: python bench/tables.py"""

import json
from pathlib import Path

FOLDER = Path(__file__).parent


def decode_rows(records):
    yield "| model | full / bare loop | per run | with probes | peak memory full / bare |"
    yield "| --- | --- | --- | --- | --- |"
    for r in records:
        runs = f"{min(r['ratio_per_run']):.2f} to {max(r['ratio_per_run']):.2f}"
        yield f"| {r['model']} | {r['ratio']:.3f} | {runs} | {r['ratio_with_probes']:.3f} | {r['peak_ratio']:.3f} |"


def control_rows(record):
    yield "| preset | n | accuracy | thinking | answer | all sampled | probes | cut | no answer | s / problem |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for name, r in record["presets"].items():
        cells = [
            name,
            r["problems"],
            f"{r['accuracy']:.1%}",
            r["mean_thinking_tokens"],
            r["mean_answer_tokens"],
            r["mean_all_sampled_tokens"],
            r["mean_probe_tokens"],
            f"{r['cut']:.0%}",
            f"{r['no_answer']:.0%}",
            r["seconds_per_problem"],
        ]
        yield "| " + " | ".join(map(str, cells)) + " |"


def main():
    files = sorted(FOLDER.glob("results/*.json"))
    records = {path.stem: json.loads(path.read_text()) for path in files}
    lines = ["# Results", "", "Written by `python bench/tables.py` from `bench/results/`; how: METHOD.md.", ""]
    lines += ["## The loop", "", *decode_rows([r for name, r in records.items() if name.startswith("decode-")]), ""]
    for name, record in records.items():
        if name.startswith("controls-"):
            lines += [f"## Controls: {record['model']} on {record['problems']}", ""]
            lines += [f"`{record['command']}`", "", *control_rows(record), ""]
    (FOLDER / "RESULTS.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
