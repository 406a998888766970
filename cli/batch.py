"""A file of problems: what is left to do is solved, several at once, and each row is saved as it comes."""

import contextlib
import json
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..runtime.errors import InputError, LocalReasonError
from . import build, checksum, problems
from .config import Config
from .interrupt import Interrupts
from .main import ExitCode
from .render import row_line
from .results import Printed, Results, Sink
from .row import Row, make_row, n_sampled
from .say import safe, tell

if TYPE_CHECKING:
    from ..runtime.model import Recipe


@dataclass(frozen=True, slots=True)
class Job:
    """What to do with a file of problems; `output` None is standard output."""

    config: Config
    recipe: "Recipe"
    wiring: build.Wiring
    output: Path | None
    limit: int | None = None
    is_json: bool = False
    is_forced: bool = False
    is_quiet: bool = False
    is_traced: bool = False


@dataclass(slots=True)
class Tally:
    """What has been done so far; `rows` are all that stand in the file for these problems."""

    n_left: int
    n_before: int
    rows: list[Row] = field(default_factory=list)
    n_bad: int = 0
    n_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def n_failed(self) -> int:
        return sum(row.error is not None for row in self.rows)

    @property
    def n_graded(self) -> int:
        return sum(row.correct is not None for row in self.rows)

    @property
    def n_right(self) -> int:
        return sum(row.correct is True for row in self.rows)

    @property
    def seconds(self) -> float:
        return max(time.perf_counter() - self.started, 1e-9)

    def accuracy(self) -> str:
        """Right of graded, or nothing where no answers are known."""
        return f"{self.n_right}/{self.n_graded} right ({self.n_right / self.n_graded:.0%})" if self.n_graded else ""


def solve_all(job: Job, argument: str) -> ExitCode:
    """Solve what is left of the problems; the exit code tells whether all went well."""
    todo, bad = _read(argument, job)
    path = build.find_model(job.config, job.wiring.hub)
    if not job.is_quiet:
        build.warn(path, job.config)
    model = {"name": path.stem, "sha256": checksum.sha256(path)}
    recipe = build.describe(job.recipe, job.config)
    sink: Sink = Printed() if job.output is None else Results(job.output, todo, model, recipe, job.is_forced)
    with contextlib.closing(sink):
        left = [problem for problem in todo if (problem.id, 0) not in sink.done]
        before = [sink.done[problem.id, 0] for problem in todo if (problem.id, 0) in sink.done]
        tally = Tally(len(left), len(before), before, len(bad))
        is_done = not left or _run(job, path, model, left, sink, tally)
    _report(job, tally)
    if not is_done:
        return ExitCode.INTERRUPTED
    return ExitCode.SOME_FAILED if bad or tally.n_failed else ExitCode.OK


def _read(argument: str, job: Job) -> tuple[list[problems.Problem], list[problems.BadRow]]:
    """The problems, bad rows reported."""
    if not problems.is_file(argument):
        return [problems.question(argument)], []
    todo, bad = problems.read(argument, f"a question must not end in {', '.join(problems.SUFFIXES)}")
    for row in bad:
        tell(f"{argument} line {row.line}: {row.reason}")
    if not todo:
        raise InputError(f"none of the {len(bad)} rows of {argument} is a problem; see the lines above")
    return todo[: job.limit], bad


def _run(job: Job, path: Path, model: dict[str, str], left: list[problems.Problem], sink: Sink, tally: Tally) -> bool:
    """False if Ctrl-C ended it. Rows of finished problems are in the sink in any case."""
    from ..runtime.events import Token
    from ..runtime.model import Answered, Question
    from ..runtime.sequence import Origin
    from .evaluation.trace import Recorder

    n_parallel = min(job.config.settings.parallel, len(left))
    by_id = {problem.id: problem for problem in left}
    questions = [Question(problem.id, problem.text) for problem in left]
    recipe = build.describe(job.recipe, job.config)
    options = build.make_options(job.config, job.recipe, n_parallel, (problem.text for problem in left))
    try:
        with (
            job.wiring.open_model(path, options, job.config) as opened,
            Interrupts() as interrupts,
            _show(job, tally) as show,
            contextlib.closing(opened.solve(questions, job.recipe, n_parallel)) as events,
        ):
            tally.started = time.perf_counter()
            recorder = Recorder.of(opened) if job.is_traced else None
            for event in events:
                sink.tick()
                if recorder is not None:
                    recorder.add(event)
                if isinstance(event, Answered):
                    steps = recorder.take(event.result.id) if recorder is not None else None
                    row = make_row(event.result, by_id[event.result.id], model, recipe, steps)
                    sink.append(row)
                    tally.rows.append(row)
                    tally.n_left -= 1
                    show(row)
                elif isinstance(event, Token) and event.origin is Origin.SAMPLED and not event.is_continued:
                    tally.n_tokens += 1
                    show(None)
                if interrupts.n_presses and tally.n_left:
                    _tell_resume(job, tally)
                    return False
    except (LocalReasonError, KeyboardInterrupt):
        _tell_resume(job, tally)
        raise
    return True


@contextlib.contextmanager
def _show(job: Job, tally: Tally) -> Iterator[Any]:
    """A function that shows a finished row, and the state of the run for None."""
    has_lines = not (job.is_quiet or job.is_json or job.output is None)

    def line(row: Row | None) -> None:
        if row is not None and has_lines:
            print(row_line(row), flush=True)

    if job.is_quiet or not sys.stderr.isatty():
        yield line
        return
    from .progress import Bar

    with Bar(tally) as bar:

        def line_and_bar(row: Row | None) -> None:
            line(row)
            bar.update(is_due=row is not None)

        yield line_and_bar


def _tell_resume(job: Job, tally: Tally) -> None:
    if job.output is not None:
        tell(
            f"{len(tally.rows)} rows are saved in {job.output}, {tally.n_left} are left; "
            f"the same command with -o {shlex.quote(str(job.output))} goes on from there"
        )


def _report(job: Job, tally: Tally) -> None:
    """The final table, or its JSON."""
    kinds: Counter[str] = Counter()
    solved = tally.rows[tally.n_before :]
    for row in solved:
        kinds.update(row.tokens)
    n_all = sum(map(n_sampled, solved))
    table: dict[str, Any] = {
        "solved": len(tally.rows) - tally.n_failed,
        "already_there": tally.n_before,
        "failed": tally.n_failed,
        "unreadable": tally.n_bad,
        "left": tally.n_left,
        "graded": tally.n_graded,
        "right": tally.n_right,
        "tokens": dict(kinds),
        "sampled_tokens": n_all,
        "tokens_per_second": round(tally.n_tokens / tally.seconds, 1),
        "seconds": round(tally.seconds, 1),
        "results": str(job.output) if job.output is not None else None,
    }
    if job.is_json and job.output is not None:
        print(json.dumps(table))
    elif not job.is_quiet:
        accuracy = tally.accuracy()
        table["tokens"] = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count) or "none"
        if n_all == kinds["thinking"] + kinds["answer"]:  # no search: there are no other samples
            del table["sampled_tokens"]
        table["right"] = accuracy or "no answers given"
        del table["graded"]
        if not tally.n_tokens:
            del table["tokens"], table["tokens_per_second"], table["seconds"]
        lines = [f"{key.replace('_', ' '):<18} {safe(str(value))}" for key, value in table.items() if value is not None]
        print("\n" + "\n".join(lines), file=sys.stderr if job.output is None else sys.stdout)
