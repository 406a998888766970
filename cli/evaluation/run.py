"""Runs a task under several configurations: same problems, same seeds, in turns, each into a results file of its own
that can be gone on with."""

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.errors import InputError, LocalReasonError, TemplateError
from .. import build, checksum
from ..batch import Tally
from ..benchmark.machine import describe_machine, peak_bytes
from ..config import Config
from ..interrupt import Interrupts
from ..main import ExitCode
from ..problems import BadRow, Problem
from ..render import row_line
from ..results import Results
from ..row import Row, make_row
from ..say import tell
from .configuration import SEED_STEP, Configuration
from .graders import Reply
from .judge import Judge
from .tasks import Loaded
from .trace import Recorder

if TYPE_CHECKING:
    from ...runtime.llama import EngineOptions
    from ...runtime.model import Answered

_N_ROUND = 8
"""Problems that a configuration gets at least before the next one's turn, so that a machine that becomes slower does
so for all."""
_N_REFILLS = 3
"""And this many times what is in flight: towards the end of a turn fewer and fewer are, and batches cost more."""
_N_NAMED = 5
"""So many problems are named where all have the same fault."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be run."""

    config: Config
    wiring: build.Wiring
    task: Loaded
    grader: str
    template: str
    configurations: list[Configuration]
    n_repeats: int
    folder: Path
    is_traced: bool = False
    is_forced: bool = False
    is_quiet: bool = False


def run(plan: Plan) -> ExitCode:
    """Run what is left of the plan; its results are then in `paths(plan)`. Raises InputError, OutputError and what
    opening the model raises."""
    with Judge(plan.grader) as judge:
        todo, n_bad = _usable(plan, judge)
        path = build.find_model(plan.config, plan.wiring.hub)
        if not plan.is_quiet:
            build.warn(path, plan.config)
        model = {"name": path.stem, "sha256": checksum.sha256(path)}
        with ExitStack() as stack:
            files = {
                one.name: stack.enter_context(contextlib.closing(_open(plan, one, todo, model)))
                for one in plan.configurations
            }
            wanted = [(problem.id, repeat) for problem in todo for repeat in range(plan.n_repeats)]
            before = [file.done[key] for file in files.values() for key in wanted if key in file.done]
            tally = Tally(len(wanted) * len(files) - len(before), len(before), before, n_bad)
            is_done = not tally.n_left or _Run(plan, judge, model, files, tally).solve(path, todo)
    if not is_done:
        return ExitCode.INTERRUPTED
    return ExitCode.SOME_FAILED if n_bad or tally.n_failed else ExitCode.OK


def paths(plan: Plan) -> dict[str, Path]:
    """The results file of each configuration."""
    return {one.name: plan.folder / f"{one.name}.jsonl" for one in plan.configurations}


def keys(plan: Plan) -> set[tuple[str, int]]:
    """The id and repeat of each row that the plan asks for, of a configuration; its file may hold more."""
    return {(problem.id, repeat) for problem in plan.task.problems for repeat in range(plan.n_repeats)}


def _open(plan: Plan, one: Configuration, todo: list[Problem], model: dict[str, str]) -> Results:
    with contextlib.suppress(OSError):  # which opening the file tells
        plan.folder.mkdir(parents=True, exist_ok=True)
    task, recipe = plan.task, build.describe(one.recipe, plan.config)
    header = {
        "configuration": one.name,
        "task": {"name": task.name, "sha256": task.sha256, "licence": task.licence},
        "grader": plan.grader,
        "template": plan.template,
        "model": model,
        "recipe": recipe,
        "seeds": {"first": one.recipe.seed, "step": SEED_STEP},
        "versions": {name: version(name) for name in ("localreason", "llama-cpp-python", "math-verify")},
        "machine": describe_machine(),
    }
    found = Results(paths(plan)[one.name], todo, model, recipe, plan.is_forced, header)
    if found.n_dropped:
        tell(f"{found.n_dropped} rows of {found.path} were of another run, text or right answer; they are run anew")
    return found


def _usable(plan: Plan, judge: Judge) -> tuple[list[Problem], int]:
    """The problems with a gold answer that can be graded, in the plan's template; the others are told and counted."""
    if plan.task.is_new and not plan.is_quiet:
        tell(f"the task {plan.task.name} was fetched; its terms: {plan.task.licence}")
    kept, bad = [], list(plan.task.bad)
    as_text: list[Problem] = []
    for problem in plan.task.problems:
        if problem.answer is None:
            bad.append(BadRow(problem.line, "there is no gold answer; give one in `answer`"))
            continue
        wrong, is_fatal = judge.check(problem.answer)
        if wrong and is_fatal:
            bad.append(BadRow(problem.line, wrong))
            continue
        as_text += [problem] if wrong else []
        kept.append(replace(problem, text=plan.template.replace("{problem}", problem.text)))
    for row in bad:
        tell(f"{plan.task.name} line {row.line}: {row.reason}")
    if as_text:
        some = ", ".join(f"{problem.id} in line {problem.line}" for problem in as_text[:_N_NAMED])
        more = ", ..." if len(as_text) > _N_NAMED else ""
        tell(f"{len(as_text)} gold answers are no formulas and are compared as text: {some}{more}")
    if not kept:
        raise InputError(f"none of the {len(bad)} rows of {plan.task.name} can be graded; see the lines above")
    return kept, len(bad)


