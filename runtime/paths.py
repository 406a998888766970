"""Paths as people write them."""

from pathlib import Path

from .errors import InputError


def expanded(text: str) -> Path:
    """The path, `~` and `~NAME` replaced by the folder that they stand for. Raises InputError for a user who is not
    known here."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{text}: no folder is known for {text.split('/')[0]}; give the whole path") from error
