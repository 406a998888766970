"""llama.cpp's own llama-perplexity and llama-quantize beside ours: the same numbers, seconds and memory."""

import contextlib
import hashlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from localreason.quant.gguf import ModelFile

_NUMBERS = {
    "candidate_perplexity": r"Mean PPL\(Q\) *: *([\d.]+)",
    "divergence": r"Mean +KLD: *([-\d.]+)",
    "divergence_p99": r"99\.0% +KLD: *([-\d.]+)",
    "divergence_max": r"Maximum KLD: *([-\d.]+)",
    "same_top": r"Same top p: *([\d.]+)",
}


def compare_tools(files, given, drift):
    """By the name of the tool; ours and theirs."""
    found = {}
    if given.tool != "quantize":
        found["perplexity"] = perplexity(files, given, drift)
    if given.tool != "perplexity":
        found["quantize"] = quantize(files[0][0], given)
    return found


def perplexity(files, given, drift):
    """The last file against the first, by llama-perplexity and by ours on the same chunks, in the same batches."""
    reference, candidate = files[0], files[-1]
    ours = drift(reference, candidate, given.text.read_text("utf-8"), given)
    flags = ["-f", given.text, "-c", given.context, "-b", 128, "-ub", 128, "-ngl", 0]
    flags += ["--chunks", ours["n_chunks"], *(["-t", given.threads] if given.threads else [])]
    with tempfile.TemporaryDirectory() as folder:
        flags += ["--kl-divergence-base", Path(folder, "base")]
        # The base file holds log-probabilities of 16 bits, so the reference's own perplexity is that of the first run.
        alone = run([given.tools / "llama-perplexity", "-m", reference[0], *flags])[0]
        text = run([given.tools / "llama-perplexity", "-m", candidate[0], "--kl-divergence", *flags])[0]
    theirs = {"reference_perplexity": float(re.search(r"Final estimate: PPL = ([\d.]+)", alone)[1])}
    theirs |= {name: float(re.search(pattern, text)[1]) for name, pattern in _NUMBERS.items()}
    theirs["same_top"] /= 100
    mine = {name: ours[name]["value"] if isinstance(ours[name], dict) else ours[name] for name in theirs}
    return {"file": candidate[0].name, "n_scored": ours["n_scored"], "ours": mine, "theirs": theirs}


def quantize(source, given):
    """Conversions of the source by both, in turns: seconds of the whole command, peak memory, and the same tensors."""
    threads, rounds = given.threads or 1, []
    with tempfile.TemporaryDirectory(dir=source.parent) as folder:
        made = [Path(folder, "ours.gguf"), Path(folder, "theirs.gguf")]
        code = "from localreason.cli.main import run; run()"
        commands = [
            [sys.executable, "-c", code, "quant", "convert", source, made[0], "--scheme", given.scheme],
            [given.tools / "llama-quantize", "--allow-requantize", source, made[1], given.scheme, threads],
        ]
        commands[0] += ["--allow-requantize", "--force", "--threads", threads]
        for _ in range(given.runs):
            rounds.append([run(command)[1:] for command in commands])
        tensors = [digest(path) for path in made]
    sides = list(zip(*rounds, strict=True))
    (ours, our_peak), (theirs, their_peak) = (map(statistics.median, zip(*side, strict=True)) for side in sides)
    return {
        "file": source.name,
        "scheme": given.scheme,
        "n_runs": given.runs,
        "threads": threads,
        "same_tensors": tensors[0] == tensors[1],
        "seconds": {"ours": round(ours, 2), "theirs": round(theirs, 2)},
        "seconds_ratio": round(statistics.median(a[0] / b[0] for a, b in rounds), 3),
        "peak_bytes": {"ours": int(our_peak), "theirs": int(their_peak)},
        "peak_ratio": round(our_peak / their_peak, 3),
    }


def run(command):
    """Output, seconds, and the most resident bytes of all its processes together, looked at every 20 ms."""
    start, peak = time.perf_counter(), 0
    with tempfile.TemporaryFile() as output:
        process = psutil.Popen(list(map(str, command)), stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                held = [one.memory_info().rss for one in (process, *process.children(recursive=True))]
                peak = max(peak, sum(held))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    if process.returncode:
        sys.exit(f"{command[0]} ended with {process.returncode}: {text[-2000:]}")
    return text, seconds, peak


def digest(path):
    """Of all tensors with their names and types."""
    file, found = ModelFile(path), hashlib.sha256()
    with path.open("rb") as data:
        for name, tensor in sorted(file.tensors.items()):
            data.seek(tensor.offset)
            found.update(f"{name} {tensor.type_name}".encode() + data.read(tensor.n_bytes))
    return found.hexdigest()
