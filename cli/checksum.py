"""SHA-256 of model files, remembered by path, size and time of change."""

import contextlib
import hashlib
import json
from pathlib import Path

from ..runtime.errors import ModelNotFound
from ..runtime.files import replacing


def sha256(path: Path) -> str:
    """The file's SHA-256, read from the cache where the file has not changed since."""
    from platformdirs import user_cache_path

    path = path.resolve()
    try:
        status = path.stat()
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror}") from error
    key = [str(path), status.st_size, status.st_mtime_ns]
    name = hashlib.sha256(str(path).encode("utf-8", "surrogateescape")).hexdigest()[:32]
    entry = user_cache_path("localreason", appauthor=False) / "sha256" / f"{name}.json"
    try:
        known = json.loads(entry.read_text())
        if known["key"] == key:
            return str(known["sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there or damaged: it is only a cache
    digest = digest_file(path)
    _remember(entry, {"key": key, "sha256": digest})
    return digest


def digest_file(path: Path) -> str:
    """The file's SHA-256 as its bytes are now."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror}") from error


def _remember(entry: Path, value: dict[str, object]) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        entry.parent.mkdir(parents=True, exist_ok=True)
        with replacing(entry) as part:
            part.write_text(json.dumps(value))
