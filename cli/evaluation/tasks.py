"""The tasks that are known by name: where they live, under what terms, and how their rows become problems.

A checksum that stands here was published by several independent parties for that revision of the file. Where none was
found, the one of the first download is kept beside the file and every later one has to be the same.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...runtime.errors import InputError
from .. import problems
from ..problems import BadRow, Problem
from .download import Source, fetch

_HF = "https://huggingface.co/datasets"
_GITHUB = "https://raw.githubusercontent.com"
_QWEN = f"{_GITHUB}/QwenLM/Qwen2.5-Math/a45202bd16f1ec06f433442dc1152d0074773465/evaluation/data"


@dataclass(frozen=True, slots=True)
class Task:
    """A public set of problems."""

    name: str
    title: str
    sources: tuple[Source, ...]
    licence: str
    n_problems: int
    rows: Callable[[Path], Iterator[dict[str, Any]]]
    """The rows of one of its files, as objects with `problem` and `answer`, perhaps `id`."""
    grader: str = "math"


@dataclass(frozen=True, slots=True)
class Loaded:
    """The problems of a task, what was wrong with others, and the checksum of what was read; `is_new` where it was
    fetched just now."""

    name: str
    sha256: str
    licence: str
    grader: str
    problems: list[Problem]
    bad: list[BadRow]
    is_new: bool = False


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_text("utf-8").split("\n"):
        if line.strip():
            yield json.loads(line)


def _questions(path: Path) -> Iterator[dict[str, Any]]:
    for row in _lines(path):
        yield {"problem": row.get("problem", row.get("question")), "answer": _plain(row["answer"])}


def _math(path: Path) -> Iterator[dict[str, Any]]:
    for row in _lines(path):
        yield {"id": row["unique_id"], "problem": row["problem"], "answer": row["answer"]}


def _svamp(path: Path) -> Iterator[dict[str, Any]]:
    for row in json.loads(path.read_text("utf-8")):
        body = row["Body"].strip()
        body += "" if body.endswith((".", "?", "!")) else "."
        yield {"id": row["ID"], "problem": f"{body} {row['Question'].strip()}", "answer": _plain(row["Answer"])}


def _plain(answer: Any) -> str:
    """A number that is whole without its decimals, and no thousands separators in the gold of GSM8K."""
    if isinstance(answer, float) and answer.is_integer():
        return str(int(answer))
    text = str(answer)
    return text.rpartition("####")[2].strip().replace(",", "") if "####" in text else text


_MAA = "; the texts of the problems belong to the MAA: evaluate with them, do not pass them on"
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task(
            "gsm8k",
            "grade-school word problems, test set",
            (
                Source(
                    "test.jsonl",
                    f"{_GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/"
                    "grade_school_math/data/test.jsonl",
                    "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
                ),
            ),
            "MIT",
            1319,
            _questions,
        ),
        Task(
            "math500",
            "500 problems of MATH",
            (
                Source(
                    "test.jsonl",
                    f"{_HF}/HuggingFaceH4/MATH-500/resolve/6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be/test.jsonl",
                    "35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
                ),
            ),
            "MIT by the authors of MATH and PRM800K; AoPS claims the texts: evaluate with them, do not pass them on",
            500,
            _math,
        ),
        Task(
            "aime24",
            "AIME 2024 I and II",
            (Source("test.jsonl", f"{_QWEN}/aime24/test.jsonl"),),
            "MIT for the compilation of Qwen2.5-Math" + _MAA,
            30,
            _questions,
        ),
        Task(
            "aime25",
            "AIME 2025 I and II",
            tuple(
                Source(
                    f"aime2025-{part}.jsonl",
                    f"{_HF}/opencompass/AIME2025/resolve/a6ad95f611d72cf628a80b58bd0432ef6638f958/aime2025-{part}.jsonl",
                    sha256,
                )
                for part, sha256 in (
                    ("I", "b91b3c96f05d9635d2a0692b124ebe023c1ff59cb19c074275e6c4b349d0659e"),
                    ("II", "16a2dcfbbf9db1b11f8a69a3ba5e4cac73e3641b19a37e2307e9c12240bbed5e"),
                )
            ),
            "see opencompass/AIME2025" + _MAA,
            30,
            _questions,
        ),
        Task(
            "amc23",
            "AMC 12A and 12B of 2023, with whole numbers as answers",
            (Source("test.jsonl", f"{_QWEN}/amc23/test.jsonl"),),
            "MIT for the compilation of Qwen2.5-Math" + _MAA,
            40,
            _questions,
        ),
        Task(
            "svamp",
            "word problems with one step and distracting numbers",
            (
                Source(
                    "SVAMP.json",
                    f"{_GITHUB}/arkilpatel/SVAMP/78e727689e1c1bebfc4be39c446898e8e10b0518/SVAMP.json",
                    "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
                ),
            ),
            "MIT",
            1000,
            _svamp,
        ),
    )
}


def load_task(
    argument: str,
    folder: Path,
    data: Path | None = None,
    limit: int | None = None,
    tasks: Mapping[str, Task] = TASKS,
) -> Loaded:
    """The first problems of a task by name, fetched into `folder` where it is not there yet; by name with its problems
    in the file `data`; or of the file that `argument` names. Raises InputError."""
    loaded = _load(argument, folder, data, tasks.get(argument), ", ".join(tasks))
    return replace(loaded, problems=loaded.problems[:limit])


def _load(argument: str, folder: Path, data: Path | None, task: Task | None, names: str) -> Loaded:
    if data is not None or task is None:
        path = data or Path(argument)
        if str(path) == "-" or not problems.is_file(str(path)):
            raise InputError(f"there is no task or file {str(path)!r}; choose one of {names}, or give a JSONL file")
        found, bad = problems.read(str(path))
        grader, licence = (task.grader, task.licence) if task else ("math", "the file's own")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return Loaded(argument if task else path.stem, digest, licence, grader, found, bad)
    is_new = not all((folder / task.name / source.name).is_file() for source in task.sources)
    paths = [fetch(source, folder / task.name, task.name) for source in task.sources]
    found, bad = _convert(task, paths)
    if len(found) != task.n_problems:
        raise InputError(
            f"{' and '.join(map(str, paths))} hold {len(found)} problems and not the {task.n_problems} of the task "
            f"{task.name}; delete them so that they are fetched again"
        )
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    return Loaded(task.name, digest, task.licence, task.grader, found, bad, is_new)


def _convert(task: Task, paths: list[Path]) -> tuple[list[Problem], list[BadRow]]:
    rows: list[str] = []
    for path in paths:
        try:
            for row in task.rows(path):
                rows.append(json.dumps({"id": f"{task.name}-{len(rows):04}", **row}))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{path} is not what the task {task.name} should be ({type(error).__name__}: {error}); "
                f"delete it so that it is fetched again"
            ) from error
    found, bad = problems.parse("\n".join(rows).encode(), task.name)
    return [replace(problem, line=number) for number, problem in enumerate(found, 1)], bad
