"""The table of weight formats: ggml's tensor types, and llama.cpp's file types, which are recipes of them.

A tensor type packs a block of values into bytes. A file type such as Q4_K_M names the type of most matrices and lets
llama.cpp take more bits for those that suffer most.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from .errors import InputError


@dataclass(frozen=True, slots=True)
class Scheme:
    """A tensor type of ggml: `n_values` weights in a block of `n_bytes`."""

    name: str
    kind: int
    """ggml's number of the type."""
    n_values: int
    n_bytes: int
    weight_bits: int
    """Bits of one stored value without the scales of its block: the W of W4A16."""
    is_native: bool = False
    """True where models are trained in the type, so that no importance matrix could make it better."""

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.n_bytes / self.n_values

    @property
    def is_float(self) -> bool:
        """True for types that are stored value by value, without blocks."""
        return self.n_values == 1


_TYPES = (
    ("F32", 0, 1, 4, 32),
    ("F16", 1, 1, 2, 16),
    ("Q4_0", 2, 32, 18, 4),
    ("Q4_1", 3, 32, 20, 4),
    ("Q5_0", 6, 32, 22, 5),
    ("Q5_1", 7, 32, 24, 5),
    ("Q8_0", 8, 32, 34, 8),
    ("Q8_1", 9, 32, 36, 8),
    ("Q2_K", 10, 256, 84, 2),
    ("Q3_K", 11, 256, 110, 3),
    ("Q4_K", 12, 256, 144, 4),
    ("Q5_K", 13, 256, 176, 5),
    ("Q6_K", 14, 256, 210, 6),
    ("Q8_K", 15, 256, 292, 8),
    ("IQ2_XXS", 16, 256, 66, 2),
    ("IQ2_XS", 17, 256, 74, 2),
    ("IQ3_XXS", 18, 256, 98, 3),
    ("IQ1_S", 19, 256, 50, 1),
    ("IQ4_NL", 20, 32, 18, 4),
    ("IQ3_S", 21, 256, 110, 3),
    ("IQ2_S", 22, 256, 82, 2),
    ("IQ4_XS", 23, 256, 136, 4),
    ("I8", 24, 1, 1, 8),
    ("I16", 25, 1, 2, 16),
    ("I32", 26, 1, 4, 32),
    ("I64", 27, 1, 8, 64),
    ("F64", 28, 1, 8, 64),
    ("IQ1_M", 29, 256, 56, 1),
    ("BF16", 30, 1, 2, 16),
    ("TQ1_0", 34, 256, 54, 1),
    ("TQ2_0", 35, 256, 66, 2),
    ("MXFP4", 39, 32, 17, 4),
    ("NVFP4", 40, 64, 36, 4),
    ("Q1_0", 41, 128, 18, 1),
    ("Q2_0", 42, 64, 18, 2),
)
_NATIVE = ("TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0")

SCHEMES: Mapping[str, Scheme] = MappingProxyType({row[0]: Scheme(*row, row[0] in _NATIVE) for row in _TYPES})
"""Tensor types by name."""
KINDS: Mapping[int, Scheme] = MappingProxyType({scheme.kind: scheme for scheme in SCHEMES.values()})
"""Tensor types by ggml's number."""

# Name, llama.cpp's number, type of most matrices. Numbers that are missing here have been withdrawn by llama.cpp.
_FILE_TYPES = (
    ("F32", 0, "F32"),
    ("F16", 1, "F16"),
    ("Q4_0", 2, "Q4_0"),
    ("Q4_1", 3, "Q4_1"),
    ("Q8_0", 7, "Q8_0"),
    ("Q5_0", 8, "Q5_0"),
    ("Q5_1", 9, "Q5_1"),
    ("Q2_K", 10, "Q2_K"),
    ("Q3_K_S", 11, "Q3_K"),
    ("Q3_K_M", 12, "Q3_K"),
    ("Q3_K_L", 13, "Q3_K"),
    ("Q4_K_S", 14, "Q4_K"),
    ("Q4_K_M", 15, "Q4_K"),
    ("Q5_K_S", 16, "Q5_K"),
    ("Q5_K_M", 17, "Q5_K"),
    ("Q6_K", 18, "Q6_K"),
    ("IQ2_XXS", 19, "IQ2_XXS"),
    ("IQ2_XS", 20, "IQ2_XS"),
    ("Q2_K_S", 21, "Q2_K"),
    ("IQ3_XS", 22, "IQ3_S"),
    ("IQ3_XXS", 23, "IQ3_XXS"),
    ("IQ1_S", 24, "IQ1_S"),
    ("IQ4_NL", 25, "IQ4_NL"),
    ("IQ3_S", 26, "IQ3_S"),
    ("IQ3_M", 27, "IQ3_S"),
    ("IQ2_S", 28, "IQ2_XS"),
    ("IQ2_M", 29, "IQ2_S"),
    ("IQ4_XS", 30, "IQ4_XS"),
    ("IQ1_M", 31, "IQ1_M"),
    ("BF16", 32, "BF16"),
    ("TQ1_0", 36, "TQ1_0"),
    ("TQ2_0", 37, "TQ2_0"),
    ("MXFP4_MOE", 38, "MXFP4"),
    ("NVFP4", 39, "NVFP4"),
    ("Q1_0", 40, "Q1_0"),
    ("Q2_0", 41, "Q2_0"),
)
FTYPES: Mapping[str, int] = MappingProxyType({name: number for name, number, _ in _FILE_TYPES})
"""File types by name: llama.cpp's `llama_ftype`, which a file says in `general.file_type`."""
FILE_TYPES: Mapping[int, str] = MappingProxyType({number: name for name, number, _ in _FILE_TYPES})
MAIN_SCHEMES: Mapping[str, Scheme] = MappingProxyType({name: SCHEMES[main] for name, _, main in _FILE_TYPES})
"""File type to the tensor type that most of its matrices have."""
ALIASES: Mapping[str, str] = MappingProxyType({"w8a8": "Q8_0", "w4a16": "Q4_K_M"})
"""The paper's names: llama.cpp's integer kernels quantise activations to 8 bits, so Q8_0 is what comes near W8A8."""


def find_file_type(name: str) -> str:
    """The file type that a name or an alias means, in any case. Raises InputError naming those that exist."""
    chosen = ALIASES.get(name.lower(), name.upper())
    if chosen not in FTYPES:
        raise InputError(
            f"there is no file type {name!r}; choose one of {', '.join((*FTYPES, *ALIASES))}, such as Q4_K_M"
        )
    return chosen
