"""What a conversion is asked to make, and what is refused before llama.cpp sees it."""

import contextlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..runtime.errors import InputError, ModelUnsupported
from ..runtime.schemes import MAIN_SCHEMES, SCHEMES, find_file_type
from .gguf import ALIGNMENT, ModelFile
from .imatrix import Importance

_INTERNAL = ("Q8_1", "Q8_K", "F64", "I8", "I16", "I32", "I64")
"""Types that llama.cpp computes with and does not write."""
TYPES: Mapping[str, int] = {name: scheme.kind for name, scheme in SCHEMES.items() if name not in _INTERNAL}
"""Tensor types that can be asked for, and ggml's numbers."""
_BLIND = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
"""Types that llama.cpp makes with an importance matrix only."""
_ASSERTED = ("IQ2_XXS", "IQ2_XS", "IQ1_S")
"""Those of them that end its process without one, in tensors where it does not look."""
_ENDS = ("token_embd.weight", "per_layer_token_embd.weight", "output.weight")
LONGEST_VALUE = 127
"""Bytes of a string that llama.cpp takes into the metadata."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the new file is to be: a file type of `schemes.py`, types of single tensors by regular expression (the
    first that fits counts), of the output matrix and of the embedding. `is_pure` gives all the same type."""

    scheme: str
    tensors: tuple[tuple[str, str], ...] = ()
    output_type: str | None = None
    embedding_type: str | None = None
    is_pure: bool = False
    imatrix: Path | None = None
    allows_requantize: bool = False


def find_type(name: str) -> int:
    """ggml's number of a tensor type that can be written, in any case. Raises InputError naming those that exist."""
    if name.upper() not in TYPES:
        raise InputError(f"there is no tensor type {name!r} to convert to; choose one of {', '.join(TYPES)}")
    return TYPES[name.upper()]


def check_source(file: ModelFile, request: Request) -> None:
    """Refuse files that must not or cannot be converted, and patterns that mean nothing in them.

    Raises ModelUnsupported, InputError.
    """
    if len(file.files) > 1:
        raise ModelUnsupported(f"{file.path} is one of several parts; join them with `llama-gguf-split --merge`")
    alignment = file.header.values.get("general.alignment", ALIGNMENT)
    if alignment != ALIGNMENT:
        raise ModelUnsupported(f"{file.path} is aligned to {alignment} bytes; llama.cpp quantises files aligned to 32")
    types = Counter(tensor.type_name for tensor in file.tensors.values() if not SCHEMES[tensor.type_name].is_float)
    if types and not request.allows_requantize:
        kind, n = types.most_common(1)[0]
        raise ModelUnsupported(
            f"{file.path} is quantised already ({n} tensors of {kind}), which would lose twice; "
            f"take the F16 file, or give --allow-requantize"
        )
    if request.tensors and SCHEMES.get(file_type := find_file_type(request.scheme), SCHEMES["Q8_0"]).is_float:
        raise InputError(
            f"types of single tensors go with quantised schemes only, not with {file_type}; leave them out"
        )
    for pattern, kind in request.tensors:
        find_type(kind)
        if len(f"{pattern}={kind}".encode()) > LONGEST_VALUE:
            raise InputError(f"the pattern {pattern!r} is longer than {LONGEST_VALUE} bytes; shorten it")
        with contextlib.suppress(re.error):  # llama.cpp's own grammar differs a little: it judges this one
            if not any(re.search(pattern, name) for name in file.tensors):
                example = next(iter(file.tensors), "")
                raise InputError(f"the pattern {pattern!r} fits no tensor of {file.path} such as {example}; correct it")


def check_importance(file: ModelFile, importance: Importance, path: Path) -> None:
    """Refuse an importance matrix of another model. Raises InputError."""
    known = {name: entry for name, entry in importance.entries.items() if name in file.tensors}
    if not known:
        raise InputError(f"{path} has no entry for any tensor of {file.path}; it is of another model")
    for name, entry in known.items():
        shape = file.tensors[name].shape
        wanted = shape[0] * (shape[2] if len(shape) > 2 else 1)
        if entry.sums.size != wanted:
            raise InputError(
                f"{path} has {entry.sums.size} values for {name} of {file.path} instead of {wanted}; "
                f"it is of another model"
            )


