"""The results file: a writer that can be killed at any moment and goes on where it stopped.

One JSON object a line. A run that is started again keeps the rows that stand for the same id, repeat, problem text,
model and recipe, drops those that failed, and writes the rest; so no row is lost and none is there twice. An evaluation
writes a header as the first line: `{"schema": 1, "header": {...}}`.
"""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any, Protocol

from ..runtime.errors import OutputError
from ..runtime.files import replacing
from .difference import difference
from .problems import Problem
from .row import SCHEMA, Row, parse_rows, problem_hash, to_line

_SYNC_SECONDS = 1.0
_SHARED = ("task", "machine")
"""What may change in a header while its rows still stand: more problems, and where they are run."""


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
    stands there must be the same. Where that is forced, rows of another header are made anew, since the first line
    would not be true of them; without a header each row tells its own model and recipe, and stays. Raises
    OutputError."""

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
        self.n_dropped = 0
        """Sound rows that did not stand for what is run now, and are gone."""
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
            self._tick()
        except OSError as error:
            os.ftruncate(self._file, self._n_bytes)
            raise _unwritable(self.path, error) from error
        self._n_bytes = os.lseek(self._file, 0, os.SEEK_CUR)
        self.done[row.key] = row

    def tick(self) -> None:
        """Push written rows to the disk if the last time is a second ago; to be called often."""
        try:
            self._tick()
        except OSError as error:
            raise _unwritable(self.path, error) from error

    def _tick(self) -> None:
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
        try:
            header, rows, n_sound = parse_rows(data)
        except ValueError as error:
            raise OutputError(f"{self.path} {error}; give another -o") from error
        self._n_bytes = n_sound
        if (rows or header is not None) and (header is None) != (self._header is None):
            whose = "an evaluation" if header is not None else "a run of `localreason solve`"
            raise OutputError(f"{self.path} holds results of {whose}; give another -o")
        wanted = {problem.id: problem for problem in problems}
        if not is_forced:
            for row in rows:
                self._refuse_difference(row, wanted.get(row.id), model, recipe)
            if header is not None and self._header is not None and "machine" in header:
                self._header["machine"] = header["machine"]  # that on which the run began; it may go on elsewhere
            if header is not None and header != self._header:
                raise self._other("evaluation", difference(header, self._header))
        sound = [row for row in rows if row.error is None or row.id not in wanted]
        standing = [row for row in sound if not _has_changed(row, wanted.get(row.id))]
        if self._header is not None:
            is_same = header is None or _is_same_run(header, self._header)
            standing = [row for row in standing if is_same and (row.model, row.recipe) == (model, recipe)]
        self.n_dropped = len(sound) - len(standing)
        kept = list({row.key: row for row in standing}.values())
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

    def _refuse_difference(
        self, row: Row, problem: Problem | None, model: dict[str, str], recipe: dict[str, Any]
    ) -> None:
        if row.model["sha256"] != model["sha256"]:
            theirs, ours = row.model["name"], model["name"]
            raise OutputError(f"{self.path} holds results of the model {theirs}, not of {ours}; {self._remedy}")
        if row.recipe != recipe:
            raise self._other("recipe", difference(row.recipe, recipe))
        if _has_changed(row, problem):
            what = f"the text or the right answer of problem {row.id!r}"
            raise OutputError(f"{self.path}: {what} has changed; give another -o, or --force to redo it")

    def _other(self, what: str, where: str) -> OutputError:
        return OutputError(f"{self.path} holds results of another {what}: {where}; {self._remedy}")

    @property
    def _remedy(self) -> str:
        forced = "go on all the same" if self._header is None else "run them anew"
        return f"give another -o, or --force to {forced}"

    def _replace(self, data: bytes) -> None:
        """New content in one step: a cut in between leaves the old file."""
        os.close(self._file)  # Windows replaces no file that is open
        try:
            with replacing(self.path.resolve()) as part:  # a link stays one
                part.write_bytes(data)
        finally:
            self._file = os.open(self.path, os.O_RDWR | getattr(os, "O_BINARY", 0))


def _has_changed(row: Row, problem: Problem | None) -> bool:
    """True where the row is of another text or right answer than the problem has now; rows of old may not tell it."""
    if problem is None:
        return False
    return row.problem_hash != problem_hash(problem.text) or row.gold not in (None, problem.answer)


def _is_same_run(there: dict[str, Any], here: dict[str, Any]) -> bool:
    """True where rows under one header may stand under the other."""
    return all(there.get(key) == here.get(key) for key in {**there, **here} if key not in _SHARED)


def _unwritable(path: Path, error: BaseException) -> OutputError:
    reason = getattr(error, "strerror", None) or str(error)
    return OutputError(f"{path} cannot be written: {reason}; free space or give another -o, finished rows are kept")
