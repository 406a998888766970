"""`localreason solve`: one question, streamed, or a file of problems, resumable."""

import contextlib
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import build, checksum, config, problems
from .main import ExitCode

if TYPE_CHECKING:
    from ..runtime.model import Recipe, Result
    from ..runtime.sequence import Sequence
    from .interrupt import Interrupts
    from .render import Stream

app = typer.Typer(rich_markup_mode=None, add_completion=False)

Text = Annotated[
    str,
    typer.Argument(
        metavar="QUESTION_OR_FILE",
        help="A question; or problems: a file that exists, a name in .jsonl, .csv or .txt, or - for standard input.",
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        help="Results, one JSON object a line. For FILE.jsonl the default is FILE.results.jsonl in the current folder; "
        "for - it is standard output. With a question: handled as a file of one problem.",
    ),
]
Insist = Annotated[bool, typer.Option("--insist", help="Run controls that contradict each other.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Solve only the first problems of the file.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON: the result row, or for a file the summary.")]
Force = Annotated[bool, typer.Option("--force", help="Go on with results of another model or recipe.")]
Trace = Annotated[bool, typer.Option("--trace", help="Of a file: keep every step, for `localreason trace`.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="The answer only; for a file nothing but errors.")]


@app.command()
def solve(
    context: typer.Context,
    question: Text,
    output: Output = None,
    model: Annotated[str | None, config.flag("model", "-m", "--model")] = None,
    preset: Annotated[str | None, config.flag("preset", "-p", "--preset")] = None,
    controls: Annotated[list[str] | None, config.flag("controls", "-c", "--control", show="NAME[:K=V,...]")] = None,
    insist: Insist = False,
    parallel: Annotated[int | None, config.flag("parallel")] = None,
    seed: Annotated[int | None, config.flag("seed")] = None,
    temperature: Annotated[float | None, config.flag("temperature")] = None,
    top_p: Annotated[float | None, config.flag("top_p")] = None,
    top_k: Annotated[int | None, config.flag("top_k")] = None,
    min_p: Annotated[float | None, config.flag("min_p")] = None,
    max_tokens: Annotated[int | None, config.flag("max_tokens")] = None,
    context_tokens: Annotated[int | None, config.flag("context", "--context")] = None,
    threads: Annotated[int | None, config.flag("threads")] = None,
    gpu_layers: Annotated[int | None, config.flag("gpu_layers")] = None,
    cache_type: Annotated[str | None, config.flag("cache_type")] = None,
    format: Annotated[str | None, config.flag("format")] = None,
    think: Annotated[bool | None, config.flag("think", "--think/--no-think")] = None,
    store: Annotated[str | None, config.flag("store")] = None,
    cluster: Annotated[bool | None, config.flag("cluster", "--cluster/--no-cluster")] = None,
    peers: Annotated[list[str] | None, config.flag("peers", "--peer", show="HOST:PORT")] = None,
    windows: Annotated[str | None, config.flag("windows")] = None,
    objective: Annotated[str | None, config.flag("objective")] = None,
    rounds: Annotated[int | None, config.flag("rounds")] = None,
    row_type: Annotated[str | None, config.flag("row_type")] = None,
    disk: Annotated[bool | None, config.flag("disk", "--disk/--no-disk")] = None,
    guess: Annotated[bool | None, config.flag("guess", "--guess/--no-guess")] = None,
    limit: Limit = None,
    is_json: Json = False,
    force: Force = False,
    quiet: Quiet = False,
    trace: Trace = False,
) -> None:
    """Solve a question, or all problems of a file.

    A file's rows need the key or column `problem`; `id` and `answer` are used where they are there. An interrupted
    run goes on where it stopped when the same command is given again. While a question is thought about, Ctrl-C asks
    for the answer now, Ctrl-C again stops.

    \b
    Examples:
      localreason solve "What is 17 * 23?"
      localreason solve "..." --model qwen3-1.7b --preset careful -c budget:max=2048
      localreason solve problems.jsonl -o results.jsonl --preset fast --parallel 8
      cat problems.jsonl | localreason solve - > results.jsonl

    \b
    Exit codes: 0 done, 1 other failure, 2 usage, 3 model, 4 input, 5 output,
    6 some problems failed, 130 interrupted.
    """
    settings = config.load({**context.params, "context": context_tokens})
    recipe = build.make_recipe(settings, insist)
    wiring = build.wiring(context)
    if problems.is_file(question) or output is not None:
        from .batch import Job, solve_all

        where = _output(question, output)
        code = solve_all(Job(settings, recipe, wiring, where, limit, is_json, force, quiet, trace), question)
    else:
        code = _solve_one(settings, recipe, wiring, problems.question(question), is_json, quiet)
    raise typer.Exit(int(code))


def _output(question: str, output: Path | None) -> Path | None:
    """Where the results of a file go; None for standard output."""
    if output is not None or question == "-":
        return None if output == Path("-") else output
    return Path(f"{Path(question).stem}.results.jsonl")


def _solve_one(
    settings: config.Config,
    recipe: "Recipe",
    wiring: build.Wiring,
    problem: problems.Problem,
    is_json: bool,
    is_quiet: bool,
) -> ExitCode:
    path = build.find_model(settings, wiring.hub)
    if not is_quiet and not is_json:
        build.warn(path, settings)
    from .render import Stream, summary
    from .row import make_row, to_line

    stream = Stream(is_thinking_shown=not is_quiet)
    started = time.perf_counter()
    result, n_tokens = _ask(settings, recipe, wiring, path, problem, None if is_json else stream)
    if result is None:
        stream.end()
        stream.note("stopped")
        return ExitCode.INTERRUPTED
    if result.error is not None:
        raise result.error
    sha256 = checksum.sha256(path) if is_json else ""
    row = make_row(result, problem, {"name": path.stem, "sha256": sha256}, build.describe(recipe, settings))
    if is_json:
        print(to_line(row), end="")
        return ExitCode.OK
    if recipe.n_samples > 1:
        stream.write(row.thinking, "think")
        stream.write(row.text, "answer")
    stream.end()
    if not is_quiet:
        sys.stdout.flush()
        print("\n" + "\n".join(summary(row, n_tokens, time.perf_counter() - started)), file=sys.stderr)
    return ExitCode.OK


def _ask(
    settings: config.Config,
    recipe: "Recipe",
    wiring: build.Wiring,
    path: Path,
    problem: problems.Problem,
    stream: "Stream | None",
) -> "tuple[Result | None, int]":
    """The result, None if it was stopped, and how many tokens were sampled; shows the one sample there is."""
    from ..runtime.events import Token
    from ..runtime.model import Answered, Question
    from ..runtime.sequence import Origin
    from .interrupt import Interrupts

    result, n_tokens = None, 0
    running: dict[int, Sequence] = {}
    options = build.make_options(settings, recipe, 1, [problem.text])
    with (
        wiring.open_model(path, options, settings) as model,
        Interrupts() as interrupts,
        contextlib.closing(model.solve([Question(problem.id, problem.text)], recipe, 1)) as events,
    ):
        for event in events:
            if isinstance(event, Answered):
                result = event.result
                continue
            running[event.sequence.sample] = event.sequence
            if isinstance(event, Token):
                n_tokens += event.origin is Origin.SAMPLED and not event.is_continued
            if stream is not None and recipe.n_samples == 1:
                stream.show(event)
            if interrupts.n_presses and _is_stopped(interrupts, recipe, running, stream):
                return None, n_tokens
    return result, n_tokens


def _is_stopped(
    interrupts: "Interrupts", recipe: "Recipe", running: "dict[int, Sequence]", stream: "Stream | None"
) -> bool:
    """What Ctrl-C means: the first time, where a budget can cut the thinking, answer now; else stop."""
    thinking = [sequence for sequence in running.values() if sequence.is_thinking and sequence.finish is None]
    if any(sequence.is_hurried for sequence in running.values()):
        return interrupts.n_presses > 1
    if interrupts.n_presses > 1 or not thinking or recipe.get("budget") is None:
        return True
    for sequence in running.values():
        sequence.hurry()
    if stream is not None:
        stream.note("answering now; Ctrl-C again stops")
    return False
