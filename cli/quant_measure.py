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

from ..runtime.errors import InputError, LocalReasonError, OutputError
from ..runtime.files import replacing
from . import build, checksum, config, problems
from .quant_report import drift_lines, paired_lines
from .say import tell

if TYPE_CHECKING:
    from ..quant.measure import Drift
    from ..quant.paired import Comparison, Outcome
    from ..quant.traces import Trace
    from ..runtime.llama import LlamaEngine, LlamaTokenizer

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
Out = Annotated[
    Path | None,
    typer.Option("--out", help="Write the result to this JSON file; rows of solved problems are kept beside it."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@dataclass(frozen=True, slots=True)
class _On:
    """What the two are compared on. Raises a usage error."""

    text: Path | None
    traces: Path | None
    n_tokens: int | None
    n_context: int
    problems: Path | None
    limit: int | None

    def __post_init__(self) -> None:
        if self.text is None and self.traces is None and self.problems is None:
            raise typer.BadParameter("give a --text, --traces, or --problems to measure on", param_hint="measure")
        if self.text is not None and self.traces is not None:
            raise typer.BadParameter("give one of --text and --traces", param_hint="--text")
        if self.limit is not None and self.problems is None:
            raise typer.BadParameter("it limits the problems of --problems, which is missing", param_hint="--limit")

    def read(self) -> "Material":
        """All that is read, before anything is measured. Raises InputError."""
        from ..quant.traces import read_text, read_traces

        source = self.text or self.traces
        text = None if source is None else read_text(source)
        traces = read_traces(text, str(source)) if text is not None and self.traces is not None else []
        return Material(text, traces, [] if self.problems is None else _read_problems(self.problems)[: self.limit])


@dataclass(frozen=True, slots=True)
class Material:
    """The content of the files that the two are compared on: a text, the traces that it is, problems."""

    text: str | None
    traces: "list[Trace]"
    problems: list[problems.Problem]


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

    On a text or on traces: perplexities, KL divergence, same top token; Ctrl-C ends it with what was read. On problems:
    accuracy, thinking length; with --out the same command goes on after Ctrl-C.

    \b
    Examples:
      localreason quant measure model-f16.gguf model-q4_k_m.gguf --text essay.txt
      localreason quant measure model.gguf model.gguf --cache-type-candidate q8_0 --traces results.jsonl
      localreason quant measure model-q8_0.gguf model-q4_k_m.gguf --problems math.jsonl --limit 100 --out q4.json
    """
    on = _On(text, traces, tokens, n_context, problem_file, limit)
    material = on.read()
    sides = _sides(context, (reference, "f16"), (candidate, cache_type_candidate))
    _check_out(out, [side.path for side in sides] + [file for file in (text, traces, problem_file) if file is not None])
    record: dict[str, Any] = {"schema": SCHEMA, "reference": _describe(sides[0]), "candidate": _describe(sides[1])}
    record |= {"on": None, "drift": None, "problems": None}
    record["versions"] = {name: version(name) for name in ("localreason", "llama-cpp-python")}
    try:
        for lines in _measure(build.wiring(context), sides, on, material, record, out):
            if not is_json:
                print("\n".join(lines), flush=True)
            _write(out, record)
    except (OutputError, KeyboardInterrupt):
        if is_json and (record["drift"] or record["problems"]):
            print(json.dumps(record, indent=2, allow_nan=False), flush=True)
        raise
    if is_json:
        print(json.dumps(record, indent=2, allow_nan=False))


def _sides(context: typer.Context, *named: tuple[str, str]) -> list[Side]:
    """The models of these names with these cache types."""
    from ..runtime.native import CACHE_TYPES

    flags, sides = {**context.params, "cluster": False}, []
    for _, kind in named:
        if kind not in CACHE_TYPES:
            raise typer.BadParameter(
                f"{kind!r} is no type of cache; choose one of {', '.join(CACHE_TYPES)}",
                param_hint="--cache-type-candidate",
            )
    for name, kind in named:
        settings = config.load({**flags, "model": name, "cache_type": kind})
        sides.append(Side(build.find_model(settings, build.wiring(context).hub), kind, settings))
    return sides


def _measure(
    wiring: build.Wiring, sides: list[Side], on: _On, material: Material, record: dict[str, Any], out: Path | None
) -> Iterator[list[str]]:
    """What was found, in lines, as soon as it stands in the record."""
    if material.text is not None:
        record["on"], drift, n_left = _drift(sides, on, material)
        record["drift"] = asdict(drift)
        yield drift_lines(drift)
        if n_left:
            tell(f"interrupted: this is of {drift.n_chunks} of {drift.n_chunks + n_left} chunks")
            raise KeyboardInterrupt
    if on.problems is not None:
        record["on_problems"], comparison = _paired(wiring, sides, on.problems, material.problems, out)
        record["problems"] = asdict(comparison)
        yield paired_lines(comparison)


def _describe(side: Side) -> dict[str, Any]:
    """What is known of the weights and the cache of one side."""
    from ..quant.choose import describe
    from ..runtime.parts import join, read_local

    row: dict[str, Any] = {"name": side.path.name, "sha256": checksum.sha256(side.path), "cache_type": side.cache_type}
    header = join(read_local(side.path))
    known = describe(header, side.path.name)
    row |= {"bytes": header.n_bytes, "scheme": known.scheme}
    return row | {"bits_per_weight": round(known.bits_per_weight, 4)}


def _drift(sides: list[Side], on: _On, material: Material) -> "tuple[dict[str, Any], Drift, int]":
    """What was compared on, the result, and how many chunks were left out by Ctrl-C."""
    from ..quant.measure import check_vocabulary, compare, cut
    from ..quant.traces import trace_encoder

    source, data = on.text or on.traces, material.text
    assert source is not None
    assert data is not None
    names = (sides[0].path.name, sides[1].path.name)
    with ExitStack() as stack:
        (reference, tokenizer), (candidate, other) = [_open(side, on.n_context, stack) for side in sides]
        if not sides[0].path.samefile(sides[1].path):
            check_vocabulary(tokenizer, other, names)
        encode_trace = trace_encoder(tokenizer)
        tokens = [token for trace in material.traces for token in encode_trace(trace)] or tokenizer.encode(
            data, is_first=True
        )
        chunks = cut(tokens, tokenizer.prefix, on.n_context, on.n_tokens)
        drift = compare(reference, candidate, chunks, names, _progress(len(chunks)))
    row = {"name": source.name, "sha256": hashlib.sha256(data.encode()).hexdigest()}
    row |= {"kind": "traces" if material.traces else "text", "n_tokens": drift.n_chunks * on.n_context}
    return row, drift, len(chunks) - drift.n_chunks


def _open(side: Side, n_context: int, stack: ExitStack) -> "tuple[LlamaEngine, LlamaTokenizer]":
    from ..runtime.llama import EngineOptions, load

    chosen = side.settings.settings
    options = EngineOptions(n_context, 1, chosen.threads, chosen.gpu_layers, side.cache_type)
    engine, tokenizer = load(side.path, options)
    return stack.enter_context(engine), tokenizer


def _read_problems(file: Path) -> list[problems.Problem]:
    """The problems of a file; bad rows are told. Raises InputError where there are only such."""
    todo, bad = problems.read(str(file))
    for row in bad:
        tell(f"{file} line {row.line}: {row.reason}")
    if not todo:
        raise InputError(f"none of the {len(bad)} rows of {file} is a problem; see the lines above")
    return todo


def _paired(
    wiring: build.Wiring, sides: list[Side], file: Path, todo: list[problems.Problem], out: Path | None
) -> "tuple[dict[str, Any], Comparison]":
    """What was solved, and how the two differ; one model is open at a time."""
    from ..quant.paired import compare_outcomes

    # A candidate that cannot be opened is to be found out before the reference has solved everything.
    options = build.make_options(sides[1].settings, build.make_recipe(sides[1].settings), 1, [todo[0].text])
    with wiring.open_model(sides[1].path, options, sides[1].settings):
        pass
    try:
        found = [_solve(wiring, side, todo, out) for side in sides]
    except (LocalReasonError, KeyboardInterrupt):
        kept = "what was solved is not kept without --out" if out is None else "the same command goes on from here"
        tell(f"not all is solved; {kept}")
        raise
    recipe = build.make_recipe(sides[0].settings)
    row = {"name": file.name, "n": len(todo), "recipe": build.describe(recipe, sides[0].settings)}
    return row, compare_outcomes(found[0], found[1], len(todo), recipe.seed)


def _solve(wiring: build.Wiring, side: Side, todo: list[problems.Problem], out: Path | None) -> "dict[str, Outcome]":
    """What the problems came to that could be run; with `out` each row is kept beside it, and those there are stand."""
    from ..quant.paired import Outcome
    from ..runtime.model import Answered, Question
    from .results import Results
    from .row import make_row

    recipe, by_id = build.make_recipe(side.settings), {problem.id: problem for problem in todo}
    told = build.describe(recipe, side.settings)
    model = {"name": side.path.stem, "sha256": checksum.sha256(side.path)}
    with ExitStack() as stack:
        kept = None
        if out is not None:
            # A file for each model and recipe: what another one answered is neither taken nor in the way.
            key = hashlib.sha256(json.dumps([model["sha256"], told], sort_keys=True).encode()).hexdigest()[:8]
            kept = stack.enter_context(
                closing(Results(out.with_name(f"{out.stem}.{key}.jsonl"), todo, model, told, is_forced=True))
            )
        done = {} if kept is None else {row.id: row for row in kept.done.values() if row.id in by_id}
        left = [problem for problem in todo if problem.id not in done]
        show = _progress(len(todo), f"problems with {side.path.name}")
        if left:
            n_parallel = min(side.settings.settings.parallel, len(left))
            options = build.make_options(side.settings, recipe, n_parallel, [problem.text for problem in left])
            opened = stack.enter_context(wiring.open_model(side.path, options, side.settings))
            questions = [Question(problem.id, problem.text) for problem in left]
            for event in stack.enter_context(closing(opened.solve(questions, recipe, n_parallel))):
                if isinstance(event, Answered):
                    row = make_row(event.result, by_id[event.result.id], model, told)
                    done[row.id] = row
                    show(len(done))
                    if kept is not None:
                        kept.append(row)
    # In the order of the problems: the intervals are drawn by it.
    rows = [done[problem.id] for problem in todo if problem.id in done]
    return {row.id: Outcome(row.correct, row.tokens["thinking"], row.stop) for row in rows if row.error is None}


def _progress(n_all: int, what: str = "chunks") -> Any:
    """Tells on a terminal how much is done."""
    if not sys.stderr.isatty():
        return lambda n_done: None
    return lambda n_done: print(
        f"\r{n_done} of {n_all} {what}", end="" if n_done < n_all else "\n", file=sys.stderr, flush=True
    )


def _check_out(out: Path | None, read: list[Path]) -> None:
    """Refuse now what could not be written after an hour, or is read."""
    if out is None:
        return
    if out.is_dir() or not out.parent.is_dir():
        raise OutputError(f"{out} cannot be written: no such folder, or it is one itself; give another --out")
    if out.exists() and any(out.samefile(file) for file in read):
        raise OutputError(f"{out} is what is read; give another --out")


def _write(out: Path | None, record: dict[str, Any]) -> None:
    if out is None:
        return
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    try:
        if out.is_symlink() or (out.exists() and not out.is_file()):
            out.write_text(text, "utf-8")  # /dev/stdout, say, whose place nothing may take
        else:
            with replacing(out) as part:
                part.write_text(text, "utf-8")
    except OSError as error:
        raise OutputError(f"{out} cannot be written: {error.strerror}; give another --out") from error
