"""The results file: its schema, and a writer that can be killed at any moment and goes on where it stopped.

One JSON object a line. A run that is started again keeps the rows that stand for the same id, repeat, problem text,
model and recipe, drops those that failed, and writes the rest; so no row is lost and none is there twice. An evaluation
writes a header as the first line: `{"schema": 1, "header": {...}}`.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from ..runtime.errors import OutputError
from .difference import difference
from .problems import Problem

SCHEMA = 1
_START = b'{"schema": 1, "id": '
_HEADER_START = b'{"schema": 1, "header": '
"""How each line begins: half a line that does not is none of ours and is left alone."""
_SYNC_SECONDS = 1.0
_REMEDY = "give another -o, or --force to go on all the same"


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
    """Seconds since the run's row before this one; their sum is the time that the run took."""
    trace: list[list[Any]] | None = None
    """What happened, step by step, where `--trace` asked for it; see trace.py."""

    @property
    def key(self) -> tuple[str, int]:
        """What tells the rows of a file apart."""
        return self.id, self.repeat


def problem_hash(text: str) -> str:
    """What `Row.problem_hash` holds."""
    return hashlib.sha256(text.encode()).hexdigest()


def to_line(row: Row) -> str:
    """The row as one line of JSON, its keys in the order of the schema."""
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"


class Sink(Protocol):
    """Where finished rows go."""

    done: dict[tuple[str, int], Row]
    """Rows that stand already, by id and repeat."""

    def append(self, row: Row) -> None: ...
    def tick(self) -> None: ...
    def close(self) -> None: ...


class Printed:
    """Rows to standard output; nothing is kept."""

    def __init__(self) -> None:
        self.done: dict[tuple[str, int], Row] = {}

    def append(self, row: Row) -> None:
        print(to_line(row), end="", flush=True)

    def tick(self) -> None:
        """Nothing waits to be written."""

    def close(self) -> None:
        """Standard output stays open."""


class Results:
    """A results file opened for appending, locked against a second writer. A `header` becomes its first line, and what
    stands there must be the same. Raises OutputError."""

    def __init__(
        self,
        path: Path,
        problems: list[Problem],
        model: dict[str, str],
        recipe: dict[str, Any],
        is_forced: bool = False,
        header: dict[str, Any] | None = None,
    ) -> None:
        import filelock

        self.path = path
        self._header = None if header is None else json.loads(json.dumps(header))
        self.done: dict[tuple[str, int], Row] = {}
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is not a regular file; give another -o")
        if not path.parent.is_dir():
            raise OutputError(f"there is no folder {path.parent} to write {path.name} in; make it or give another -o")
        self._lock = filelock.FileLock(f"{path}.lock", timeout=0)
        try:
            self._lock.acquire()
        except filelock.Timeout as error:
            raise OutputError(f"another run is writing {path}; wait for it or give another -o") from error
        except (OSError, NotImplementedError) as error:
            raise _unwritable(path, error) from error
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        except OSError as error:
            self._unlock()
            raise _unwritable(path, error) from error
        self._synced, self._is_dirty = time.monotonic(), False
        try:
            self._resume(problems, model, json.loads(json.dumps(recipe)), is_forced)
        except BaseException:
            self.close()
            raise

    def append(self, row: Row) -> None:
        """Write one row; if that fails the file is as it was before."""
        line = memoryview(to_line(row).encode())
        try:
            while line:
                line = line[os.write(self._file, line) :]
            self._is_dirty = True
            self.tick()
        except OSError as error:
            os.ftruncate(self._file, self._n_bytes)
            raise _unwritable(self.path, error) from error
        self._n_bytes = os.lseek(self._file, 0, os.SEEK_CUR)
        self.done[row.key] = row

    def tick(self) -> None:
        """Push written rows to the disk if the last time is a second ago; to be called often."""
        if self._is_dirty and time.monotonic() - self._synced >= _SYNC_SECONDS:
            self._sync()

    def close(self) -> None:
        """Push all rows to the disk and let others write."""
        try:
            if self._is_dirty:
                self._sync()
        except OSError as error:
            raise _unwritable(self.path, error) from error
        finally:
            os.close(self._file)
            self._unlock()

    def _sync(self) -> None:
        os.fsync(self._file)
        self._synced, self._is_dirty = time.monotonic(), False

    def _unlock(self) -> None:
        with contextlib.suppress(OSError):  # Windows keeps open files
            Path(self._lock.lock_file).unlink(missing_ok=True)  # before the release, so that it is surely ours
        self._lock.release()

    def _resume(self, problems: list[Problem], model: dict[str, str], recipe: dict[str, Any], is_forced: bool) -> None:
        data = self.path.read_bytes()
        header, rows, n_sound = read_rows(data, self.path)
        self._n_bytes = n_sound
        wanted = {problem.id: problem_hash(problem.text) for problem in problems}
        if not is_forced:
            if (rows or header is not None) and (header is None) != (self._header is None):
                whose = "an evaluation" if header is not None else "a run of `localreason solve`"
                raise OutputError(f"{self.path} holds results of {whose}; give another -o")
            for row in rows:
                _refuse_difference(row, wanted, model, recipe, self.path)
            if header is not None and self._header is not None and "machine" in header:
                self._header["machine"] = header["machine"]  # that on which the run began; it may go on elsewhere
            if header is not None and header != self._header:
                raise _other(self.path, "evaluation", difference(header, self._header))
        kept = list({row.key: row for row in rows if _is_kept(row, wanted)}.values())
        start = "" if self._header is None else json.dumps({"schema": SCHEMA, "header": self._header}) + "\n"
        try:
            if len(kept) < len(rows) or (self._header is not None and header != self._header):
                self._replace((start + "".join(map(to_line, kept))).encode())
            elif n_sound < len(data):
                os.ftruncate(self._file, n_sound)
            self._n_bytes = os.lseek(self._file, 0, os.SEEK_END)
            if len(kept) == len(rows) and data[:n_sound][-1:] not in (b"", b"\n") and self._n_bytes == n_sound:
                self._n_bytes += os.write(self._file, b"\n")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.done = {row.key: row for row in kept}

    def _replace(self, data: bytes) -> None:
        """New content in one step: a cut in between leaves the old file."""
        part = self.path.with_name(f"{self.path.name}.part")
        with part.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.close(self._file)
        try:
            part.replace(self.path)
        finally:
            self._file = os.open(self.path, os.O_RDWR | getattr(os, "O_BINARY", 0))


