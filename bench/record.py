"""What every script here writes beside its numbers: the command, the commit, and what `localreason bench` writes."""

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

from localreason.cli.benchmark import machine


def describe_run(model: Path) -> dict[str, object]:
    with model.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {**describe_command(), **machine.describe_run(model, sha256)}


def write(record: dict[str, object], out: Path | None) -> None:
    """Into a file if there is to be one, and as the last line."""
    if out:
        out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


def describe_command() -> dict[str, object]:
    """The command line without folders, and the commit."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    arguments = [Path(argument).name if "/" in argument else argument for argument in sys.argv]
    return {"command": "python bench/" + shlex.join(arguments), "commit": commit.stdout.strip()}
