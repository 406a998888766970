"""What computes on this machine, and in how many bits it multiplies: activations are often packed for integer kernels.

Read from the sources of llama.cpp 0.3.36: the CPU's dot products of a packed type take activations of 8 bits (Q8_0,
Q8_1 or Q8_K), and so do the kernels of CUDA, ROCm and SYCL; Metal unpacks the weights and multiplies in 16 bits;
Vulkan does either, by what the driver offers.
"""

import ctypes
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..runtime import native
from .schemes import Scheme

_FEATURE = re.compile(r"(\w+) = [1-9]")
_CPU, _GPU_TYPES = 0, (1, 2)
"""ggml's kinds of devices; integrated GPUs are a kind of their own."""
_PACKING = ("CPU", "CUDA", "ROCm", "HIP", "MUSA", "SYCL", "CANN")
_EITHER = ("Vulkan",)


@dataclass(frozen=True, slots=True)
class Backend:
    """A device of ggml: its name such as CUDA0, and ggml's name of what drives it, such as CUDA."""

    name: str
    driver: str


CPU = Backend("CPU", "CPU")


@cache
def backends() -> tuple[Backend, ...]:
    """The CPU and the GPUs that this build of llama.cpp can use; the CPU alone where ggml cannot be asked."""
    folder = Path(native.library().__file__ or "").parent / "lib"
    names = ("libggml.so", "libggml.dylib", "ggml.dll")
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        return (CPU,)
    registry, base = ctypes.CDLL(str(path)), native.ggml()
    registry.ggml_backend_dev_count.restype = ctypes.c_size_t
    registry.ggml_backend_dev_get.restype, registry.ggml_backend_dev_get.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    base.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    for function, result in (
        (base.ggml_backend_dev_name, ctypes.c_char_p),
        (base.ggml_backend_dev_backend_reg, ctypes.c_void_p),
        (base.ggml_backend_reg_name, ctypes.c_char_p),
    ):
        function.restype, function.argtypes = result, [ctypes.c_void_p]
    found = []
    for i in range(registry.ggml_backend_dev_count()):
        device = registry.ggml_backend_dev_get(i)
        if base.ggml_backend_dev_type(device) in (_CPU, *_GPU_TYPES):
            driver = base.ggml_backend_reg_name(base.ggml_backend_dev_backend_reg(device))
            found.append(Backend(base.ggml_backend_dev_name(device).decode(), driver.decode()))
    return tuple(found) or (CPU,)


@cache
def cpu_features() -> frozenset[str]:
    """What llama.cpp's CPU kernels make use of here, by llama.cpp's names, such as AVX2 and REPACK."""
    text = native.library().llama_print_system_info().decode("utf-8", "replace")
    _, _, listed = text.partition("CPU : ")
    return frozenset(_FEATURE.findall(listed))


def effective(scheme: Scheme, backend: Backend) -> str:
    """Bits of weights and of activations as they are multiplied, such as W4A8 for Q4_K on a CPU."""
    if scheme.is_float:
        return f"W{scheme.weight_bits}A{scheme.weight_bits}"
    if backend.driver in _EITHER:
        return f"W{scheme.weight_bits}A8 or W{scheme.weight_bits}A16"
    return f"W{scheme.weight_bits}A{8 if backend.driver in _PACKING else 16}"
