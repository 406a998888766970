"""Results side by side: what may be compared, and the table of it."""

import html
import math
from collections.abc import Container, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...quant.paired import Difference
from ...runtime.errors import InputError
from ..row import Row, read_rows
from ..say import safe
from .statistics import Pair, Summary, pair, summarise

_FEW = 240
"""Eight repeats of AIME's 30 problems: with fewer rows accuracies are mostly noise."""


@dataclass(frozen=True, slots=True)
class Run:
    """The results of one configuration."""

    name: str
    header: dict[str, Any]
    rows: list[Row]
    summary: Summary
    pair: Pair | None
    """Against the first of those that are compared; None of that one itself."""


def load(
    arguments: Sequence[str], is_across_models: bool = False, keys: Container[tuple[str, int]] | None = None
) -> tuple[list[Run], list[str]]:
    """The runs in results files, each given as FILE or NAME=FILE, the first one the baseline; and what a reader of the
    comparison has to know. Only rows of these ids and repeats, where `keys` names them. Raises InputError for files
    that cannot be read or compared."""
    read: dict[str, tuple[dict[str, Any], list[Row]]] = {}
    for argument in arguments:
        name, header, rows = _read(argument)
        if name in read:
            raise InputError(f"two results are named {name!r}; name one, as in OTHER={argument}")
        read[name] = header, [row for row in rows if keys is None or row.key in keys]
    notes: list[str] = []
    first_name = next(iter(read))
    first_header, first_rows = read[first_name]
    runs: list[Run] = []
    for name, (header, rows) in read.items():
        if name == first_name:
            runs.append(Run(name, header, rows, summarise(rows), None))
            continue
        notes += _check((first_name, first_header, first_rows), (name, header, rows), is_across_models)
        runs.append(Run(name, header, rows, summarise(rows), pair(first_rows, rows)))
    for run in runs:
        if run.summary.n_failed:
            notes.append(f"{run.name}: {run.summary.n_failed} rows could not be run and are left out")
        if run.pair is not None and run.pair.n_problems < max(run.summary.n_problems, runs[0].summary.n_problems):
            notes.append(f"{run.name}: compared with {first_name} on the {run.pair.n_problems} problems that both ran")
    n = min(run.summary.n_rows for run in runs)
    if n < _FEW:
        notes.append(
            f"with {n} rows the standard error of an accuracy near 50 % is {50 / math.sqrt(n):.0f} points; "
            f"take more problems, or repeats by -k"
        )
    return runs, notes


def _read(argument: str) -> tuple[str, dict[str, Any], list[Row]]:
    name, equals, rest = argument.partition("=")
    is_named = bool(equals) and not Path(argument).exists()
    path = Path(rest if is_named else argument)
    try:
        header, rows, _ = read_rows(path.read_bytes(), path)
    except FileNotFoundError as error:
        raise InputError(f"there is no results file {path}; `localreason eval TASK` writes one") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error
    if not rows:
        raise InputError(f"{path} holds no rows yet; run the evaluation first")
    header = header or {"model": rows[0].model, "recipe": rows[0].recipe}
    models = {header["model"]["sha256"]: header["model"]["name"]}
    models |= {row.model["sha256"]: row.model["name"] for row in rows}
    if len(models) > 1:
        names = " and ".join(models.values())
        raise InputError(f"{path} holds rows of {names}; a file that is compared has one model, so run it anew")
    return _name(name if is_named else header.get("configuration", path.stem)), header, rows


def _name(text: str) -> str:
    """A name that a table, a page and a picture can show: printable, in one line."""
    return " ".join("".join(each if each.isprintable() else " " for each in safe(text)).split())


_Side = tuple[str, dict[str, Any], list[Row]]


