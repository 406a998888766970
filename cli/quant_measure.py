"""`localreason quant measure`: a quantised file, or a cache type, against a reference."""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.errors import InputError, ModelUnsupported, OutputError
from . import build, checksum, config, problems
from .render import safe

if TYPE_CHECKING:
    from ..quant.measure import Drift, Trace
    from ..quant.paired import Comparison, Outcome
    from ..runtime.llama import LlamaTokenizer

SCHEMA = 1
"""Of the JSON that is written; a change of meaning gets a new number."""
Reference = Annotated[str, typer.Argument(metavar="REF", help="The reference: a file or name, best of 16 or 8 bits.")]
Candidate = Annotated[str, typer.Argument(metavar="CANDIDATE", help="What is measured: another file of this model.")]
TextFile = Annotated[Path | None, typer.Option("--text", help="A text in UTF-8 to compare the models on.")]
Traces = Annotated[Path | None, typer.Option("--traces", help="Results of `localreason solve` to compare them on.")]
Tokens = Annotated[int | None, typer.Option("--tokens", min=16, help="Take the first tokens of the text only.")]
Chunk = Annotated[int, typer.Option("--context", min=16, max=1 << 20, help="Tokens of a chunk; half are scored.")]
CacheType = Annotated[
    str, typer.Option("--cache-type-candidate", help="The candidate's cache: f16, q8_0, q4_0. The reference's is f16.")
]
Problems = Annotated[Path | None, typer.Option("--problems", help="Problems that both models solve.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Solve only the first problems of the file.")]
Out = Annotated[Path | None, typer.Option("--out", help="Write the result to this JSON file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two that are compared."""

    path: Path
    cache_type: str
    settings: config.Config


def measure(
    context: typer.Context,
    reference: Reference,
    candidate: Candidate,
    text: TextFile = None,
    traces: Traces = None,
    tokens: Tokens = None,
    n_context: Chunk = 512,
    cache_type_candidate: CacheType = "f16",
    problem_file: Problems = None,
    limit: Limit = None,
    preset: Annotated[str | None, config.flag("preset", "-p", "--preset")] = None,
    controls: Annotated[list[str] | None, config.flag("controls", "-c", "--control", show="NAME[:K=V,...]")] = None,
    max_tokens: Annotated[int | None, config.flag("max_tokens")] = None,
    parallel: Annotated[int | None, config.flag("parallel")] = None,
    seed: Annotated[int | None, config.flag("seed")] = None,
    threads: Annotated[int | None, config.flag("threads")] = None,
    gpu_layers: Annotated[int | None, config.flag("gpu_layers")] = None,
    store: Annotated[str | None, config.flag("store")] = None,
    out: Out = None,
    is_json: Json = False,
) -> None:
    """Measure what a quantised file, or a quantised cache, loses against a reference.

    On a text or on reasoning traces: perplexity of both, KL divergence, same top token. On problems: accuracy and
    thinking length, paired, with 95 % intervals.

    \b
    Examples:
      localreason quant measure model-f16.gguf model-q4_k_m.gguf --text essay.txt
      localreason quant measure model.gguf model.gguf --cache-type-candidate q8_0 --traces results.jsonl
      localreason quant measure model-q8_0.gguf model-q4_k_m.gguf --problems math.jsonl --limit 100 --out q4.json
    """
    if text is None and traces is None and problem_file is None:
        raise typer.BadParameter("give a --text, --traces, or --problems to measure on", param_hint="measure")
    if text is not None and traces is not None:
        raise typer.BadParameter("give one of --text and --traces", param_hint="--text")
    flags = {**context.params, "cluster": False}
    sides = []
    for name, kind in ((reference, "f16"), (candidate, cache_type_candidate)):
        settings = config.load({**flags, "model": name, "cache_type": kind})
        sides.append(Side(build.find_model(settings, build.wiring(context).hub), kind, settings))
    _check_out(out)
    record: dict[str, Any] = {"schema": SCHEMA, "reference": _describe(sides[0]), "candidate": _describe(sides[1])}
    record |= {"on": None, "drift": None, "problems": None}
    if text is not None or traces is not None:
        record["on"], drift = _drift(sides, text, traces, tokens, n_context)
        record["drift"] = asdict(drift)
        _show(is_json, _drift_lines(drift))
    if problem_file is not None:
        record["on_problems"], comparison = _paired(build.wiring(context), sides, problem_file, limit)
        record["problems"] = asdict(comparison)
        _show(is_json, _paired_lines(comparison))
    record["versions"] = {name: version(name) for name in ("localreason", "llama-cpp-python")}
    _write(out, record)
    if is_json:
        print(json.dumps(record, indent=2, allow_nan=False))


def _describe(side: Side) -> dict[str, Any]:
    """What is known of the weights and the cache of one side."""
    from ..quant.choose import describe
    from ..quant.gguf import ModelFile

    row: dict[str, Any] = {"name": side.path.name, "sha256": checksum.sha256(side.path), "cache_type": side.cache_type}
    row |= {"bytes": side.path.stat().st_size, "scheme": None, "bits_per_weight": None}
    try:
        known = describe(ModelFile(side.path), side.path.name)
    except ModelUnsupported:
        return row  # llama.cpp may know more of it, such as its other parts
    return row | {"scheme": known.scheme, "bits_per_weight": round(known.bits_per_weight, 4)}


def _drift(
    sides: list[Side], text: Path | None, traces: Path | None, n_most: int | None, n_context: int
) -> "tuple[dict[str, Any], Drift]":
    """What was compared on, and the result."""
    from ..quant.measure import check_vocabulary, compare, cut, read_traces
    from ..runtime.llama import EngineOptions, load

    source = text or traces
    assert source is not None
    data = _read(source)
    found = read_traces(data, str(source)) if traces else data
    names = (sides[0].path.name, sides[1].path.name)
    with ExitStack() as stack:
        engines, tokenizers = [], []
        for side in sides:
            chosen = side.settings.settings
            engine, tokenizer = load(
                side.path,
                EngineOptions(
                    n_context=n_context,
                    n_sequences=1,
                    n_threads=chosen.threads,
                    n_gpu_layers=chosen.gpu_layers,
                    cache_type=side.cache_type,
                ),
            )
            stack.enter_context(engine)
            engines.append(engine)
            tokenizers.append(tokenizer)
        if not sides[0].path.samefile(sides[1].path):
            check_vocabulary(tokenizers[0], tokenizers[1], names)
        chunks = cut(_encode(tokenizers[0], found), tokenizers[0].prefix, n_context, n_most)
        drift = compare(engines[0], engines[1], chunks, names, _progress(len(chunks)))
    row = {"name": source.name, "sha256": hashlib.sha256(data.encode()).hexdigest()}
    return row | {"kind": "traces" if traces else "text", "n_tokens": drift.n_chunks * n_context}, drift


def _encode(tokenizer: "LlamaTokenizer", found: "str | list[Trace]") -> list[int]:
    from ..quant.measure import encode_traces
    from ..runtime.formats import detect

    if isinstance(found, str):
        return tokenizer.encode(found)
    return encode_traces(tokenizer, found, detect(tokenizer.chat_template, tokenizer.metadata))


def _read(path: Path) -> str:
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; give a text in UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give a text in UTF-8") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start + 1}; save it as UTF-8") from error
    if not text.strip():
        raise InputError(f"{path} is empty; give a text of some hundred words or more")
    return text


def _paired(
    wiring: build.Wiring, sides: list[Side], file: Path, limit: int | None
) -> "tuple[dict[str, Any], Comparison]":
    """What was solved, and how the two differ; one model is open at a time."""
    from ..quant.paired import compare_outcomes

    todo, bad = problems.read(str(file))
    for row in bad:
        _tell(f"{file} line {row.line}: {row.reason}")
    todo = todo[:limit]
    if not todo:
        raise InputError(f"none of the {len(bad)} rows of {file} is a problem; see the lines above")
    found = [_solve(wiring, side, todo) for side in sides]
    recipe = build.make_recipe(sides[0].settings)
    row = {"name": file.name, "n": len(todo), "recipe": recipe.describe()}
    return row, compare_outcomes(found[0], found[1], len(todo), recipe.seed)


def _solve(wiring: build.Wiring, side: Side, todo: list[problems.Problem]) -> "dict[str, Outcome]":
    from ..quant.paired import outcomes
    from ..runtime.model import Answered, Question

    recipe = build.make_recipe(side.settings)
    n_parallel = min(side.settings.settings.parallel, len(todo))
    options = build.make_options(side.settings, recipe, n_parallel, [problem.text for problem in todo])
    gold = {problem.id: problem.answer for problem in todo}
    tell = _progress(len(todo), f"problems with {side.path.name}")

    def counted(events: Iterator[Any]) -> Iterator[Any]:
        n_done = 0
        for event in events:
            if isinstance(event, Answered):
                n_done += 1
                tell(n_done)
            yield event

    questions = [Question(problem.id, problem.text) for problem in todo]
    with (
        wiring.open_model(side.path, options, side.settings) as model,
        closing(model.solve(questions, recipe, n_parallel)) as events,
    ):
        return outcomes(counted(events), gold)


def _progress(n_all: int, what: str = "chunks") -> Any:
    """Tells on a terminal how much is done."""
    if not sys.stderr.isatty():
        return lambda n_done: None
    return lambda n_done: print(
        f"\r{n_done} of {n_all} {what}", end="" if n_done < n_all else "\n", file=sys.stderr, flush=True
    )


def _drift_lines(drift: "Drift") -> list[str]:
    low, high = drift.reference_perplexity, drift.candidate_perplexity
    kl, top, change = drift.divergence, drift.same_top, drift.log_probability_difference
    return [
        f"scored tokens         {drift.n_scored} in {drift.n_chunks} chunks of {drift.n_context}",
        f"perplexity            {low.value:.4f} ± {low.error:.4f} reference, {high.value:.4f} ± {high.error:.4f}",
        f"KL divergence         {kl.value:.6f} ± {kl.error:.6f} nats; 99 % below {drift.divergence_p99:.4f}, "
        f"largest {drift.divergence_max:.4f}",
        f"same top token        {top.value:.2%} ± {top.error:.2%}",
        f"log-probability       {change.value:+.6f} ± {change.error:.6f} nats a token",
    ]


def _paired_lines(found: "Comparison") -> list[str]:
    lines = [f"problems              {found.n_problems}, {found.n_failed} left out"]
    if found.accuracy is not None:
        difference = found.accuracy
        lines.append(
            f"accuracy              {found.reference_accuracy:.1%} reference, {found.candidate_accuracy:.1%}; "
            f"{difference.mean:+.1%} ({difference.low:+.1%} to {difference.high:+.1%})"
        )
        lines.append(
            f"right in one only     {found.n_only_reference} reference, {found.n_only_candidate}; "
            f"McNemar's p {found.mcnemar_p:.3g}"
        )
    length = found.thinking
    lines.append(
        f"thinking tokens       {found.reference_thinking:.0f} reference, {found.candidate_thinking:.0f}; "
        f"{length.mean:+.1f} ({length.low:+.1f} to {length.high:+.1f})"
    )
    lines.append(f"not ended by itself   {found.reference_unfinished} reference, {found.candidate_unfinished}")
    return lines


def _check_out(out: Path | None) -> None:
    """Refuse now what could not be written after an hour."""
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise OutputError(f"{out} cannot be written: no such folder, or it is one itself; give another --out")


def _write(out: Path | None, record: dict[str, Any]) -> None:
    if out is None:
        return
    try:
        out.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", "utf-8")
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}; give another --out") from error


def _show(is_json: bool, lines: list[str]) -> None:
    if not is_json:
        print("\n".join(lines), flush=True)


def _tell(sentence: str) -> None:
    print(f"localreason: {safe(sentence)}", file=sys.stderr, flush=True)
