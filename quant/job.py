"""A conversion as a job for the process that does it, and that process seen from outside."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import IO, Any

from ..runtime.errors import EngineError, InputError, LocalReasonError, ModelUnsupported, OutOfMemory, OutputError

_KILLED = getattr(signal, "SIGKILL", None)
_END_SECONDS = 10


@dataclass(frozen=True, slots=True)
class Job:
    """One call of `llama_model_quantize`; without a target it is a dry run. Types are ggml's numbers, `values` what
    is added to the metadata."""

    source: str
    target: str | None
    ftype: int
    n_threads: int = 1
    tensors: list[tuple[str, int]] = field(default_factory=list)
    output_type: int | None = None
    embedding_type: int | None = None
    is_pure: bool = False
    allows_requantize: bool = False
    imatrix: str | None = None
    values: dict[str, str | int | bool] = field(default_factory=dict)

    def to_line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


def run_job(job: Job) -> Iterator[dict[str, Any]]:
    """The events of a job in a process of its own, which ends with the generator.

    Raises EngineError, OutOfMemory, InputError, OutputError or ModelUnsupported where llama.cpp fails or ends.
    """
    with tempfile.TemporaryFile() as complaints:
        process = _start(complaints)
        assert process.stdin is not None
        assert process.stdout is not None
        event: dict[str, Any] = {}
        try:
            with contextlib.suppress(BrokenPipeError):  # it died at once; what follows says why
                process.stdin.write(job.to_line())
                process.stdin.flush()
            for line in process.stdout:
                event = json.loads(line)
                if "done" in event:
                    break
                yield event
            else:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_END_SECONDS)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        if not event.get("done"):
            complaints.seek(0)
            raise _failure(
                job, event.get("cause", ""), process.returncode, complaints.read().decode("utf-8", "replace")
            )


def _start(complaints: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", f"{__package__}.quantizer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=complaints,
        env={**os.environ, "GGML_NO_BACKTRACE": "1"},
        start_new_session=True,  # Ctrl-C is for whoever asked
    )


def _failure(job: Job, cause: str, code: int, complaints: str) -> LocalReasonError:
    """The error that a return code or a dead process means."""
    if job.tensors and "reg" in cause:
        patterns = ", ".join(repr(pattern) for pattern, _ in job.tensors)
        return InputError(f"a pattern is no regular expression: {cause}; correct {patterns}")
    if "iostream" in cause or "basic_ios" in cause:
        return OutputError(f"{job.target} cannot be written to its end; is the disk full?")
    if "architecture" in cause:
        return ModelUnsupported(f"{job.source} cannot be converted by this llama.cpp: {cause}; update llama-cpp-python")
    if cause:
        return EngineError(
            f"llama.cpp cannot convert {job.source}: {cause}; choose another scheme or take another file"
        )
    if _KILLED is not None and code == -_KILLED:
        return OutOfMemory(
            f"the system ended the conversion of {job.source}, most likely for want of memory; close other programs"
        )
    last = next((line.strip() for line in reversed(complaints.splitlines()) if line.strip()), "it said nothing")
    return EngineError(
        f"llama.cpp ended its process (code {code}) while it converted {job.source}: {last}; "
        f"choose another scheme or take another file"
    )
