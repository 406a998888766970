"""Files that appear whole or not at all."""

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import psutil

_MOST_NAME_BYTES = 180
"""Of the name within a part's name; file systems hold 255."""
_MOST_DIGITS = 9
_PART = re.compile(r"\..+\.(\d+)\.[0-9a-f]{8}\.localreason-part")


@contextlib.contextmanager
def replacing(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """An empty file beside `path` to write to. Where the block ends well it is pushed to the disk and takes the place
    of `path`, which until then stays as it was; else it is removed. Raises OSError."""
    name = path.name.encode("utf-8", "surrogateescape")[:_MOST_NAME_BYTES].decode("utf-8", "ignore")
    part = path.absolute().with_name(f".{name}.{os.getpid()}.{secrets.token_hex(4)}.localreason-part")
    os.close(os.open(part, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))
    try:
        yield part
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def sweep(folder: Path) -> None:
    """Remove the parts that processes left behind which are no more."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            match = _PART.fullmatch(path.name)
            if match and len(match[1]) <= _MOST_DIGITS and not psutil.pid_exists(int(match[1])):
                path.unlink()
