"""The results file: its schema, and a writer that can be killed at any moment and goes on where it stopped.

One JSON object a line. A run that is started again keeps the rows that stand for the same id, problem text, model and
recipe, drops those that failed, and writes the rest; so no row is lost and none is there twice.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from ..runtime.errors import OutputError
from .problems import Problem

SCHEMA = 1
_START = b'{"schema": 1, "id": '
"""How each line begins: half a line that does not is none of ours and is left alone."""
_SYNC_SECONDS = 1.0


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
    """Why the reply ended: end, length, context, lost, repeating, cancelled, error."""
    tokens: dict[str, int]
    """Tokens by kind: prompt, thinking, answer (both sampled), forced, hint, probe."""
    ignored_ends: int
    """How many times the end of thinking was ignored (control budget)."""
    suppressed_steps: int
    """Steps in which reflection words were banned (control suppress)."""
    counters: dict[str, dict[str, int | float | str]]
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


def problem_hash(text: str) -> str:
    """What `Row.problem_hash` holds."""
    return hashlib.sha256(text.encode()).hexdigest()


def to_line(row: Row) -> str:
    """The row as one line of JSON, its keys in the order of the schema."""
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"


class Sink(Protocol):
    """Where finished rows go."""

    done: dict[str, Row]
    """Rows that stand already, by id."""

    def append(self, row: Row) -> None: ...
    def tick(self) -> None: ...
    def close(self) -> None: ...


class Printed:
    """Rows to standard output; nothing is kept."""

    def __init__(self) -> None:
        self.done: dict[str, Row] = {}

    def append(self, row: Row) -> None:
        print(to_line(row), end="", flush=True)

    def tick(self) -> None:
        """Nothing waits to be written."""

    def close(self) -> None:
        """Standard output stays open."""


class Results:
    """A results file opened for appending, locked against a second writer. Raises OutputError."""

    def __init__(
        self,
        path: Path,
        problems: list[Problem],
        model: dict[str, str],
        recipe: dict[str, Any],
        is_forced: bool = False,
    ) -> None:
        import filelock

        self.path = path
        self.done: dict[str, Row] = {}
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
        self.done[row.id] = row

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
        rows, n_sound = _read(data, self.path)
        self._n_bytes = n_sound
        wanted = {problem.id: problem_hash(problem.text) for problem in problems}
        if not is_forced:
            for row in rows:
                _refuse_difference(row, wanted, model, recipe, self.path)
        kept = list({row.id: row for row in rows if _is_kept(row, wanted)}.values())
        try:
            if len(kept) < len(rows):
                self._replace("".join(map(to_line, kept)).encode())
            elif n_sound < len(data):
                os.ftruncate(self._file, n_sound)
            self._n_bytes = os.lseek(self._file, 0, os.SEEK_END)
            if len(kept) == len(rows) and data[:n_sound][-1:] not in (b"", b"\n"):
                self._n_bytes += os.write(self._file, b"\n")
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self.done = {row.id: row for row in kept}

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


def _read(data: bytes, path: Path) -> tuple[list[Row], int]:
    """The rows, and how many bytes of the data are sound; raises OutputError for a file that is not ours."""
    rows: list[Row] = []
    n_sound = 0
    lines = data.splitlines(keepends=True)
    names = {item.name for item in fields(Row)}
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line)
            if value["schema"] != SCHEMA:
                raise OutputError(
                    f"{path} line {number} has schema {value['schema']}, this version writes {SCHEMA}; give another -o"
                )
            rows.append(Row(**{key: value[key] for key in names}))
        except (ValueError, KeyError, TypeError) as error:
            is_half = line.startswith(_START) or _START.startswith(line) or not line.strip(b"\0")
            if number == len(lines) and is_half and not line.endswith(b"\n"):
                break
            raise OutputError(f"{path} line {number} is not a result of ours; give another -o") from error
        n_sound += len(line)
    return rows, n_sound


def _refuse_difference(
    row: Row, wanted: Mapping[str, str], model: dict[str, str], recipe: dict[str, Any], path: Path
) -> None:
    remedy = "give another -o, or --force to go on all the same"
    if row.model["sha256"] != model["sha256"]:
        raise OutputError(f"{path} holds results of the model {row.model['name']}, not of {model['name']}; {remedy}")
    if row.recipe != recipe:
        raise OutputError(f"{path} holds results of another recipe: {_difference(row.recipe, recipe)}; {remedy}")
    if wanted.get(row.id, row.problem_hash) != row.problem_hash:
        raise OutputError(f"{path}: the text of problem {row.id!r} has changed; give another -o, or --force to redo it")


def _difference(there: Any, here: Any, name: str = "") -> str:
    """The first part in which two recipes differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            if there.get(key) != here.get(key):
                return _difference(there.get(key), here.get(key), f"{name}.{key}".strip("."))
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        for one, other in zip(there, here, strict=True):
            if one != other and one.get("control") == other.get("control"):
                return _difference(one, other, str(one.get("control")))
    return f"{name} was {_brief(there)} and is now {_brief(here)}"


def _brief(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(str(item.get("control")) for item in value) or "none"
    return json.dumps(value, ensure_ascii=False)


def _unwritable(path: Path, error: BaseException) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(f"{path} cannot be written: {reason}; free space or give another -o, finished rows are kept")
