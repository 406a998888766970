"""Fetches a task's file once, checks it, and only then puts it where it is looked for."""

import hashlib
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from ...runtime.errors import InputError, OutputError
from ...runtime.files import replacing

_SILENCE_SECONDS = 30.0
_DEADLINE_SECONDS = 300.0
"""For the whole file, however slowly it drips."""
_MOST_BYTES = 64 << 20
"""No task is as large; what is larger is some other thing."""
_PIECE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Source:
    """A file of a task. Without a `sha256` that of the first download is kept beside it and holds from then on."""

    name: str
    url: str
    sha256: str | None = None


def fetch(source: Source, folder: Path, task: str, seconds: float = _DEADLINE_SECONDS) -> Path:
    """The path of the file in the folder, downloaded within `seconds` if it is not there. Raises InputError where it
    cannot be had or is not what it should be, OutputError where the folder cannot be written."""
    path = folder / source.name
    expected = source.sha256 or _remembered(path)
    try:
        if path.is_file():
            if expected is not None and _digest(path.read_bytes()) != expected:
                raise InputError(f"{path} has changed since it was fetched; delete it so that it is fetched again")
            return path
        data = _download(source, task, path, time.monotonic() + seconds)
        _check(data, source, expected, task)
        folder.mkdir(parents=True, exist_ok=True)
        _write(path.with_name(f"{source.name}.sha256"), f"{_digest(data)}  {source.name}\n".encode())
        _write(path, data)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}; free space or set --store") from error
    return path


def _remembered(path: Path) -> str | None:
    """The checksum of the first download."""
    try:
        words = path.with_name(f"{path.name}.sha256").read_text("utf-8").split()
    except (OSError, UnicodeDecodeError):
        return None
    return words[0] if words else None


def _download(source: Source, task: str, path: Path, deadline: float) -> bytes:
    request = urllib.request.Request(source.url, headers={"User-Agent": "localreason"})
    remedy = f"check the network and try again, or fetch it elsewhere and put it at {path}, or give --data FILE.jsonl"
    data = bytearray()
    try:
        with urllib.request.urlopen(request, timeout=_SILENCE_SECONDS) as response:
            while piece := response.read1(_PIECE_BYTES):  # what is there; `read` would wait for all of it
                data += piece
                if time.monotonic() > deadline:
                    raise TimeoutError(f"only {len(data)} bytes came in time")
                if len(data) > _MOST_BYTES:
                    raise InputError(f"{source.url} sends more than {_MOST_BYTES} bytes, which the task {task} is not")
            wanted = response.headers.get("Content-Length")
    except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
        reason: object = getattr(error, "reason", None) or error
        if isinstance(error, urllib.error.HTTPError):
            reason = f"HTTP {error.code}"
            error.close()
        raise InputError(f"the task {task} cannot be fetched from {source.url} ({reason}); {remedy}") from error
    if wanted is not None and wanted.isdigit() and len(data) != int(wanted):
        raise InputError(f"{source.url} broke off after {len(data)} of {wanted} bytes; {remedy}")
    return bytes(data)


def _check(data: bytes, source: Source, expected: str | None, task: str) -> None:
    found = _digest(data)
    if expected is not None and found != expected:
        what = "is known for it" if source.sha256 else "the first download had"
        raise InputError(
            f"the file {source.name} of the task {task} has the SHA-256 {found} and not {expected}, which {what}; "
            f"nothing was kept: try again later, or give --data FILE.jsonl"
        )


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with replacing(path) as part:
        part.write_bytes(data)