def _is_kept(row: Row, wanted: Mapping[str, str]) -> bool:
    """False for rows that this run makes anew: they failed, or their problem has another text now."""
    return row.id not in wanted or (row.error is None and wanted[row.id] == row.problem_hash)


def read_rows(data: bytes, path: Path) -> tuple[dict[str, Any] | None, list[Row], int]:
    """The header if there is one, the rows, and how many bytes of the data are sound; half a last line is passed over.
    Raises OutputError for a file that is not ours."""
    header: dict[str, Any] | None = None
    rows: list[Row] = []
    n_sound = 0
    lines = data.splitlines(keepends=True)
    needed = [item.name for item in fields(Row) if item.default is MISSING]
    extra = {item.name: item.default for item in fields(Row) if item.default is not MISSING}
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if value["schema"] != SCHEMA:
                raise OutputError(
                    f"{path} line {number} has schema {value['schema']}, this version writes {SCHEMA}; give another -o"
                )
            if number == 1 and "header" in value:
                header = dict(value["header"])
            else:
                kept = {name: value.get(name, default) for name, default in extra.items()}
                rows.append(Row(**{name: value[name] for name in needed}, **kept))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            is_ours = any(line.startswith(start) or start.startswith(line) for start in (_START, _HEADER_START))
            is_half = is_ours or not line.strip(b"\0")
            if number == len(lines) and is_half and not line.endswith(b"\n"):
                break
            raise OutputError(f"{path} line {number} is not a result of ours; give another -o") from error
        n_sound += len(line)
    return header, rows, n_sound


def _refuse_difference(
    row: Row, wanted: Mapping[str, str], model: dict[str, str], recipe: dict[str, Any], path: Path
) -> None:
    if row.model["sha256"] != model["sha256"]:
        raise OutputError(f"{path} holds results of the model {row.model['name']}, not of {model['name']}; {_REMEDY}")
    if row.recipe != recipe:
        raise _other(path, "recipe", difference(row.recipe, recipe))
    if wanted.get(row.id, row.problem_hash) != row.problem_hash:
        raise OutputError(f"{path}: the text of problem {row.id!r} has changed; give another -o, or --force to redo it")


def _other(path: Path, what: str, where: str) -> OutputError:
    return OutputError(f"{path} holds results of another {what}: {where}; {_REMEDY}")


def _unwritable(path: Path, error: BaseException) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(f"{path} cannot be written: {reason}; free space or give another -o, finished rows are kept")