def _check(baseline: _Side, other: _Side, is_across_models: bool) -> list[str]:
    """What to tell of two runs that may be compared; raises InputError for others."""
    notes = []
    (first, ours, our_rows), (name, theirs, their_rows) = baseline, other
    models = {row.model["sha256"]: row.model["name"] for row in (*our_rows, *their_rows)}
    if len(models) > 1:
        what = f"{first} and {name} are of different model files, {' and '.join(models.values())}"
        if not is_across_models:
            raise InputError(f"{what}; give --across-models to compare them all the same")
        notes.append(what)
    if ours.get("grader", "math") != theirs.get("grader", "math"):
        raise InputError(
            f"{first} was graded by {ours.get('grader')} and {name} by {theirs.get('grader')}; run one of them anew"
        )
    by_key = {row.key: row for row in our_rows}
    common = [(by_key[row.key], row) for row in their_rows if row.key in by_key]
    for one, two in common:
        if one.problem_hash != two.problem_hash:
            raise InputError(
                f"{first} and {name} have different texts for problem {one.id!r}; compare runs of one task"
            )
        if None not in (one.gold, two.gold) and one.gold != two.gold:  # rows of before tell no gold
            raise InputError(
                f"{first} and {name} have different right answers for problem {one.id!r}, {one.gold!r} and "
                f"{two.gold!r}; compare runs of one task"
            )
    if any(one.seed != two.seed for one, two in common):
        notes.append(f"{name}: other seeds than {first}, so part of the difference is chance of sampling")
    if ours.get("versions") != theirs.get("versions"):
        notes.append(f"{name}: run with other versions than {first}: {theirs.get('versions')}")
    return notes


COLUMNS = (
    "configuration",
    "n",
    "accuracy",
    "difference",
    "p",
    "sampled tokens",
    "thinking",
    "of right",
    "of wrong",
    "injected",
    "probes",
    "cut",
    "unclosed",
    "no answer",
    "s each",
    "tokens/s",
    "peak MiB",
)
"""`difference` is to the first configuration, in points; `p` is McNemar's, with several repeats that of a sign test. Of
several samples `thinking`, `cut` and `unclosed` are of the chosen one, tokens that were sampled, injected or probed of
all."""


def table(runs: Sequence[Run]) -> list[list[str]]:
    """The rows of the table under `COLUMNS`."""
    return [_cells(run) for run in runs]


def _cells(run: Run) -> list[str]:
    found = run.summary
    n = str(found.n_problems) if found.n_rows == found.n_problems else f"{found.n_problems} ({found.n_rows} rows)"
    difference, p = ("", "") if run.pair is None else (_points(run.pair.accuracy), f"{run.pair.p:.3g}")
    return [
        run.name,
        n,
        f"{found.accuracy.mean:.1%} [{found.accuracy.low:.1%}, {found.accuracy.high:.1%}]",
        difference,
        p,
        f"{found.sampled.mean:.0f} [{found.sampled.low:.0f}, {found.sampled.high:.0f}]",
        f"{found.thinking:.0f}",
        _count(found.thinking_right),
        _count(found.thinking_wrong),
        f"{found.injected:.1f}",
        f"{found.probe:.1f}",
        f"{found.cut:.0%}",
        f"{found.unclosed:.0%}",
        f"{found.no_answer:.0%}",
        f"{found.seconds:.2f}" if found.seconds else "",
        f"{found.tokens_per_second:.1f}" if found.seconds else "",
        f"{found.peak_bytes / 2**20:.0f}" if found.peak_bytes else "",
    ]


def _points(difference: Difference) -> str:
    """A difference of shares in points."""
    return f"{100 * difference.mean:+.1f} [{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"


def _count(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def as_text(rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
    """A table for a terminal, turned on its side: a column for each row."""
    lines = [[name, *(row[i] for row in rows)] for i, name in enumerate(columns)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(rows) + 1)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def as_markdown(rows: Sequence[Sequence[str]], columns: Sequence[str] = COLUMNS) -> str:
    """The same as a table of Markdown, in which all text is text."""
    lines = [_line(columns), _line(["---"] * len(columns)), *map(_line, rows)]
    return "\n".join(lines)


def as_paragraph(text: str) -> str:
    """A text as one paragraph of Markdown, without markup of its own."""
    return html.escape(" ".join(text.split()), quote=False)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(as_paragraph(cell).replace("|", "\\|") for cell in cells) + " |"


def as_values(runs: Sequence[Run], notes: Sequence[str]) -> dict[str, Any]:
    """The comparison as plain values for JSON."""
    rows = [
        {
            "name": run.name,
            "model": run.header["model"],
            "task": run.header.get("task"),
            "recipe": run.header["recipe"],
            "summary": asdict(run.summary),
            "to_baseline": None if run.pair is None else asdict(run.pair),
        }
        for run in runs
    ]
    return {"baseline": runs[0].name, "runs": rows, "notes": list(notes)}
