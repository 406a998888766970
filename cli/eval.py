"""`localreason eval`: accuracy for tokens and time of several configurations, and results side by side."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from ..runtime.errors import OutputError
from . import build, config
from .main import ExitCode

if TYPE_CHECKING:
    from .evaluation.compare import Run


class Eval(TyperGroup):
    """A group whose first command, `run`, need not be named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] != "--help":
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=Eval,
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="Compare configurations on a task. `localreason eval TASK ...` is short for `localreason eval run TASK ...`.",
)

Task = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="gsm8k, math500, aime24, aime25, amc23, svamp; or a JSONL file with `problem` and `answer`, perhaps "
        "`choices` and `id`.",
    ),
]
Presets = Annotated[
    list[str] | None, typer.Option("-p", "--preset", help="A preset, or none, as a configuration; may be repeated.")
]
Configurations = Annotated[
    list[str] | None,
    typer.Option(
        "--config",
        metavar="NAME=PRESET[+CONTROL[:K=V,...]]",
        help="A configuration of its own; may be repeated. Controls of -c are put on top of every configuration.",
    ),
]
Data = Annotated[Path | None, typer.Option("--data", help="Read the task's problems from this file.")]
GraderName = Annotated[
    str | None,
    typer.Option(
        "--grader",
        help="math, number, exact, choice, regex:PATTERN or python:MODULE:FUNCTION; unset: the task's, math for files.",
    ),
]
Template = Annotated[str, typer.Option("--template", help="What a question is put into.", show_default=True)]
Repeats = Annotated[int, typer.Option("-k", "--repeats", min=1, max=1024, help="Attempts at each problem.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Run only the first problems of the task.")]
Folder = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", help="Folder of the results, a file for each configuration; TASK.eval if not given."
    ),
]
Trace = Annotated[bool, typer.Option("--trace", help="Keep every step of each reply for `localreason trace`.")]
Out = Annotated[
    Path | None,
    typer.Option("-o", "--out", help="Folder for report.html, report.md, report.json and the plots."),
]
Across = Annotated[bool, typer.Option("--across-models", help="Compare results of different model files.")]
Plots = Annotated[bool, typer.Option("--plots/--no-plots", help="Draw plots; they need the extra eval.")]
Markdown = Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("run")
def run_task(
    context: typer.Context,
    task: Task,
    presets: Presets = None,
    configurations: Configurations = None,
    controls: Annotated[list[str] | None, config.flag("controls", "-c", "--control", show="NAME[:K=V,...]")] = None,
    data: Data = None,
    grader: GraderName = None,
    template: Template = "{problem}",
    repeats: Repeats = 1,
    limit: Limit = None,
    output: Folder = None,
    trace: Trace = False,
    model: Annotated[str | None, config.flag("model", "-m", "--model")] = None,
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
    insist: Annotated[bool, typer.Option("--insist", help="Run controls that contradict each other.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run results of another run anew.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Nothing but the table and errors.")] = False,
    is_json: Json = False,
) -> None:
    """Solve the problems of a task under each configuration: the same problems with the same seeds, in turns.

    Always told: accuracy with its interval, what was cut by a limit, not closed, without an answer, tokens of thinking
    of right and wrong replies, injected and probe tokens, seconds. The same command goes on after an interruption.

    \b
    Examples:
      localreason eval gsm8k --limit 200 --preset safe --preset fast -m qwen3-1.7b
      localreason eval math500 --config b128=safe+budget:max=128 --config vote=parallel+search:n=8 -k 4
      localreason eval mine.jsonl --grader choice --preset none --max-tokens 1024 -o mine
    """
    from .evaluation.compare import load
    from .evaluation.configuration import SEED_STEP, make_configurations
    from .evaluation.run import Plan, keys, paths, run
    from .evaluation.tasks import load_task

    settings = config.load({**context.params, "context": context_tokens})
    if "{problem}" not in template:
        raise typer.BadParameter(f"is {template!r}; write {{problem}} where the question goes", param_hint="--template")
    last, most = settings.settings.seed + (repeats - 1) * SEED_STEP, 2**63 - 1
    if last > most:
        raise typer.BadParameter(
            f"is {settings.settings.seed}; {repeats} repeats take seeds up to {last}, give at most "
            f"{most - (repeats - 1) * SEED_STEP}",
            param_hint="--seed",
        )
    chosen = make_configurations(settings, presets or (), configurations or (), insist)
    loaded = load_task(task, settings.store / ".tasks", data, limit)
    plan = Plan(
        config=settings,
        wiring=build.wiring(context),
        task=loaded,
        grader=grader or loaded.grader,
        template=template,
        configurations=chosen,
        n_repeats=repeats,
        folder=output or Path(f"{loaded.name}.eval"),
        is_traced=trace,
        is_forced=force,
        is_quiet=quiet,
    )
    code = run(plan)
    if code is not ExitCode.INTERRUPTED:
        runs, notes = load([f"{name}={path}" for name, path in paths(plan).items()], keys=keys(plan))
        _print(runs, notes, is_json, is_markdown=False)
    raise typer.Exit(int(code))


@app.command()
def compare(
    results: Annotated[
        list[str], typer.Argument(metavar="RESULT...", help="Results files, or NAME=FILE; the first is the baseline.")
    ],
    out: Out = None,
    plots: Plots = True,
    across_models: Across = False,
    markdown: Markdown = False,
    is_json: Json = False,
) -> None:
    """Compare results: accuracy with intervals, paired differences, tokens; and a report with plots.

    \b
    Examples:
      localreason eval compare gsm8k.eval/safe.jsonl gsm8k.eval/fast.jsonl -o report
      localreason eval compare q8=a/safe.jsonl q4=b/safe.jsonl --across-models --markdown
    """
    from .evaluation.compare import load

    runs, notes = load(results, across_models)
    if out is not None:
        _write(out, runs, notes, plots)
    _print(runs, notes, is_json, markdown)


def _print(runs: "list[Run]", notes: list[str], is_json: bool, is_markdown: bool) -> None:
    from .evaluation.compare import as_markdown, as_text, as_values, table
    from .say import safe

    if is_json:
        print(json.dumps(as_values(runs, notes), indent=2, allow_nan=False))
        return
    print(safe(as_markdown(table(runs)) if is_markdown else as_text(table(runs))))
    for note in notes:
        print(safe(f"note: {note}"))


def _write(folder: Path, runs: "list[Run]", notes: list[str], has_plots: bool) -> None:
    """The report in all its forms."""
    from .evaluation.compare import as_markdown, as_paragraph, as_values, table
    from .evaluation.plots import write_plots
    from .evaluation.report import page

    written = {
        "report.html": page(runs, notes, has_plots),
        "report.md": "\n\n".join([as_markdown(table(runs)), *map(as_paragraph, notes)]) + "\n",
        "report.json": json.dumps(as_values(runs, notes), indent=1, allow_nan=False) + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in written.items():
            (folder / name).write_text(text, "utf-8")
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror}; give another --out") from error
    if has_plots:
        write_plots(folder, runs)
