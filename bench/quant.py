"""Files of one model against the first: bytes, bits a weight, decode speed, divergence, same top token.

    python bench/quant.py SOURCE.gguf MODEL.gguf... --text FILE [--tokens 4096] [--runs 5] [--out FILE.json]

All files must exist; nothing is converted. Speed is of one sequence and greedy; the files take turns, so that a machine
that becomes slower does so for all, and what counts is the median of the ratios to the source within a round. Quality
is measured apart from speed. A cache type other than f16 is a row of its own: MODEL.gguf@q8_0. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path

from record import describe_run

from localreason.quant.choose import describe
from localreason.quant.gguf import ModelFile
from localreason.quant.measure import check_vocabulary, compare, cut
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


def speeds(files, n_tokens, n_runs, threads):
    """Tokens a second of each file, and its ratios to the first, round by round."""
    opened = [load(path, options(kind, N_PROMPT + n_tokens + 256, threads)) for path, kind in files]
    prompt = (opened[0][1].prefix + opened[0][1].encode("Think about this step by step. " * 20))[:N_PROMPT]
    for engine, _ in opened:
        decode_seconds(engine, prompt, 8)
    rounds = [[decode_seconds(engine, prompt, n_tokens) for engine, _ in opened] for _ in range(n_runs)]
    for engine, _ in opened:
        engine.close()
    return [
        {
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
            chunks = cut(tokenizer.encode(text), tokenizer.prefix, given.context, given.tokens)
            return compare(reference, candidate, chunks, (path.name, other.name))


def row(file, n_bytes):
    path, kind = file
    known = describe(ModelFile(path), path.name)
    bits = {"scheme": known.scheme, "bits_per_weight": round(known.bits_per_weight, 3)}
    return {"file": path.name, "bytes": n_bytes, "cache_type": kind, **bits}


def table(rows):
    yield "| file | cache | MiB | bits | tokens/s | speed to source | perplexity | mean KL | 99 % KL | same top |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for r in rows:
        d = r["drift"]
        kl, top = d["divergence"], d["same_top"]["value"]
        yield (
            f"| {r['file']} | {r['cache_type']} | {r['bytes'] / 2**20:.0f} | {r['bits_per_weight']:.2f} | "
            f"{r['tokens_per_second']:.1f} | {r['speed_ratio']:.3f} | {d['candidate_perplexity']['value']:.3f} | "
            f"{kl['value']:.5f} ± {kl['error']:.5f} | {d['divergence_p99']:.4f} | {top:.2%} |"
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", help="the source first; MODEL.gguf or MODEL.gguf@CACHE_TYPE")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096, help="of the text")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64, help="tokens that are decoded in a run")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    files = [parse(argument) for argument in given.models]
    text = given.text.read_text("utf-8")
    rows = [row(file, file[0].stat().st_size) for file in files]
    for found, speed in zip(rows, speeds(files, given.decode, given.runs, given.threads), strict=True):
        found |= speed
    for found, file in zip(rows, files, strict=True):
        found["drift"] = asdict(drift(files[0], file, text, given))
    print("\n".join(table(rows)))
    record = {**describe_run(files[0][0]), "text": given.text.name, "n_tokens": given.tokens, "n_runs": given.runs}
    record |= {"n_decoded": given.decode, "rows": rows}
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
