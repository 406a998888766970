"""Writes bench/RESULTS.md from bench/results/*.json: python bench/tables.py"""

import json
from pathlib import Path

from localreason.cli.benchmark.report import as_markdown

FOLDER = Path(__file__).parent


def decode_rows(records):
    yield "| model | full / bare loop | per run | with probes | peak memory full / bare |"
    yield "| --- | --- | --- | --- | --- |"
    for r in records:
        runs = f"{min(r['ratio_per_run']):.2f} to {max(r['ratio_per_run']):.2f}"
        yield f"| {r['model']} | {r['ratio']:.3f} | {runs} | {r['ratio_with_probes']:.3f} | {r['peak_ratio']:.3f} |"


def control_rows(record):
    yield (
        "| configuration | n | accuracy (95 %) | to the first (95 %) | p | thinking | right / wrong | answer "
        "| all sampled | probes | hints and forced | cut | unclosed | no answer | derived |"
    )
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for i, (name, r) in enumerate(record["configurations"].items()):
        low, high = r["accuracy_interval"]
        least, most = r["difference_interval"]
        change = (f"{100 * r['difference']:+.1f} ({100 * least:+.1f} to {100 * most:+.1f})", f"{r['p']:.2g}")
        cells = [
            name,
            r["problems"],
            f"{r['accuracy']:.1%} ({low:.0%} to {high:.0%})",
            *(change if i else ("", "")),
            r["mean_thinking_tokens"],
            f"{r['mean_thinking_tokens_right']} / {r['mean_thinking_tokens_wrong']}",
            r["mean_answer_tokens"],
            r["mean_all_sampled_tokens"],
            r["mean_probe_tokens"],
            r["mean_injected_tokens"],
            f"{r['cut_or_stopped']:.0%}",
            f"{r['unclosed']:.0%}",
            f"{r['no_answer']:.0%}",
            r["derived_rows"],
        ]
        yield "| " + " | ".join(map(str, cells)) + " |"


def spread(found):
    return f"{found['ratio']:.3f} ({found['low']:.3f} to {found['high']:.3f})"


def ring_rows(record):
    yield "| what, sequences in flight | ratio (quartiles) |"
    yield "| --- | --- |"
    parts = ("decode", "prefill", "prompts", "awake", "rounds", "samples", "nodes", "delay")
    for part in [part for part in parts if part in record]:
        for name, row in record[part]["ratios"].items():
            yield f"| {part}: {name} | {spread(row)} |"
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


def guess_rows(record):
    yield "| what | ratio (quartiles) |"
    yield "| --- | --- |"
    for name, row in record["ratios"].items():
        yield f"| {name} | {spread(row)} |"
    yield ""
    for name, found in record["guesses"].items():
        if found["guessed"]:
            yield f"Of {found['tokens']} tokens the {name} had {found['guessed']} guessed and {found['right']} right."
    yield f"Replies of the rings are the same: {'yes' if record['same_tokens'] else 'NO'}."


def copies_rows(record):
    yield "| model | GPUs | link, ms | samples | median | most | more than 1.05 times |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for r in record["rows"]:
        share = f"{r['median']:.2f} | {r['most']:.2f} | {r['faster']:.0%}"
        yield f"| {r['model']} | {'some' if r['gpus'] else 'none'} | {r['link_ms']} | {r['samples']} | {share} |"


def plan_rows(record):
    yield "| machines with a GPU | memory | plan for | median s | most s |"
    yield "| --- | --- | --- | --- | --- |"
    for r in record["rows"]:
        memory = "too little, with disk" if r["disk"] else "enough"
        yield f"| {r['gpus']} | {memory} | {r['for']} | {r['median']:.3f} | {r['most']:.3f} |"


def gpu_rows(record):
    bases = ("whole, on the CPU", "whole, on the GPU")
    yield "| layers | tokens/s to the CPU's | " + " | ".join(f"to {b}: mean KL, same top, far" for b in bases) + " |"
    yield "| --- | --- | --- | --- |"
    for name, row in record.items():
        if name.startswith(("whole", "windows")):
            speed = row["tokens_per_second"] / record[bases[0]]["tokens_per_second"]
            found = [row.get(f"to {base}") for base in bases]
            far = [f"{f['mean_kl']:.2g}, {f['same_top']:.3f}, {f['far']:.1g}" if f else "" for f in found]
            yield f"| {name} | {speed:.3f} | {far[0]} | {far[1]} |"


def quant_rows(record):
    yield "| file | cache | MiB | bits | tokens/s | speed to source | perplexity | mean KL | 99 % KL | same top |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for r in record["rows"]:
        speed = (f"{r['tokens_per_second']:.1f}", f"{r['speed_ratio']:.3f}") if "speed_ratio" in r else ("", "")
        quality = ("", "", "", "")
        if drift := r.get("drift"):
            kl = drift["divergence"]
            quality = (f"{drift['candidate_perplexity']['value']:.3f}", f"{kl['value']:.5f} ± {kl['error']:.5f}")
            quality += (f"{drift['divergence_p99']:.4f}", f"{drift['same_top']['value']:.2%}")
        cells = (
            r["file"],
            r["cache_type"],
            f"{r['bytes'] / 2**20:.0f}",
            f"{r['bits_per_weight']:.2f}",
            *speed,
            *quality,
        )
        yield "| " + " | ".join(cells) + " |"