def check_types(file: ModelFile, types: Mapping[str, str], importance: Importance | None, scheme: str) -> None:
    """Refuse what llama.cpp would only notice in the middle, or not survive. Raises InputError."""
    entries = importance.entries if importance is not None else {}
    for name, kind in types.items():
        tensor, block = file.tensors[name], SCHEMES[kind].n_values
        if tensor.shape[0] % block:
            raise InputError(
                f"{name} has rows of {tensor.shape[0]} and {kind} takes multiples of {block}; choose another type"
            )
        blind = _ASSERTED if name in _ENDS else (*_BLIND, "Q2_K") if scheme == "Q2_K_S" else _BLIND
        if kind in blind and kind != tensor.type_name and name not in entries:
            raise InputError(
                f"{name} would become {kind}, which needs an importance matrix with an entry for it; "
                f"make one with `localreason quant imatrix` and give --imatrix, or choose a larger scheme"
            )


def check_asked(file: ModelFile, types: Mapping[str, str], request: Request) -> list[str]:
    """One sentence on each thing of a plan that is otherwise than asked, where llama.cpp says nothing. Raises
    InputError for a type of single tensors that they would not get."""
    warnings, owners, ends = [], dict[str, str](), _own_ends(request)
    matrices = [name for name, tensor in file.tensors.items() if len(tensor.shape) > 1]
    for pattern, kind in request.tensors:
        try:
            found = [name for name in matrices if re.search(pattern, name) and name not in ends]
        except re.error:  # llama.cpp's own grammar differs a little
            continue
        late = [name for name in found if owners.setdefault(name, kind).upper() != kind.upper()]
        if late and len(late) == len(found):
            warnings.append(
                f"--tensor {pattern}={kind} has no effect: an earlier --tensor fits all {len(found)} matrices that it "
                f"fits; give the narrower one first"
            )
        own = [name for name in found if name not in late]
        kept = [name for name in own if types[name] == kind.upper()]
        lost = next((name for name in own if name not in kept and _is_changed(file, types, name)), None)
        if lost is not None or not (kept or late):
            raise InputError(f"--tensor {pattern}={kind} cannot be kept: {_why(file, types, lost, kind)}")
    return warnings + _fallbacks(file, types, request, [n for n in matrices if n not in owners and n not in ends])


def _own_ends(request: Request) -> tuple[str, ...]:
    """Tensors whose types have options of their own; an embedding may be the output too."""
    if request.output_type or request.embedding_type:
        return ("token_embd.weight", *(("output.weight",) if request.output_type else ()))
    return ()


def _is_changed(file: ModelFile, types: Mapping[str, str], name: str) -> bool:
    """False for what llama.cpp leaves as it is on purpose, such as the routers of experts."""
    kind = types[name]
    return kind != file.tensors[name].type_name or not SCHEMES[kind].is_float


def _why(file: ModelFile, types: Mapping[str, str], name: str | None, kind: str) -> str:
    """Why a matrix, or all, do not get the type that was asked for."""
    if name is None:
        return "llama.cpp leaves the tensors that it fits as they are; leave it out"
    n, block = file.tensors[name].shape[0], SCHEMES[kind.upper()].n_values
    cause = f"its rows of {n} are no multiple of {block}" if n % block else "that is what llama.cpp takes for it"
    return f"{name} would become {types[name]}, since {cause}; choose another type, or a pattern without it"


def _fallbacks(file: ModelFile, types: Mapping[str, str], request: Request, names: list[str]) -> list[str]:
    """What is said of the matrices that llama.cpp gives another type than the scheme's for the width of their rows."""
    scheme = find_file_type(request.scheme)
    main = MAIN_SCHEMES[scheme]
    odd = [name for name in names if file.tensors[name].shape[0] % main.n_values and _is_changed(file, types, name)]
    if not odd:
        return []
    kinds = " or ".join(kind for kind, _ in Counter(types[name] for name in odd).most_common())
    widths = " and ".join(map(str, sorted({file.tensors[name].shape[0] for name in odd})))
    n_all = sum(_is_changed(file, types, name) for name in names)
    return [
        f"{len(odd)} of {n_all} matrices are {kinds} instead of {main.name}: rows of {widths} are no multiple of "
        f"{main.n_values}"
    ]
