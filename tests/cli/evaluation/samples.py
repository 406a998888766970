"""Rows and results files for the tests of an evaluation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from localreason.cli.results import SCHEMA, Row, problem_hash, to_line

MODEL = {"name": "tiny", "sha256": "0" * 64}


def row(id: str = "p0", correct: bool | None = True, n_thinking: int = 10, **changes: Any) -> Row:
    """A row that was run; `changes` are fields of it."""
    tokens = {"prompt": 5, "thinking": n_thinking, "answer": 2, "forced": 0, "hint": 0, "probe": 0}
    found = Row(
        schema=SCHEMA,
        id=id,
        problem_hash=problem_hash(id),
        answer="7",
        text="7",
        thinking="so",
        correct=correct,
        stop="end",
        tokens=tokens,
        ignored_ends=0,
        suppressed_steps=0,
        counters={},
        seconds=1.0,
        seed=0,
        model=MODEL,
        recipe={"controls": []},
        problem=f"the problem {id}",
        gold="7",
        wall_seconds=0.5,
    )
    return replace(found, **changes)


def write(path: Path, rows: list[Row], **changes: Any) -> str:
    """A results file with a header; `changes` are fields of that."""
    header = {
        "configuration": path.stem,
        "task": {"name": "sums", "sha256": "1" * 64, "licence": "none"},
        "grader": "math",
        "model": MODEL,
        "recipe": {"controls": []},
        "versions": {"localreason": "0"},
        **changes,
    }
    lines = [json.dumps({"schema": SCHEMA, "header": header}) + "\n", *map(to_line, rows)]
    path.write_text("".join(lines))
    return str(path)
