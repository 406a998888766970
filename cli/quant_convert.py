"""`localreason quant convert` and `localreason quant imatrix`: another form of a model file, and what guides it."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.errors import InputError, OutputError
from . import build, checksum, config
from .say import tell

if TYPE_CHECKING:
    from ..quant.convert import Plan

_FEW_CHUNKS = 10
"""Of 512 tokens: below it the means of a matrix hang on single sentences."""
Source = Annotated[str, typer.Argument(metavar="SRC", help="A path or a name of a model, best of 16 bits a weight.")]
Target = Annotated[Path, typer.Argument(metavar="DST", help="The GGUF file to make.")]
SchemeName = Annotated[str, typer.Option("--scheme", help="A file type such as q8_0, q4_k_m, f16; or w8a8, w4a16.")]
Tensors = Annotated[
    list[str] | None,
    typer.Option("--tensor", metavar="PATTERN=TYPE", help="Type of the tensors whose names the pattern fits."),
]
OutputType = Annotated[str | None, typer.Option("--output-type", metavar="TYPE", help="Type of the output matrix.")]
EmbeddingType = Annotated[str | None, typer.Option("--embedding-type", metavar="TYPE", help="Type of the embedding.")]
Pure = Annotated[bool, typer.Option("--pure", help="The same type for all matrices.")]
Matrix = Annotated[Path | None, typer.Option("--imatrix", help="An importance matrix of this model.")]
Requantize = Annotated[bool, typer.Option("--allow-requantize", help="Convert a file that is quantised already.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what the file would be, and write nothing.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a file that is there.")]
Threads = Annotated[int | None, config.flag("threads")]
Layers = Annotated[int | None, config.flag("gpu_layers")]
Store = Annotated[str | None, config.flag("store")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="The importance matrix to write.")]
From = Annotated[Path, typer.Option("--from", help="Results of `localreason solve` (.jsonl), or a text in UTF-8.")]
Tokens = Annotated[int | None, typer.Option("--tokens", min=1, help="Read this many tokens at most; unset: all.")]


def convert(
    context: typer.Context,
    source: Source,
    target: Target,
    scheme: SchemeName,
    tensor: Tensors = None,
    output_type: OutputType = None,
    embedding_type: EmbeddingType = None,
    is_pure: Pure = False,
    imatrix: Matrix = None,
    allows_requantize: Requantize = False,
    is_dry: DryRun = False,
    is_forced: Force = False,
    threads: Threads = None,
    store: Store = None,
    is_json: Json = False,
) -> None:
    """Convert a GGUF model to another scheme. The file appears whole or not at all, and says what it was made of.

    \b
    Examples:
      localreason quant convert qwen3-f16.gguf qwen3-w8a8.gguf --scheme w8a8
      localreason quant convert qwen3-f16.gguf small.gguf --scheme q4_k_m --imatrix traces.gguf
      localreason quant convert qwen3-f16.gguf mixed.gguf --scheme q4_0 --tensor 'ffn_down=q6_k' --output-type q8_0
    """
    from ..quant.convert import check_target, disk_bytes, plan_conversion
    from ..quant.convert import convert as write
    from ..quant.request import Request

    path, n_threads = _open(context, source)
    if not is_dry:
        check_target(path, target, is_forced)
        if imatrix is not None and target.exists() and imatrix.exists() and target.samefile(imatrix):
            raise OutputError(f"{target} is the importance matrix itself; name another file")
    request = Request(scheme, _pairs(tensor or []), output_type, embedding_type, is_pure, imatrix, allows_requantize)
    plan = plan_conversion(path, request)
    for warning in plan.warnings:
        tell(warning)
    row = _row(plan, path, target)
    if is_dry:
        row["free_bytes"] = disk_bytes(target.parent) if target.parent.is_dir() else None
    else:
        with _bar("converting", lambda n: f"{n / 1e6:.0f} MB") as show:
            seconds = write(plan, target, checksum.sha256(path), is_forced, n_threads, show)
        row["seconds"] = round(seconds, 3)
    print(json.dumps(row, indent=2) if is_json else _sentence(plan, row))


def _open(context: typer.Context, model: str) -> tuple[Path, int]:
    """The file of a model, and the threads to use."""
    from ..runtime.llama import physical_cores

    settings = config.load({**context.params, "model": model, "cluster": False})
    path = build.find_model(settings, build.wiring(context).hub)
    return path, settings.settings.threads or physical_cores()


def _sentence(plan: "Plan", row: dict[str, Any]) -> str:
    """What is said of a conversion to a person."""
    types = ", ".join(f"{n} {kind}" for kind, n in plan.counts.items())
    seconds = f", {row['seconds']:.1f} s" if "seconds" in row else ""
    room, free = "", row.get("free_bytes")
    if free is not None:
        room = f"\nthe disk has {free} bytes free, {'enough' if free >= plan.n_bytes else 'too few'}"
    return (
        f"{row['target']}: {plan.scheme}, {plan.n_bytes} bytes ({plan.bits_per_weight:.2f} bits a weight), "
        f"tensors: {types}\nfrom {row['source']}: {row['source_bytes']} bytes{seconds}{room}"
    )


def _row(plan: "Plan", path: Path, target: Path) -> dict[str, Any]:
    """What is said of a conversion in JSON."""
    return {
        "source": str(path),
        "target": str(target),
        "scheme": plan.scheme,
        "source_bytes": plan.source.header.n_bytes,
        "bytes": plan.n_bytes,
        "bits_per_weight": round(plan.bits_per_weight, 3),
        "tensors": plan.counts,
        "warnings": list(plan.warnings),
    }


def imatrix(
    context: typer.Context,
    model: Source,
    output: Output,
    texts: From,
    tokens: Tokens = None,
    is_forced: Force = False,
    threads: Threads = None,
    gpu_layers: Layers = None,
    store: Store = None,
    is_json: Json = False,
) -> None:
    """Make an importance matrix of a model from its own reasoning traces, or from a text.

    It tells `quant convert --imatrix` which columns of each matrix must be kept precise. Ctrl-C ends the reading; the
    matrix is of what was read.

    \b
    Examples:
      localreason quant imatrix qwen3-f16.gguf -o traces.gguf --from results.jsonl
      localreason quant imatrix qwen3-f16.gguf -o wiki.gguf --from wiki.txt --tokens 50000
    """
    from ..quant.collect import collect
    from ..quant.imatrix import write_importance
    from ..quant.traces import read_documents

    path, n_threads = _open(context, model)
    n_layers = config.load(context.params).settings.gpu_layers
    _check_output(output, path, texts, is_forced)
    started = time.monotonic()
    with _bar("reading", lambda n: f"{n} tokens") as show:
        documents = read_documents(texts)
        importance = collect(path, documents, texts.name, tokens, n_threads, n_layers, lambda n: show(n, tokens, ""))
    write_importance(importance, output)
    row = {"model": str(path), "imatrix": str(output), "from": str(texts), "tokens": importance.n_tokens}
    row |= {"chunks": importance.n_chunks, "entries": len(importance.entries)}
    row |= {"seconds": round(time.monotonic() - started, 3)}
    said = f"{output}: {row['entries']} tensors from {row['tokens']} tokens in {row['seconds']:.1f} s"
    print(json.dumps(row, indent=2) if is_json else said)
    if importance.n_chunks < _FEW_CHUNKS:
        tell(
            f"{importance.n_chunks} chunk{'s' if importance.n_chunks > 1 else ''} of text are few for an importance "
            f"matrix, which then fits these texts only; give {_FEW_CHUNKS} or more, better a hundred"
        )
    if importance.reached_share < 1:
        missed = f"{1 - importance.reached_share:.1%} of the matrices"
        tell(f"{missed} are of experts that saw no token and count evenly; give more text")
    if not importance.is_whole:
        tell(f"interrupted: {output} is of the first {importance.n_tokens} tokens")
        raise KeyboardInterrupt


def _pairs(texts: list[str]) -> tuple[tuple[str, str], ...]:
    """Pattern and type of each `--tensor`. Raises InputError."""
    pairs = []
    for text in texts:
        pattern, _, kind = text.rpartition("=")
        if not pattern or not kind:
            raise InputError(f"--tensor {text!r} is no PATTERN=TYPE; write it as in ffn_down=q6_k")
        pairs.append((pattern, kind))
    return tuple(pairs)


def _check_output(output: Path, model: Path, texts: Path, is_forced: bool) -> None:
    """Refuse, before the work, a file that cannot be written. Raises OutputError."""
    from ..quant.convert import check_target

    check_target(model, output, is_forced)
    if output.exists() and texts.exists() and output.samefile(texts):
        raise OutputError(f"{output} is what is read; name another file")


@contextmanager
def _bar(word: str, form: Callable[[int], str]) -> Iterator[Callable[[int, int | None, str], None]]:
    """A progress bar on standard error where that is a terminal: done, in all where that is known, what is next."""
    if not sys.stderr.isatty():
        yield lambda done, total, name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}", markup=False))
    with Progress(*columns, TimeRemainingColumn(), console=Console(file=sys.stderr), transient=True) as progress:
        task = progress.add_task(word, total=None, state="")
        yield lambda done, total, name: progress.update(
            task, completed=done, total=total, state=f"{form(done)}  {name}".rstrip()
        )
