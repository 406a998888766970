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


def ring_rows(record):
    decode, prefill = record["decode"], record["prefill"]
    yield "| what | ratio |"
    yield "| --- | --- |"
    yield f"| 2-node ring to the whole model, 1 sequence | {decode['ring_1_to_whole_1']:.3f} |"
    yield f"| ring with 2 sequences in flight to the ring with 1 | {decode['ring_2_to_ring_1']:.3f} |"
    yield f"| ring with 4 sequences in flight to the ring with 1 | {decode['ring_4_to_ring_1']:.3f} |"
    yield f"| ring with 4 to the whole model with 4 (one thread) | {decode['ring_4_to_whole_4']:.3f} |"
    yield f"| prompt of 512 tokens, ring to whole | {prefill['ring_to_whole_speed']:.3f} |"
    for part in [part for part in ("rounds", "nodes", "delay") if part in record]:
        speeds = record[part]["tokens_per_second"]
        first = next(iter(speeds))
        for name, speed in speeds.items():
            text = f"{name}, to {first}".replace(" in flight", "")
            yield f"| {text} in flight | {speed / speeds[first]:.3f} |"
    for name, row in record.get("rows", {}).items():
        loss = f"mean KL {row['mean_kl']:.2g} nats, largest {row['most_kl']:.2g}"
        yield f"| activations as {name}: {loss}; same top token | {row['same_top']:.3f} |"
    if "recovery" not in record:
        return
    yield ""
    lost = record["recovery"]
    start, sent, usual = lost["start_seconds"], lost["weight_bytes_sent"], lost["longest_wait_without_loss_seconds"]
    same = "yes" if lost["same_tokens"] else "NO"
    yield f"kill -9 of a node in mid-answer: {lost['pause_seconds']:.2f} s without a token, else at most {usual:.2f},"
    yield f"same tokens: {same}. First start {start['first']:.1f} s, {sent['first']} bytes of weights sent; second"
    yield f"{start['second']:.1f} s, {sent['second']} bytes."


def main():
    files = sorted(FOLDER.glob("results/*.json"))
    records = {path.stem: json.loads(path.read_text()) for path in files}
    lines = ["# Results", "", "Written by `python bench/tables.py` from `bench/results/`; how: METHOD.md.", ""]
    lines += ["## The loop", "", *decode_rows([r for name, r in records.items() if name.startswith("decode-")]), ""]
    for name, record in records.items():
        if name.startswith("controls-"):
            lines += [f"## Controls: {record['model']} on {record['problems']}", ""]
            lines += [f"`{record['command']}`", "", *control_rows(record), ""]
    for name, record in records.items():
        if name.startswith("ring-"):
            lines += [f"## The ring: {record['model']}, {record['split']} layers", ""]
            lines += [f"`{record['command']}`", "", *ring_rows(record), ""]
    (FOLDER / "RESULTS.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
