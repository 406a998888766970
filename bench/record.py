"""What every benchmark writes beside its numbers: commit, file, versions, machine."""

import hashlib
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import psutil


def describe_run(model: Path) -> dict[str, object]:
    with model.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    arguments = [Path(argument).name if "/" in argument else argument for argument in sys.argv]
    return {
        "command": "python bench/" + shlex.join(arguments),
        "commit": commit.stdout.strip(),
        "model": model.name,
        "sha256": sha256,
        "versions": {name: version(name) for name in ("localreason", "llama-cpp-python", "numpy")},
        "python": platform.python_version(),
        "machine": {"cpu": platform.machine(), "cores": psutil.cpu_count(logical=False), "system": platform.system()},
    }
