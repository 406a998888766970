"""Files of one model against the first: bytes, bits a weight, decode speed, divergence, same top token, accuracy.

    python bench/quant.py SOURCE.gguf MODEL.gguf... --text FILE --out FILE.json [--only speed|drift] [--tokens 8192]
    python bench/quant.py SOURCE.gguf MODEL.gguf --solved SOURCE.jsonl MODEL.jsonl --out FILE.json
    python bench/quant.py SOURCE.gguf MODEL.gguf --text FILE --tools FOLDER --out FILE.json

All files must exist; nothing is converted. Speed is of one sequence and greedy; the files take turns, so that a machine
that becomes slower does so for all, and what counts is the median of the ratios to the source within a round. Quality
is measured apart from speed. A cache type other than f16 is a row of its own: MODEL.gguf@q8_0. `--solved` pairs what
`localreason solve` wrote for both files; `--tools` has llama.cpp's own llama-perplexity and llama-quantize in a folder.
What is in the file of `--out` already and is not measured now stays. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import quant_tools
from record import describe_run, write

from localreason.quant.choose import describe
from localreason.quant.gguf import ModelFile
from localreason.quant.measure import check_vocabulary, compare, cut
from localreason.quant.paired import Outcome, compare_outcomes
from localreason.runtime.engine import Span
from localreason.runtime.llama import EngineOptions, load

N_PROMPT = 32


def parse(argument):
    """Path and cache type of `MODEL.gguf@q8_0`."""
    path, _, kind = argument.rpartition("@") if "@" in argument else (argument, "", "f16")
    return Path(path), kind


def decode_seconds(engine, prompt, n_tokens):
    """Seconds of `n_tokens` steps behind the prompt, the end of generation passed over."""
    engine.rewind(0, 0)
    engine.submit([Span(0, 0, prompt)])
    token = int(engine.collect()[0].argmax())
    start = time.perf_counter()
    for position in range(len(prompt), len(prompt) + n_tokens):
        engine.submit([Span(0, position, [token])])
        token = int(engine.collect()[0].argmax())
    seconds = time.perf_counter() - start
    engine.rewind(0, 0)
    return seconds


def options(kind, n_context, threads):
    return EngineOptions(n_context=n_context, n_sequences=1, n_threads=threads, cache_type=kind)


def speeds(files, given):
    """Tokens a second of each file, and its ratios to the first, round by round."""
    n_tokens = given.decode
    opened = [load(path, options(kind, N_PROMPT + n_tokens + 256, given.threads)) for path, kind in files]
    prompt = (opened[0][1].prefix + opened[0][1].encode("Think about this step by step. " * 20))[:N_PROMPT]
    for engine, _ in opened:
        decode_seconds(engine, prompt, 8)
    rounds = [[decode_seconds(engine, prompt, n_tokens) for engine, _ in opened] for _ in range(given.runs)]
    for engine, _ in opened:
        engine.close()
    return [
        {
            "n_runs": given.runs,
            "n_decoded": n_tokens,
            "threads": given.threads,
            "tokens_per_second": round(n_tokens / statistics.median(seconds), 2),
            "speed_ratio": round(statistics.median(r[0] / r[i] for r in rounds), 4),
            "speed_ratio_per_run": [round(r[0] / r[i], 4) for r in rounds],
        }
        for i, seconds in enumerate(zip(*rounds, strict=True))
    ]


def drift(source, file, text, given):
    """A file against the source, both open at the same time."""
    (path, kind), (other, other_kind) = source, file
    reference, tokenizer = load(path, options(kind, given.context, given.threads))
    with reference:
        candidate, candidate_tokenizer = load(other, options(other_kind, given.context, given.threads))
        with candidate:
            check_vocabulary(tokenizer, candidate_tokenizer, (path.name, other.name))
            chunks = cut(tokenizer.encode(text, is_first=True), tokenizer.prefix, given.context, given.tokens)
            return asdict(compare(reference, candidate, chunks, (path.name, other.name)))


def solved(paths):
    """What `localreason solve` wrote for the source and for the other file, paired by problem."""
    sides, recipes = [], []
    for path in paths:
        rows = [row for row in map(json.loads, path.read_text("utf-8").splitlines()) if row["error"] is None]
        sides.append({row["id"]: Outcome(row["correct"], row["tokens"]["thinking"], row["stop"]) for row in rows})
        recipes.append(rows[0]["recipe"])
    assert recipes[0] == recipes[1], "both were solved by one recipe"
    n_all = len(sides[0].keys() | sides[1].keys())
    return {"recipe": recipes[0], **asdict(compare_outcomes(sides[0], sides[1], n_all, recipes[0]["seed"]))}


def row(file):
    path, kind = file
    known = describe(ModelFile(path).header, path.name)
    bits = {"scheme": known.scheme, "bits_per_weight": round(known.bits_per_weight, 3)}
    return {"file": path.name, "bytes": path.stat().st_size, "cache_type": kind, **bits}


def measure(files, given):
    """The rows as far as they are asked for, joined with what stands in the file of `--out`."""
    before = json.loads(given.out.read_text()) if given.out and given.out.exists() else {}
    known = {(one["file"], one["cache_type"]): one for one in before.get("rows", [])}
    rows = [known.pop((path.name, kind), {}) | row((path, kind)) for path, kind in files]
    record = before | describe_run(files[0][0]) | {"rows": [*rows, *known.values()]}
    part = "problems" if given.solved else "tools" if given.tools else given.only or "speed and drift"
    record["commands"] = before.get("commands", {}) | {part: record.pop("command")}
    if given.solved:
        record["problems"] = {"file": files[1][0].name, "set": given.set, **solved(given.solved)}
    if given.tools:
        record["tools"] = record.get("tools", {}) | quant_tools.compare_tools(files, given, drift)
    if given.text and not given.tools:
        record |= {"text": given.text.name, "n_tokens": given.tokens}
        if given.only != "drift":
            for found, speed in zip(rows, speeds(files, given), strict=True):
                found |= speed
        if given.only != "speed":
            for found, file in zip(rows, files, strict=True):
                found["drift"] = drift(files[0], file, given.text.read_text("utf-8"), given)
    return record


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", help="the source first; MODEL.gguf or MODEL.gguf@CACHE_TYPE")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--only", choices=("speed", "drift"))
    parser.add_argument("--tokens", type=int, default=8192, help="of the text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64, help="tokens that are decoded in a run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--solved", type=Path, nargs=2, help="results of the source and of the other file")
    parser.add_argument("--set", default="", help="the name of the set of problems that was solved")
    parser.add_argument("--tools", type=Path, help="a folder with llama-perplexity and llama-quantize")
    parser.add_argument("--tool", choices=("perplexity", "quantize"), help="compare with this one only")
    parser.add_argument("--scheme", default="q4_k_m", help="what llama-quantize is to make of the source")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    record = measure([parse(argument) for argument in given.models], given)
    write(record, given.out)


if __name__ == "__main__":
    main()
