"""What a machine can do: memory and speeds, measured once in a while, and its JSON, which other machines may send."""

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ..runtime.devices import GpuMemory, gpu_memory
from ..runtime.errors import InputError, OutputError
from ..runtime.files import replacing
from ..runtime.fit import RESERVE_BYTES
from ..runtime.room import available_bytes
from ..runtime.schemes import SCHEMES
from . import probe
from .errors import ProtocolError

T = TypeVar("T")
PROFILE_SECONDS = 7 * 86400.0
"""Age at which a kept profile is measured again."""
_MOST, _LEAST_SPEED = 1e18, 1e-3
_N_TEXT, _N_TYPES, _N_JSON = 120, 64, 65536
_BITS = {name: scheme.bits for name, scheme in SCHEMES.items()}
_MAY_BE_ZERO = ("gpu_memory_bytes", "gpu_speed", "memory_bytes", "disk_sequential", "disk_random")
_COUNTS = ("memory_bytes", "gpu_memory_bytes", "n_threads")


@dataclass(frozen=True, slots=True)
class Device:
    """One machine. Speeds are bytes per second, sizes are bytes, `measured_at` is Unix seconds."""

    name: str
    memory_bytes: int
    """What weights, cache and scratch may take together."""
    weight_speeds: Mapping[str, float]
    """Per ggml type: bytes of weights per second when one token is decoded."""
    prefill_speeds: Mapping[str, float]
    """Per ggml type: bytes of weights times tokens per second when many tokens are evaluated at once."""
    memory_bandwidth: float
    row_costs: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Per ggml type: seconds of a step of `probe.ROWS` samples over those of one."""
    disk_sequential: float = 0.0
    disk_random: float = 0.0
    gpu_name: str = ""
    gpu_memory_bytes: int = 0
    gpu_speed: float = 0.0
    """Bytes of weights per second when one token is decoded on the GPU; 0 without one."""
    n_threads: int = 1
    system: str = ""
    measured_at: float = 0.0
    version: str = ""
    notes: tuple[str, ...] = field(default=())
    """What a reader should know of the numbers."""

    def __post_init__(self) -> None:
        """Raises ProtocolError for what no machine can be."""
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("weight_speeds", "prefill_speeds"):
                _check_speeds(item.name, value)
            elif item.name == "row_costs":
                _check_costs(value)
            elif item.name in ("name", "gpu_name", "system", "version"):
                _check_text(item.name, value)
            elif item.name == "notes":
                if not isinstance(value, tuple) or len(value) > _N_TYPES:
                    raise ProtocolError(f"the notes of a device are {value!r:.80}; they are a few lines of text")
                for note in value:
                    _check_text(item.name, note)
            else:
                _check_number(item.name, value)
        if not self.name:
            raise ProtocolError("a device has no name; give it one of 1 to 120 characters")

    def weight_speed(self, kind: str) -> float:
        """Decode speed for a ggml type, bytes per second; of the type nearest in bits per weight if unmeasured."""
        return nearest(self.weight_speeds, kind)

    def prefill_speed(self, kind: str) -> float:
        """Prefill speed for a ggml type, bytes times tokens per second; of the nearest type if unmeasured."""
        return nearest(self.prefill_speeds, kind)

    def row_cost(self, kind: str, n_rows: int) -> float:
        """Seconds of a step of `n_rows` samples on the CPU over those of one, for weights of a ggml type; where that
        was not measured, of one sample and of all rows in a prompt, or of as many steps if that is less."""
        if not self.row_costs:
            return min(n_rows, 1 + n_rows * self.weight_speed(kind) / self.prefill_speed(kind))
        most, costs = probe.ROWS[-1], nearest(self.row_costs, kind)
        if n_rows > most:
            return costs[-1] * n_rows / most
        return float(np.interp(n_rows, (1, *probe.ROWS), (1.0, *costs)))

    def to_json(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self), ensure_ascii=True, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Device":
        """Read untrusted JSON. Raises ProtocolError unless every field is known, finite and within bounds, and those
        without a default are there."""
        if len(text) > _N_JSON:
            raise ProtocolError(f"a device of {len(text)} characters came; {_N_JSON} are the most")
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"a device came that is not JSON: {str(error)[:80]}") from error
        names = {item.name for item in fields(cls)}
        needed = {item.name for item in fields(cls) if item.default is MISSING and item.default_factory is MISSING}
        if not isinstance(found, dict) or not needed <= set(found) <= names:
            raise ProtocolError(
                "a device came with missing or unknown fields; use one version of localreason everywhere"
            )
        if isinstance(notes := found.get("notes"), list):
            found["notes"] = tuple(notes)
        if isinstance(costs := found.get("row_costs"), dict):
            found["row_costs"] = {k: tuple(v) if isinstance(v, list) else v for k, v in costs.items()}
        return cls(**found)


def nearest(speeds: Mapping[str, T], kind: str) -> T:
    """What was measured of a type, or of the measured type nearest to it in bits per weight."""
    if kind in speeds:
        return speeds[kind]
    bits = _BITS.get(kind, 4.5)
    return speeds[min(sorted(speeds), key=lambda name: abs(_BITS[name] - bits))]


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str) or len(value) > _N_TEXT or not value.isprintable():
        raise ProtocolError(f"{name} of a device is {value!r:.80}; it must be at most {_N_TEXT} printable characters")


def _check_number(name: str, value: Any) -> None:
    is_count = name in _COUNTS
    is_number = isinstance(value, int if is_count else (int, float)) and not isinstance(value, bool)
    # Integers are compared before they become floats: a huge one would not fit.
    if not is_number or not -_MOST < value < _MOST or not math.isfinite(value) or value < 0:
        raise ProtocolError(f"{name} of a device is {str(value)[:40]!r}; it must be a number from 0 to {_MOST:g}")
    if value == 0 and name not in (*_MAY_BE_ZERO, "measured_at"):
        raise ProtocolError(f"{name} of a device is 0; it must be positive")
    if 0 < value < _LEAST_SPEED:  # bytes over such a speed may be more seconds than a float holds
        raise ProtocolError(f"{name} of a device is {value}; it must be at least {_LEAST_SPEED:g}")


def _check_speeds(name: str, value: Any) -> None:
    if not isinstance(value, Mapping) or not 1 <= len(value) <= _N_TYPES:
        raise ProtocolError(f"{name} of a device is {value!r:.80}; it must name 1 to {_N_TYPES} types")
    for kind, speed in value.items():
        if kind not in _BITS:
            raise ProtocolError(f"{name} of a device has the type {kind!r:.40}; it must be a type of ggml")
        _check_number(f"{name} {kind}", speed)


def _check_costs(value: Any) -> None:
    if not isinstance(value, Mapping) or len(value) > _N_TYPES or not set(value) <= set(_BITS):
        raise ProtocolError(f"row_costs of a device are {value!r:.80}; they must name at most {_N_TYPES} types of ggml")
    n = len(probe.ROWS)
    for kind, costs in value.items():
        if not isinstance(costs, tuple) or len(costs) != n:
            raise ProtocolError(f"row_costs {kind} of a device are {costs!r:.80}; they must be {n} numbers")
        for cost in costs:
            _check_number(f"row_costs {kind}", cost)


def measure(
    n_threads: int, types: Sequence[str], folder: Path, name: str = "", probe_bytes: int = 64 << 20, n_embd: int = 2048
) -> Device:
    """Measure this machine in some seconds, disk included, with temporary files in `folder`.

    `types` are the ggml types of weights that matter, e.g. ["Q4_K", "Q6_K"]; `probe_bytes` is the size of the weights
    and files that are timed, which should exceed the caches. Raises ModelError, EngineError, InputError, OutputError.
    """
    if not types:
        raise InputError("no type of weights was named to measure; name one such as Q4_K")
    gpu = gpu_memory()
    kind, gpu_speed = types[0], 0.0
    try:
        folder.mkdir(parents=True, exist_ok=True)
        disk = probe.disk(folder, probe_bytes)
        speeds = {kind: probe.speeds(kind, n_threads, folder, probe_bytes, n_embd) for kind in dict.fromkeys(types)}
        if gpu:
            gpu_speed = probe.gpu_speed(kind, folder, probe_bytes, n_embd)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be written to: {error}; free space, or set LOCALREASON_CLUSTER_CACHE"
        ) from error
    return Device(
        name=name or _clean(platform.node()) or "this machine",
        **_free(gpu, gpu_speed > max(speed.decode for speed in speeds.values())),
        weight_speeds={kind: speed.decode for kind, speed in speeds.items()},
        prefill_speeds={kind: speed.prefill for kind, speed in speeds.items()},
        row_costs={kind: speed.rows for kind, speed in speeds.items()},
        memory_bandwidth=probe.memory_bandwidth(probe_bytes),
        disk_sequential=disk.sequential,
        disk_random=disk.random,
        gpu_name=_gpu_name(gpu),
        gpu_speed=gpu_speed,
        n_threads=n_threads,
        system=_clean(f"{platform.system()} {platform.machine()}"),
        measured_at=time.time(),
        version=installed_version("localreason"),
        notes=() if disk.is_cold else ("disk speeds are upper bounds: this system keeps files in memory",),
    )


def _free(gpu: GpuMemory | None, is_gpu_faster: bool) -> dict[str, int]:
    """What a profile says of memory now. Of memory that both use, a GPU that is faster has what it may and the CPU what
    remains, its buffers at least; one that is slower has nothing."""
    there = max(0, available_bytes() - RESERVE_BYTES)
    on_gpu = max(0, gpu.free_bytes - RESERVE_BYTES) if gpu else 0
    if gpu and gpu.is_shared:
        on_gpu = min(on_gpu, max(0, there - RESERVE_BYTES)) if is_gpu_faster else 0
        there -= on_gpu
    return {"memory_bytes": there, "gpu_memory_bytes": on_gpu}


def _gpu_name(gpu: GpuMemory | None) -> str:
    return _clean(gpu.names) if gpu else ""


def _clean(text: str) -> str:
    return "".join(character for character in text if character.isprintable())[:_N_TEXT].strip()


def profile(
    folder: Path,
    n_threads: int,
    types: Sequence[str],
    name: str = "",
    is_fresh: bool = False,
    probe_bytes: int = 64 << 20,
    n_embd: int = 2048,
) -> Device:
    """The profile kept in `folder`, measured anew where it is a week old, of another version, thread count or GPU,
    lacks a type, or `is_fresh` is asked for. The free memory is always today's, and the name the one that is given."""
    path = folder / "device.json"
    kept, gpu = None if is_fresh else _read(path), gpu_memory()
    if (
        kept is not None
        and 0 <= time.time() - kept.measured_at < PROFILE_SECONDS
        and (kept.n_threads, kept.version) == (n_threads, installed_version("localreason"))
        and kept.gpu_name == _gpu_name(gpu)
        and set(types) <= set(kept.weight_speeds)
    ):
        return replace(kept, name=name or kept.name, **_free(gpu, kept.gpu_speed > max(kept.weight_speeds.values())))
    known = [] if kept is None else [kind for kind in kept.weight_speeds if kind not in types]
    device = measure(n_threads, [*types, *known], folder, name, probe_bytes, n_embd)
    try:
        with replacing(path) as part:
            part.write_text(device.to_json(), "utf-8")
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error}; free space, or set LOCALREASON_CLUSTER_CACHE") from error
    return device


def _read(path: Path) -> Device | None:
    """None where there is no profile, or none that this version understands."""
    try:
        return Device.from_json(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, ProtocolError):
        return None
