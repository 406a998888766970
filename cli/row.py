"""A runtime result as a row of a results file, graded where the right answer is known."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .problems import Problem
from .results import SCHEMA, Row, problem_hash

if TYPE_CHECKING:
    from ..runtime.model import Result


def make_row(
    result: "Result",
    problem: Problem,
    model: dict[str, str],
    recipe: dict[str, Any],
    trace: list[list[Any]] | None = None,
) -> Row:
    """The row of a result, with the record of its steps where one was kept."""
    return Row(
        schema=SCHEMA,
        id=problem.id,
        problem_hash=problem_hash(problem.text),
        answer=result.answer,
        text=result.text,
        thinking=result.thinking,
        correct=_grade(result, problem.answer),
        stop=result.stop,
        tokens=asdict(result.counts),
        ignored_ends=int(result.counters.get("budget", {}).get("ignored", 0)),
        suppressed_steps=int(result.counters.get("suppress", {}).get("suppressed_steps", 0)),
        counters=result.counters,
        seconds=round(result.seconds, 3),
        seed=result.seed,
        model=model,
        recipe=recipe,
        error=str(result.error) if result.error is not None else None,
        problem=problem.text,
        gold=problem.answer,
        is_unclosed=result.is_unclosed,
        trace=trace,
    )


def _grade(result: "Result", gold: str | None) -> bool | None:
    from ..runtime.answer import is_equal

    if gold is None or result.error is not None:
        return None
    return result.answer is not None and is_equal(result.answer, gold)
