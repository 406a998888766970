"""What the weights of a file are: the scheme of its layers, and that of the file they were made of. Pure."""

import math
from collections.abc import Mapping
from typing import Any

from ..runtime.header import Header
from ..runtime.memory import scheme_of, weights_bytes
from ..runtime.precision import Precision
from ..runtime.schemes import FILE_TYPES, MAIN_SCHEMES

RECORD = "localreason.convert."
"""What metadata begin with in which a converted file tells its origin."""
IMATRIX = "quantize.imatrix."
"""What metadata begin with that tell of an importance matrix."""
MAIN_SHARE = 0.5
"""Of the weights of the layers that the scheme in a file's metadata should hold."""
_SOURCE = f"{RECORD}source_scheme"


def find_precision(header: Header) -> Precision:
    """The precision of a file with tensors. Raises ModelUnsupported for unknown types of them."""
    n_parameters = sum(math.prod(entry.shape) for entry in header.tensors)
    source = header.values.get(_SOURCE)
    return Precision(
        _scheme(header), 8 * weights_bytes(header) / n_parameters, source if isinstance(source, str) else ""
    )


def source_scheme(header: Header) -> str:
    """What a file made of this one tells of it: its scheme, or that of its own source where that has fewer bits."""
    known = find_precision(header)
    return known.source_scheme if known.is_inflated else known.scheme


def has_imatrix(values: Mapping[str, Any]) -> bool:
    """True where a file tells that it was made with an importance matrix."""
    return any(key.startswith(IMATRIX) and value not in ("", 0) for key, value in values.items())


def find_file_type(values: Mapping[str, Any]) -> str | None:
    """The file's own word for its scheme, such as Q4_K_M."""
    number = values.get("general.file_type")
    return FILE_TYPES.get(number) if isinstance(number, int) and not isinstance(number, bool) else None


def layer_shares(header: Header) -> dict[str, float]:
    """Share of each type in the weights of the layers' matrices, the largest first; of all where no layer has one."""
    # The large tables at both ends often have more bits than the layers, which decide.
    matrices = [entry for entry in header.tensors if len(entry.shape) > 1]
    counted: dict[str, int] = {}
    for entry in [entry for entry in matrices if entry.name.startswith("blk.")] or matrices or header.tensors:
        name = scheme_of(entry).name
        counted[name] = counted.get(name, 0) + math.prod(entry.shape)
    total = sum(counted.values())
    return {name: n / total for name, n in sorted(counted.items(), key=lambda item: -item[1])}


def _scheme(header: Header) -> str:
    """The file's own word where most weights of the layers are of it, else the type that most of them have."""
    shares, file_type = layer_shares(header), find_file_type(header.values)
    if file_type is not None and shares.get(MAIN_SCHEMES[file_type].name, 0.0) >= MAIN_SHARE:
        return file_type
    return next(iter(shares))
