"""A row of a results file: its schema, how it comes of a runtime result, and how it is read again."""

import hashlib
import json
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

from ..runtime.errors import InputError
from .problems import Problem

if TYPE_CHECKING:
    from ..runtime.model import Result

SCHEMA = 1
"""A change of meaning gets a new number."""
_START = b'{"schema": 1, "id": '
_HEADER_START = b'{"schema": 1, "header": '
"""How each line begins: half a line that does not is none of ours and is left alone."""

_TOKENS = ("prompt", "thinking", "answer", "forced", "hint", "probe")
_MODEL = {"name": str, "sha256": str}
_ORIGINS = ("sampled", "forced", "hint", "probe")
_MOST = 1 << 63
"""No count, seed or time is larger; what is cannot be counted with."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a results file."""

    schema: int
    """1; a change of meaning gets a new number."""
    id: str
    """The problem's id, or the number of its line."""
    problem_hash: str
    """SHA-256 of the problem's text in UTF-8."""
    answer: str | None
    """The answer taken from `text`; null where none was found."""
    text: str
    """The visible reply."""
    thinking: str
    """The text of the thinking."""
    correct: bool | None
    """Whether `answer` equals the problem's; null where the problem has none."""
    stop: str
    """Why the reply ended: end, length, context, lost, cancelled, error."""
    tokens: dict[str, int]
    """Tokens by kind: prompt, thinking, answer (both sampled), forced, hint, probe."""
    ignored_ends: int
    """How many times the end of thinking was ignored (control budget)."""
    suppressed_steps: int
    """Steps in which reflection words were banned (control suppress)."""
    counters: dict[str, dict[str, int | float]]
    """The counters of every control, by its name."""
    seconds: float
    """From the start of the problem to its end, others in between."""
    seed: int
    """The seed of the run; a problem's samples derive theirs from it."""
    model: dict[str, str]
    """The model file's `name` and `sha256` (of its first part, where it is split)."""
    recipe: dict[str, Any]
    """What else shaped the answer: controls with all parameters, sampling, seed, limits, format."""
    error: str | None = None
    """Why the problem could not be run; null where it was. A later run tries such a row again."""
    problem: str = ""
    """The problem's text."""
    gold: str | None = None
    """The right answer, where it is known."""
    repeat: int = 0
    """Which of several attempts at the problem, each with a seed of its own."""
    is_unclosed: bool = False
    """Whether the reply ended inside the thinking."""
    wall_seconds: float = 0.0
    """Seconds since the run's row before this one; their sum is the time that the run took. Work on problems that an
    interruption broke off is in the rows that ended beside them, and again in those of the run that went on."""
    peak_bytes: int = 0
    """The most resident memory of the run so far, weights as far as they were read; 0 in rows of old."""
    trace: list[list[Any]] | None = None
    """What happened, step by step, where `--trace` asked for it; see trace.py."""

    @property
    def key(self) -> tuple[str, int]:
        """What tells the rows of a file apart."""
        return self.id, self.repeat


def n_sampled(row: Row) -> int:
    """The sampled tokens of a row, of all its samples."""
    return int(row.counters.get("search", {}).get("sampled_tokens", row.tokens["thinking"] + row.tokens["answer"]))


def problem_hash(text: str) -> str:
    """What `Row.problem_hash` holds."""
    return hashlib.sha256(text.encode()).hexdigest()


def to_line(row: Row) -> str:
    """The row as one line of JSON, its keys in the order of the schema."""
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"


_TYPES = get_type_hints(Row)


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


def read_rows(data: bytes, path: Path) -> tuple[dict[str, Any] | None, list[Row], int]:
    """The header if there is one, the rows, and how many bytes of the data are sound; half a last line is passed over.
    Raises InputError for a file that is not ours."""
    try:
        return parse_rows(data)
    except ValueError as error:
        raise InputError(f"{path} {error}; give a results file of `localreason`") from error


def parse_rows(data: bytes) -> tuple[dict[str, Any] | None, list[Row], int]:
    """What `read_rows` gives. Raises ValueError, which tells the line and what it is not."""
    header: dict[str, Any] | None = None
    rows: list[Row] = []
    n_sound = 0
    lines = data.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            schema = value["schema"]
            if schema == SCHEMA:
                json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # what we could not write is not ours
                if number == 1 and "header" in value:
                    header = _header(value["header"])
                else:
                    rows.append(_row(value))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            is_ours = any(line.startswith(start) or start.startswith(line) for start in (_START, _HEADER_START))
            is_half = is_ours or not line.strip(b"\0")
            if number == len(lines) and is_half and not line.endswith(b"\n"):
                break
            raise ValueError(f"line {number} is not a result of ours") from error
        if schema != SCHEMA:
            raise ValueError(f"line {number} has schema {schema!r}, and this version knows {SCHEMA}")
        n_sound += len(line)
    return header, rows, n_sound


def _header(value: Any) -> dict[str, Any]:
    """Raises KeyError and TypeError for what is no header."""
    kinds = {"model": dict[str, str], "recipe": dict[str, Any]}
    others = {"configuration": str, "task": dict[str, Any], "grader": str, "versions": dict[str, str]}
    if not _is_a(value, dict[str, Any]):
        raise TypeError("a header is an object")
    _check(value, kinds | {name: kind for name, kind in others.items() if name in value})
    _check(value["model"], _MODEL)
    return value


def _row(value: dict[str, Any]) -> Row:
    """Raises KeyError and TypeError for what is no row; fields that came later may be missing."""
    names = [item.name for item in fields(Row) if item.default is MISSING or item.name in value]
    row = Row(**{name: value[name] for name in names})
    _check({name: getattr(row, name) for name in _TYPES}, _TYPES)
    _check(row.model, _MODEL)
    _check(row.tokens, dict.fromkeys(_TOKENS, int))
    _check(row.counters.get("search", {}), dict.fromkeys(row.counters.get("search", {}), int))
    if not all(_is_step(step) for step in row.trace or ()):
        raise TypeError("a step of the trace is none of ours")
    return row


def _check(values: dict[str, Any], kinds: dict[str, Any]) -> None:
    """Raises KeyError and TypeError where a value is not of its kind, or too large to count with."""
    for name, kind in kinds.items():
        value = values[name]
        if not _is_a(value, kind) or (isinstance(value, int | float) and abs(value) > _MOST):
            raise TypeError(f"{name} is not of {kind}")


def _is_a(value: Any, kind: Any) -> bool:
    """True where a value of JSON is of an annotated kind; a boolean is no number, a whole number may be a float."""
    parts = get_args(kind)
    if kind is Any:
        return True
    if isinstance(kind, UnionType):
        return any(_is_a(value, part) for part in parts)
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, parts[0]) for item in value)
    if get_origin(kind) is dict:
        return isinstance(value, dict) and all(_is_a(item, parts[1]) for item in value.values())
    return type(value) is kind or (kind is float and type(value) is int)


def _is_step(step: list[Any]) -> bool:
    """True for a step as trace.py keeps it."""
    sample, kind, *texts = step if len(step) > 2 else (None, None)
    if type(sample) is not int or not all(isinstance(text, str) for text in texts):
        return False
    return (kind == "note" and len(texts) == 2) or (kind == "token" and len(texts) == 3 and texts[2] in _ORIGINS)
