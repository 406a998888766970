"""Grades in a process of its own with a deadline: neither a formula, nor a pattern, nor somebody's function that runs
for ever can hold up a run, and a crash of theirs is not ours."""

import contextlib
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from ...runtime.errors import InputError
from .graders import Grade, Reply, find_grader

_START_SECONDS = 120.0
"""A busy machine may take long to import the libraries of mathematics."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A grade, or why there is none: the reply then counts as wrong."""

    answer: str | None
    is_correct: bool
    problem: str | None = None


class Judge:
    """A grader behind a deadline of `seconds` a reply; a context manager. Raises InputError for a grader that is not
    there or that raises."""

    def __init__(self, grader: str, seconds: float = 20.0) -> None:
        self._grader = grader
        self._seconds = seconds
        self._process: Any = None
        self._pipe: Connection | None = None
        self._start()

    def __enter__(self) -> "Judge":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def check(self, gold: str) -> tuple[str | None, bool]:
        """What is wrong with a gold answer, and whether its problem cannot be graded."""
        reply = self._ask(("check", gold))
        return reply if reply is not None else (f"the gold answer {gold[:60]!r} takes too long to read", True)

    def grade(self, reply: Reply) -> Verdict:
        """The verdict on one reply."""
        found: Grade | None = self._ask(("grade", reply))
        if found is None:
            return Verdict(None, False, f"grading took more than {self._seconds:g} s")
        return Verdict(found.answer, found.is_correct)

    def _ask(self, message: tuple[str, Any]) -> Any:
        """The worker's answer, None where it came to none in time."""
        if self._pipe is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send(message)
            if self._pipe.poll(self._seconds):
                return self._unwrap(self._pipe.recv())
        except (EOFError, OSError):
            pass  # it has died, of too much memory perhaps
        self._stop()
        return None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self._grader, sys.path[:]), daemon=True)
        self._process.start()
        theirs.close()
        try:
            if not self._pipe.poll(_START_SECONDS):
                raise EOFError
            self._unwrap(self._pipe.recv())
        except (EOFError, OSError) as error:
            raise InputError(f"the grader {self._grader!r} does not start; try another") from error

    def _unwrap(self, message: tuple[bool, Any]) -> Any:
        is_good, value = message
        if not is_good:
            raise InputError(value)
        return value

    def _stop(self) -> None:
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._process = None


def _serve(pipe: Connection, name: str, path: list[str]) -> None:
    """The worker: what it is sent, it checks or grades, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's business
    sys.path[:] = path
    with contextlib.suppress(EOFError, OSError):
        try:
            grader = find_grader(name)
        except InputError as error:
            pipe.send((False, str(error)))
            return
        pipe.send((True, os.getpid()))
        while True:
            what, value = pipe.recv()
            try:
                reply: Any = (grader.check(value), grader.is_fatal) if what == "check" else grader.grade(value)
                pipe.send((True, reply))
            except Exception as error:
                pipe.send((False, f"the grader {name!r} raised {type(error).__name__}: {error}; correct it"))
