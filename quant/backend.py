"""In how many bits a device multiplies: activations are often packed for integer kernels.

Read from the sources of llama.cpp 0.3.36: the CPU's dot products of a packed type take activations of 8 bits (Q8_0,
Q8_1 or Q8_K), and so do the kernels of CUDA, ROCm and SYCL; Metal unpacks the weights and multiplies in 16 bits;
Vulkan does either, by what the driver offers.
"""

from ..runtime.devices import Backend
from ..runtime.schemes import Scheme

_PACKING = ("CPU", "CUDA", "ROCm", "HIP", "MUSA", "SYCL", "CANN")
_EITHER = ("Vulkan",)


def effective(scheme: Scheme, backend: Backend) -> str:
    """Bits of weights and of activations as they are multiplied, such as W4A8 for Q4_K on a CPU."""
    if scheme.is_float:
        return f"W{scheme.weight_bits}A{scheme.weight_bits}"
    if backend.driver in _EITHER:
        return f"W{scheme.weight_bits}A8 or W{scheme.weight_bits}A16"
    return f"W{scheme.weight_bits}A{8 if backend.driver in _PACKING else 16}"