def solved_lines(found):
    change, length = found["accuracy"], found["thinking"]
    low, high, won, lost = (
        100 * change["low"],
        100 * change["high"],
        found["n_only_candidate"],
        found["n_only_reference"],
    )
    yield ""
    yield f"On {found['n_problems']} problems of {found['set']}, one recipe and seed, {found['file']} to the source:"
    yield f"accuracy {found['candidate_accuracy']:.1%} to {found['reference_accuracy']:.1%}, that is"
    yield f"{100 * change['mean']:+.1f} points (95 %: {low:+.1f} to {high:+.1f}); right in one only {won} to {lost}"
    yield f"(McNemar's p {found['mcnemar_p']:.2g}); thinking {found['candidate_thinking']:.0f} to"
    yield f"{found['reference_thinking']:.0f} tokens ({length['low']:+.1f} to {length['high']:+.1f} apart with 95 %);"
    yield f"not ended by itself {found['candidate_unfinished']} to {found['reference_unfinished']}."


def tool_lines(tools):
    if found := tools.get("perplexity"):
        yield ""
        yield f"`quant measure` and llama-perplexity on the same {found['n_scored']} tokens of {found['file']}:"
        yield ""
        yield "| what | ours | llama-perplexity | difference |"
        yield "| --- | --- | --- | --- |"
        for name, theirs in found["theirs"].items():
            ours = found["ours"][name]
            yield f"| {name.replace('_', ' ')} | {ours:.6f} | {theirs:.6f} | {ours - theirs:+.2g} |"
    if found := tools.get("quantize"):
        seconds, peak = found["seconds"], {name: n / 2**20 for name, n in found["peak_bytes"].items()}
        yield ""
        yield f"`quant convert` to {found['scheme'].upper()} takes {found['seconds_ratio']:.2f} of the time of"
        yield f"llama-quantize ({seconds['ours']:.1f} to {seconds['theirs']:.1f} s, the whole command) and"
        yield f"{found['peak_ratio']:.2f} of its memory ({peak['ours']:.0f} to {peak['theirs']:.0f} MiB at the most);"
        yield f"the same tensors: {'yes' if found['same_tensors'] else 'NO'}."


def quant_lines(record):
    yield from (f"## Files: {record['model']}", "")
    yield from (f"`{command}`  " for command in record["commands"].values())
    yield from ("", *quant_rows(record))
    yield from solved_lines(record["problems"]) if "problems" in record else ()
    yield from tool_lines(record.get("tools", {}))
    yield ""


def serve_rows(record):
    yield "| clients | server / bare loop (quartiles) | llama-server / it | first token: server, bare, theirs, ms |"
    yield "| --- | --- | --- | --- |"
    for r in record["rows"]:
        first = [r.get(f"{name}_first_token_ms") for name in ("served", "bare", "peer")]
        times = ", ".join("" if each is None else f"{each:.0f}" for each in first)
        theirs = spread(r["peer"]) if "peer" in r else ""
        yield f"| {r['clients']} | {spread(r['served'])} | {theirs} | {times} |"


def speed_lines(record, name):
    command = f"localreason bench -m {record['model']} --tokens {record['n_tokens']} --runs {record['n_runs']}"
    if "ring" in record:
        lengths = ",".join(str(row["tokens"]) for row in record["ring_prefill"])
        batches = ",".join(str(row["sequences"]) for row in record["ring"])
        command += f" --threads {record['threads']} --lengths {lengths} --batches {batches} --cluster"
    yield from (f"## Speed: {record['model']}", "", f"`{command} -o {name}.json`", "")
    for line in as_markdown(record).splitlines()[2:]:
        yield f"#{line}" if line.startswith("#") else line
    yield ""


def main():
    files = sorted(FOLDER.glob("results/*.json"))
    records = {path.stem: json.loads(path.read_text()) for path in files}
    lines = ["# Results", "", "Written by `python bench/tables.py` from `bench/results/`; how: METHOD.md.", ""]
    lines += ["## The loop", "", *decode_rows([r for name, r in records.items() if name.startswith("decode-")]), ""]
    for name, record in records.items():
        if name.startswith("speed-"):
            lines += speed_lines(record, name)
    for name, record in records.items():
        if name.startswith("controls-"):
            lines += [f"## Controls: {record['model']} on {record['problems']}", ""]
            lines += [f"`{record['command']}`", "", *control_rows(record), ""]
    for name, record in records.items():
        if name.startswith("ring-"):
            lines += [f"## The ring: {record['model']}, {record['split']} layers", ""]
            lines += [f"`{record['command']}`", "", *ring_rows(record), ""]
    for name, record in records.items():
        if name.startswith("guesses-"):
            lines += [f"## A ring that guesses: {record['model']}, {record['split']} layers", ""]
            lines += [f"`{record['command']}`", "", *guess_rows(record), ""]
    for name, record in records.items():
        if name == "copies":
            lines += ["## Whole copies on several machines: how many times as fast as the ring, as planned", ""]
            lines += [f"`{record['command']}`", "", *copies_rows(record), ""]
        if name == "plans":
            lines += ["## Seconds to plan 128 layers for 16 machines", ""]
            lines += [f"`{record['command']}`", "", *plan_rows(record), ""]
        if name.startswith("gpu-"):
            lines += [f"## On a GPU: {record['model']}, {record['gpu']}", ""]
            lines += [f"`{record['command']}`", "", *gpu_rows(record), ""]
    for name, record in records.items():
        if name.startswith("quant-"):
            lines += quant_lines(record)
    for name, record in records.items():
        if name.startswith("serve-"):
            lines += [f"## The server: {record['model']}", "", f"`{record['command']}`", "", *serve_rows(record), ""]
    (FOLDER / "RESULTS.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
