"""What computes on this machine, by ggml's own count: the CPU with its features, and GPUs with their free memory."""

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import native

_FEATURE = re.compile(r"(\w+) = [1-9]")
_CPU, _GPU, _INTEGRATED = 0, 1, 2
"""ggml's kinds of devices."""
_SHARING = ("Metal", "MTL")
"""Drivers whose memory is the host's, whatever kind ggml calls their devices."""


@dataclass(frozen=True, slots=True)
class Backend:
    """A device of ggml: its name such as CUDA0, and ggml's name of what drives it, such as CUDA."""

    name: str
    driver: str


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """Free bytes of all GPUs together, and what their drivers call them. `is_shared` where they are the host's own."""

    free_bytes: int
    n_devices: int
    is_shared: bool
    names: str = ""


CPU = Backend("CPU", "CPU")


@cache
def _functions() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    """ggml's registry and ggml-base, their functions typed; None where there is no registry."""
    folder = Path(native.library().__file__ or "").parent / "lib"
    names = ("libggml.so", "libggml.dylib", "ggml.dll")
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        return None
    registry, base, sizes = ctypes.CDLL(str(path)), native.ggml(), ctypes.POINTER(ctypes.c_size_t)
    registry.ggml_backend_dev_count.restype = ctypes.c_size_t
    registry.ggml_backend_dev_get.restype, registry.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    base.ggml_backend_dev_memory.restype, base.ggml_backend_dev_memory.argtypes = None, [ctypes.c_void_p, sizes, sizes]
    for function, result in (
        (base.ggml_backend_dev_name, ctypes.c_char_p),
        (base.ggml_backend_dev_description, ctypes.c_char_p),
        (base.ggml_backend_dev_backend_reg, ctypes.c_void_p),
        (base.ggml_backend_reg_name, ctypes.c_char_p),
    ):
        function.restype, function.argtypes = result, [ctypes.c_void_p]
    return registry, base


def _devices() -> list[tuple[Any, int, Backend]]:
    """CPU and GPUs: ggml's pointer, its kind and the device."""
    functions, found = _functions(), []
    if functions is None:
        return []
    registry, base = functions
    for i in range(registry.ggml_backend_dev_count()):
        device = registry.ggml_backend_dev_get(i)
        kind = base.ggml_backend_dev_type(device)
        if kind in (_CPU, _GPU, _INTEGRATED):
            driver = base.ggml_backend_reg_name(base.ggml_backend_dev_backend_reg(device))
            found.append((device, kind, Backend(base.ggml_backend_dev_name(device).decode(), driver.decode())))
    return found


@cache
def backends() -> tuple[Backend, ...]:
    """The CPU and the GPUs that this build of llama.cpp can use; the CPU alone where ggml cannot be asked."""
    return tuple(backend for _, _, backend in _devices()) or (CPU,)


def gpu_memory() -> GpuMemory | None:
    """What is free now on the GPUs that llama.cpp would use; None where there is none."""
    functions, devices = _functions(), [one for one in _devices() if one[1] != _CPU]
    # llama.cpp leaves integrated GPUs alone where there are others.
    devices = [one for one in devices if one[1] == _GPU] or devices
    if functions is None or not devices:
        return None
    n_bytes = 0
    for device, _, _ in devices:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        functions[1].ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
        n_bytes += free.value
    is_shared = any(kind == _INTEGRATED or backend.driver in _SHARING for _, kind, backend in devices)
    names = [functions[1].ggml_backend_dev_description(device).decode("utf-8", "replace") for device, _, _ in devices]
    return GpuMemory(n_bytes, len(devices), is_shared, ", ".join(names))


@cache
def cpu_features() -> frozenset[str]:
    """What llama.cpp's CPU kernels make use of here, by llama.cpp's names, such as AVX2 and REPACK."""
    text = native.library().llama_print_system_info().decode("utf-8", "replace")
    _, _, listed = text.partition("CPU : ")
    return frozenset(_FEATURE.findall(listed))
