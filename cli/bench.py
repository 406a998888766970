"""`localreason bench`: prefill, decode, load time, memory, and what the controls cost."""

import contextlib
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.errors import LocalReasonError, OutputError
from . import build, checksum, config
from .say import tell

if TYPE_CHECKING:
    from ..runtime.llama import EngineOptions
    from .benchmark.measure import Sizes

app = typer.Typer(rich_markup_mode=None, add_completion=False)

_SUFFIXES = (".json", ".md", ".csv", ".svg", ".png")
Lengths = Annotated[str, typer.Option("--lengths", help="Tokens of the prompts, separated by commas.")]
Batches = Annotated[str, typer.Option("--batches", help="Sequences at once, separated by commas, ascending.")]
Tokens = Annotated[int, typer.Option("--tokens", min=2, max=1 << 16, help="Tokens that each sequence decodes.")]
Runs = Annotated[int, typer.Option("--runs", min=1, max=1000, help="Runs of each case.")]
Out = Annotated[
    list[Path] | None,
    typer.Option("-o", "--out", help="Write FILE.json, .md, .csv, or a picture as .svg or .png; may be repeated."),
]
Compare = Annotated[Path | None, typer.Option("--compare", help="An older record in JSON; ratios to it are shown.")]


@app.command()
def bench(
    context: typer.Context,
    model: Annotated[str | None, config.flag("model", "-m", "--model")] = None,
    lengths: Lengths = "32,128,512",
    batches: Batches = "1,2,4,8",
    tokens: Tokens = 64,
    runs: Runs = 5,
    out: Out = None,
    compare: Compare = None,
    threads: Annotated[int | None, config.flag("threads")] = None,
    gpu_layers: Annotated[int | None, config.flag("gpu_layers")] = None,
    cache_type: Annotated[str | None, config.flag("cache_type")] = None,
    store: Annotated[str | None, config.flag("store")] = None,
    cluster: Annotated[bool | None, config.flag("cluster", "--cluster/--no-cluster")] = None,
    peers: Annotated[list[str] | None, config.flag("peers", "--peer", show="HOST:PORT")] = None,
    windows: Annotated[str | None, config.flag("windows")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure a model on this machine: prefill and decode speed, load time, memory, each control's overhead.

    With --cluster also the ring of the home against this machine alone. Quality is the business of `localreason eval`.

    \b
    Examples:
      localreason bench -m qwen3-1.7b -o bench.json -o bench.svg
      localreason bench -m qwen3-1.7b --compare bench.json --lengths 128,1024 --batches 1,4
    """
    from .benchmark.measure import Sizes
    from .benchmark.report import as_json, as_markdown, read_record

    sizes = Sizes(tokens, runs, _numbers(lengths, "--lengths", 1 << 20), _numbers(batches, "--batches", 64))
    for path in out or ():
        if path.suffix not in _SUFFIXES or path.is_dir() or not path.parent.is_dir():
            raise OutputError(
                f"{path} cannot be written: give a file in {', '.join(_SUFFIXES)} in a folder that exists"
            )
    old = read_record(compare) if compare is not None else None
    settings = config.load(context.params)
    record = _measure(settings, build.wiring(context), sizes)
    print(as_json(record, old) if is_json else as_markdown(record, old), end="", flush=True)
    failures: list[LocalReasonError] = []
    for path in out or ():  # one that cannot be written costs neither the measurement nor the others
        try:
            _write(path, record, old)
        except LocalReasonError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def _measure(settings: config.Config, wiring: build.Wiring, sizes: "Sizes") -> dict[str, Any]:
    from ..runtime.errors import OutOfMemory
    from ..runtime.llama import load, physical_cores
    from .benchmark.machine import describe_run
    from .benchmark.measure import measure, measure_ring, measure_ring_alone
    from .benchmark.report import SCHEMA

    path = build.find_model(settings, wiring.hub)
    options = _options(settings, sizes)
    cache_type = options.cache_type or "f16"
    start = time.perf_counter()
    try:
        engine, tokenizer = load(path, options)
    except OutOfMemory as error:
        if not settings.settings.cluster:
            raise
        tell(f"{error}; the ring is measured alone")
        start = time.perf_counter()
        with contextlib.closing(_open(path, options, settings, wiring)) as opened:
            found = measure_ring_alone(opened.engine, opened.tokenizer, sizes, time.perf_counter() - start)
    else:
        with engine:
            cache_type = engine.memory.cache_type
            found = measure(engine, tokenizer, sizes, time.perf_counter() - start)
            if settings.settings.cluster:
                with contextlib.closing(_open(path, options, settings, wiring)) as opened:
                    found |= measure_ring(opened.engine, engine, tokenizer, sizes)
    about = describe_run(path, checksum.sha256(path))
    threads = settings.settings.threads or physical_cores()
    about |= {"threads": threads, "gpu_layers": _gpu_layers(settings), "cache_type": cache_type}
    return {"schema": SCHEMA, **about, **_rounded(found)}


def _open(path: Path, options: "EngineOptions", settings: config.Config, wiring: build.Wiring) -> Any:
    """The model on the home's machines. Nothing is guessed: a text without end repeats itself more than answers do."""
    plain = replace(settings, settings=replace(settings.settings, guess=False))
    return wiring.open_model(path, options, plain)


def _options(settings: config.Config, sizes: "Sizes") -> "EngineOptions":
    from ..runtime.llama import EngineOptions

    chosen = settings.settings
    options = EngineOptions(
        n_context=sizes.n_context,
        n_sequences=max(sizes.batches) + 2,  # one for a probe, one for a kept prompt
        n_threads=chosen.threads,
        n_gpu_layers=chosen.gpu_layers,
        cache_type=chosen.cache_type,
    )
    return replace(options, n_busy=max(sizes.batches))


def _gpu_layers(settings: config.Config) -> int | str:
    """Layers on the GPU, as far as they fit there."""
    from ..runtime.native import library

    if not library().llama_supports_gpu_offload():
        return 0
    return "all" if settings.settings.gpu_layers is None else settings.settings.gpu_layers


def _rounded(value: Any) -> Any:
    """Figures with the digits that mean something."""
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def _numbers(text: str, option: str, most: int) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise typer.BadParameter(f"is {text!r}; give whole numbers separated by commas", param_hint=option) from error
    if not all(1 <= number <= most for number in found) or sorted(set(found)) != list(found):
        raise typer.BadParameter(f"is {text!r}; give ascending numbers from 1 to {most}", param_hint=option)
    return found


def _write(path: Path, record: dict[str, Any], old: dict[str, Any] | None) -> None:
    from .benchmark.picture import as_picture
    from .benchmark.report import as_csv, as_json, as_markdown

    forms = {".json": as_json, ".md": as_markdown, ".csv": as_csv}
    if path.suffix in forms:
        data = forms[path.suffix](record, old).encode()
    else:
        data = as_picture(record, path.suffix.removeprefix("."))
    try:
        path.write_bytes(data)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; give another --out") from error
