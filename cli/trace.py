"""`localreason trace`: one solved problem as it came, with what each control did."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..runtime.errors import InputError

if TYPE_CHECKING:
    from rich.text import Text

    from .row import Row

app = typer.Typer(rich_markup_mode=None, add_completion=False)

_STYLES = {"sampled": "", "forced": "bold magenta", "hint": "bold blue", "probe": "yellow"}
_BRACKETS = {"sampled": ("", ""), "forced": ("«", "»"), "hint": ("‹hint: ", "›"), "probe": ("‹probe: ", "›")}


@app.command()
def trace(
    result: Annotated[Path, typer.Argument(metavar="RESULT", help="A results file written with --trace.")],
    problem: Annotated[str, typer.Argument(metavar="ID", help="The id of a problem in it.")],
    repeat: Annotated[int, typer.Option("--repeat", min=0, help="Which attempt at it.")] = 0,
    sample: Annotated[
        int | None, typer.Option("--sample", min=0, help="Which of its samples; unset: the one that won.")
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Separate the tokens by a dot.")] = False,
    is_json: Annotated[bool, typer.Option("--json", help="Print the steps as JSON.")] = False,
) -> None:
    """Show one solved problem step by step: thinking dimmed, what a control forced in «», hints and probes in ‹›.

    \b
    Examples:
      localreason trace gsm8k.eval/fast.jsonl gsm8k-0007
      localreason trace results.jsonl 3 --sample 1 --tokens
    """
    row = _find(result, problem, repeat)
    if row.trace is None:
        raise InputError(f"{result} has no steps of {problem!r}; run it again with --trace into another file")
    chosen = int(row.counters.get("search", {}).get("winner", 0)) if sample is None else sample
    steps = [step[1:] for step in row.trace if step[0] == chosen]
    if not steps:
        there = sorted({step[0] for step in row.trace})
        raise InputError(f"{problem!r} has no sample {chosen}; it has {', '.join(map(str, there)) or 'none'}")
    if is_json:
        print(json.dumps(steps, ensure_ascii=False))
        return
    _show(row, steps, tokens)


def _find(path: Path, id: str, repeat: int) -> "Row":
    from .row import read_rows

    try:
        rows = read_rows(path.read_bytes(), path)[1]
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give a results file") from error
    repeats = {row.repeat: row for row in rows if row.id == id}
    if repeat in repeats:
        return repeats[repeat]
    if repeats:
        raise InputError(f"{path} has no repeat {repeat} of {id!r}; it has {_some(map(str, sorted(repeats)))}")
    raise InputError(f"{path} has no problem {id!r}; it has {_some(row.id for row in rows)}")


def _some(names: Iterable[str]) -> str:
    """The first five of some names."""
    found = list(dict.fromkeys(names))
    return ", ".join(found[:5]) + (", ..." if len(found) > 5 else "") or "none"


def _show(row: "Row", steps: list[list[Any]], has_dots: bool) -> None:
    from rich.console import Console

    from .render import summary
    from .say import safe

    console = Console(highlight=False, soft_wrap=True)
    if row.problem:
        console.print(safe(row.problem), markup=False, style="bold")
        console.print()
    console.print(_text(steps, has_dots))
    console.print()
    for line in summary(row, 0, 0.0):
        console.print(safe(line), markup=False)
    mark = {True: "right", False: "wrong", None: "not graded"}[row.correct]
    gold = f"; the right answer is {safe(row.gold)}" if row.gold is not None else ""
    console.print(f"{mark}{gold}", markup=False)


def _text(steps: list[list[Any]], has_dots: bool) -> "Text":
    """The reply with brackets around what the model did not sample, notes on lines of their own."""
    from rich.text import Text

    from .say import safe

    shown, latest = Text(), ""
    for step in [*steps, ["end"]]:
        origin = step[3] if step[0] == "token" else ""
        if origin != latest:
            for kind, side in ((latest, 1), (origin, 0)):
                if kind:
                    shown.append(_BRACKETS[kind][side], _STYLES[kind])
            latest = origin
        elif has_dots and origin:
            shown.append("·", "dim")
        if step[0] == "token":
            style = _STYLES[origin] or ("dim" if step[2] == "think" else "")
            shown.append(safe(step[1]), style)
        elif step[0] == "note":
            start = "" if shown.plain.endswith("\n") or not shown.plain else "\n"
            shown.append(f"{start}[{safe(step[1])}: {safe(step[2])}]\n", "italic cyan")
    return shown
