"""What a benchmark writes beside its numbers: file, versions, machine. No names of hosts, people or folders."""

import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil


def describe_machine() -> dict[str, Any]:
    """The machine by kind, not by name."""
    return {
        "cpu": platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "allowed_cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else None,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.system(),
    }


def describe_run(path: Path, sha256: str) -> dict[str, Any]:
    """Model file, versions and machine."""
    return {
        "model": path.name,
        "sha256": sha256,
        "versions": {name: version(name) for name in ("localreason", "llama-cpp-python", "numpy")},
        "python": platform.python_version(),
        "machine": describe_machine(),
    }


def peak_bytes() -> int:
    """The most resident bytes of this process so far."""
    try:
        # Not ru_maxrss: on Linux that survives exec and would be the parent's.
        status = Path("/proc/self/status").read_text("ascii", "replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        memory: Any = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