class _Run:
    """A plan under way."""

    def __init__(
        self, plan: Plan, judge: Judge, model: dict[str, str], files: dict[str, Results], tally: Tally
    ) -> None:
        self._plan = plan
        self._judge = judge
        self._model = model
        self._files = files
        self._tally = tally
        self._n_solved = 0

    def solve(self, path: Path, todo: list[Problem]) -> bool:
        """False if Ctrl-C ended it; what was finished is saved in any case."""
        plan = self._plan
        n_parallel = min(plan.config.settings.parallel, len(todo))
        n_round = max(_N_ROUND, _N_REFILLS * n_parallel)
        try:
            with (
                plan.wiring.open_model(path, _options(plan, n_parallel, todo), plan.config) as opened,
                Interrupts() as interrupts,
                _show(plan, self._tally) as show,
            ):
                for first in range(0, len(todo), n_round):
                    for repeat in range(plan.n_repeats):
                        for one in plan.configurations:
                            done = self._files[one.name].done
                            left = [p for p in todo[first : first + n_round] if (p.id, repeat) not in done]
                            if left and not self._turn(opened, one, repeat, left, n_parallel, interrupts, show):
                                self._tell_resume()
                                return False
        except (LocalReasonError, KeyboardInterrupt):
            self._tell_resume()
            raise
        return True

    def _turn(
        self,
        opened: build.Solver,
        one: Configuration,
        repeat: int,
        left: list[Problem],
        n_parallel: int,
        interrupts: Interrupts,
        show: "Callable[[str, Row | None], None]",
    ) -> bool:
        """Some problems under one configuration; False if Ctrl-C ended it."""
        from ...runtime.events import Token
        from ...runtime.model import Answered, Question
        from ...runtime.sequence import Origin

        file = self._files[one.name]
        by_id = {problem.id: problem for problem in left}
        questions = [Question(problem.id, problem.text) for problem in left]
        recorder = Recorder.of(opened) if self._plan.is_traced else None
        latest = time.perf_counter()
        events = opened.solve(questions, one.repeat(repeat), min(n_parallel, len(left)))
        with contextlib.closing(events):
            for event in events:
                file.tick()
                if recorder is not None:
                    recorder.add(event)
                if isinstance(event, Answered):
                    now = time.perf_counter()
                    row = self._row(event, by_id[event.result.id], one, repeat, now - latest, recorder)
                    latest = now
                    file.append(row)
                    self._tally.rows.append(row)
                    self._tally.n_left -= 1
                    show(one.name, row)
                elif isinstance(event, Token) and event.origin is Origin.SAMPLED and not event.is_continued:
                    self._tally.n_tokens += 1
                    show(one.name, None)
                if interrupts.n_presses and self._tally.n_left:
                    return False
        return True

    def _row(
        self,
        event: "Answered",
        problem: Problem,
        one: Configuration,
        repeat: int,
        wall_seconds: float,
        recorder: Recorder | None,
    ) -> Row:
        result = event.result
        if isinstance(result.error, TemplateError) and not self._n_solved:
            raise result.error  # the model's fault, not the problem's: the others would fail alike
        self._n_solved += 1
        trace = recorder.take(result.id) if recorder is not None else None
        row = make_row(
            result, replace(problem, answer=None), self._model, build.describe(one.recipe, self._plan.config), trace
        )
        ran = {"wall_seconds": round(wall_seconds, 4), "peak_bytes": peak_bytes()}
        row = replace(row, repeat=repeat, gold=problem.answer, **ran)
        if row.error is not None:
            return row
        assert problem.answer is not None
        verdict = self._judge.grade(Reply(problem.text, result.text, problem.answer))
        if verdict.problem is not None:
            tell(f"{problem.id}: {verdict.problem}; the reply counts as wrong")
        return replace(row, answer=verdict.answer, correct=verdict.is_correct)

    def _tell_resume(self) -> None:
        tell(
            f"{len(self._tally.rows)} rows are saved in {self._plan.folder}, {self._tally.n_left} are left; the same "
            f"command with -o {shlex.quote(str(self._plan.folder))} goes on from there"
        )


def _options(plan: Plan, n_parallel: int, todo: list[Problem]) -> "EngineOptions":
    """How the file is opened so that it serves every configuration."""
    texts = [problem.text for problem in todo]
    all_options = [build.make_options(plan.config, one.recipe, n_parallel, texts) for one in plan.configurations]
    needed = [options.n_needed for options in all_options]
    return replace(
        all_options[0],
        n_sequences=max(options.n_sequences for options in all_options),
        n_needed=None if None in needed else max(n for n in needed if n is not None),
        n_busy=max(options.n_busy for options in all_options),
    )


@contextlib.contextmanager
def _show(plan: Plan, tally: Tally) -> Generator[Callable[[str, Row | None], None], None, None]:
    """A function that shows a finished row, and the state of the run for None."""
    bar: Any = None
    context: AbstractContextManager[Any] = contextlib.nullcontext()
    if sys.stderr.isatty() and not plan.is_quiet:
        from ..progress import Bar

        context = bar = Bar(tally)

    def show(name: str, row: Row | None) -> None:
        if row is not None and not plan.is_quiet:
            repeat = f"#{row.repeat}" if plan.n_repeats > 1 else ""
            print(f"{name}{repeat}  {row_line(row)}", file=sys.stderr, flush=True)
        if bar is not None:
            bar.update(is_due=row is not None)

    with context:
        yield show
