"""`localreason quant inspect`: what a model file holds, how it will run here, and what is wrong with it."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from . import build, config
from .say import safe
from .store import find

if TYPE_CHECKING:
    from ..quant.inspect import Report
    from ..runtime.parts import Piece

File = Annotated[
    str,
    typer.Argument(
        metavar="FILE",
        help="A path, any part of a split model, a name of `localreason models list`, OWNER/REPO:QUANT or "
        "hf://OWNER/REPO/FILE.gguf of Hugging Face.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def inspect(
    context: typer.Context,
    file: File,
    cache_type: Annotated[str | None, config.flag("cache_type")] = None,
    store: Annotated[str | None, config.flag("store")] = None,
    is_json: Json = False,
) -> None:
    """Show types, sizes, precision and faults of a model file.

    Only the header is read, so a file may be larger than the memory, and a published one is not downloaded.

    \b
    Examples:
      localreason quant inspect model.gguf
      localreason quant inspect Qwen/Qwen3-8B-GGUF:Q4_K_M --json
    """
    from ..quant.inspect import inspect as report_on
    from ..runtime.devices import backends

    settings = config.load(context.params)
    report = report_on(_read(context, file, settings), settings.settings.cache_type or "f16", backends())
    if is_json:
        print(json.dumps(asdict(report), indent=2))
        return
    for line in _lines(report):
        print(line)


def _read(context: typer.Context, reference: str, settings: config.Config) -> "list[Piece]":
    from ..runtime.parts import read_local
    from .remote import PREFIX, read_published

    path = None if reference.startswith(PREFIX) else find(reference, settings.store)
    return read_local(path) if path is not None else read_published(reference, build.wiring(context).hub())


def _lines(report: "Report") -> Iterator[str]:
    """The report for a person; names out of the file cannot steer a terminal."""
    n_files = f"{report.n_files} file{'s' if report.n_files > 1 else ''}"
    yield safe(report.name)
    yield _row("architecture", f"{report.architecture}, {report.n_layers} layers, vocabulary {report.n_vocab}")
    if report.title:
        yield _row("name", " ".join(report.title.split()))
    yield _row("parameters", f"{report.n_parameters:,}")
    yield _row("context", f"{report.n_context} tokens")
    yield _row("size", f"{_size(report.n_bytes)} in {n_files}, {_size(report.weights_bytes)} of them weights")
    yield _row("scheme", f"{report.precision.scheme}, {report.bits_per_weight:.2f} bits per weight")
    for one in report.types:
        counted = f"{one.n_tensors} tensor{'s' if one.n_tensors > 1 else ''}"
        yield _row(
            "type", f"{one.name:<8} {counted:>12} {_size(one.n_bytes):>11} {one.share:>6.1%}  {one.bits:.4g} bits"
        )
    for part in report.parts:
        is_shared = part.name == "output" and report.is_output_tied
        yield _row("part", f"{part.name:<10} {_size(part.n_bytes):>22}{', and the embedding' if is_shared else ''}")
    caches = (f"{kind} {'not possible' if n is None else _size(n)}" for kind, n in report.cache_bytes.items())
    yield _row("cache", f"{', '.join(caches)} per 1,000 tokens")
    for name, schemes in report.effective.items():
        yield _row("runs as", f"{name}: {', '.join(f'{scheme} as {bits}' for scheme, bits in schemes.items())}")
    yield _row("chat template", "yes" if report.has_template else "none")
    yield _row("thinking", report.thinking_format)
    made = ", ".join(f"{key} {value}" for key, value in report.imatrix.items())
    yield _row("imatrix", made or "none named")
    if report.made_from:
        yield _row("made from", ", ".join(f"{key} {value}" for key, value in report.made_from.items()))
    for warning in report.warnings:
        yield safe(f"warning: {warning}")


def _row(name: str, text: str) -> str:
    return safe(f"{name:<14} {text}")


def _size(n_bytes: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n_bytes >= size:
            return f"{n_bytes / size:.2f} {unit}"
    return f"{n_bytes:.0f} bytes"
