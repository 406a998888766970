"""What a model file says of itself: types, sizes, precision, and what is wrong with it. Pure reading of the header."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..runtime.devices import CPU, Backend
from ..runtime.errors import ModelBroken
from ..runtime.formats import detect
from ..runtime.header import Header, TensorEntry, check_header
from ..runtime.memory import is_cache_possible, is_tied, scheme_of, tensor_bytes, token_bytes, weights_bytes
from ..runtime.native import CACHE_TYPES
from ..runtime.parts import Piece, join
from ..runtime.precision import Precision, advice, is_reinforced
from ..runtime.schemes import MAIN_SCHEMES, SCHEMES
from .backend import effective
from .gguf import ARCHITECTURES
from .weights import IMATRIX, MAIN_SHARE, RECORD, find_file_type, find_precision, has_imatrix, layer_shares

_N_TOKENS = 1000
"""Of which the cache is told."""


@dataclass(frozen=True, slots=True)
class TypeSum:
    """All tensors of one type; `share` is of all bytes, `bits` per weight."""

    name: str
    n_tensors: int
    n_parameters: int
    n_bytes: int
    share: float
    bits: float


@dataclass(frozen=True, slots=True)
class PartSum:
    """Bytes and tensors of the embedding, the layers, the output, or whatever else there is."""

    name: str
    n_tensors: int
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of a file from its header. `n_bytes` are those of the files, `weights_bytes` of the tensors."""

    name: str
    n_files: int
    n_bytes: int
    architecture: str
    title: str
    n_parameters: int
    n_layers: int | None
    n_context: int | None
    n_vocab: int | None
    file_type: str | None
    weights_bytes: int
    bits_per_weight: float
    precision: Precision
    types: tuple[TypeSum, ...]
    parts: tuple[PartSum, ...]
    is_output_tied: bool
    cache_bytes: dict[str, int | None]
    """Of 1,000 tokens by cache type; None for a type that the heads do not fill."""
    effective: dict[str, dict[str, str]]
    """By backend and by type of matrices, bits of weights and activations as they are multiplied."""
    has_template: bool
    thinking_format: str
    imatrix: dict[str, Any]
    made_from: dict[str, Any]
    """What `localreason quant convert` recorded of the file's origin."""
    is_reinforced: bool
    """Trained by reinforcement, as far as the names tell."""
    quantization_version: int | None
    warnings: tuple[str, ...]

    def advice(self, cache_type: str) -> list[str]:
        """What is known against the weights, or against such a cache, for reasoning."""
        return advice(self.precision, self.n_parameters, cache_type, self.architecture, self.is_reinforced)


def inspect(pieces: Sequence[Piece], cache_type: str = "f16", backends: Iterable[Backend] = (CPU,)) -> Report:
    """The report of a model in one file or several; `cache_type` is what the advice is about.

    Raises ModelBroken for parts that do not belong together, ModelUnsupported for unknown types of tensors.
    """
    header = join(pieces)
    n_parameters, weights = sum(math.prod(entry.shape) for entry in header.tensors), weights_bytes(header)
    file_type, precision = find_file_type(header.values), find_precision(header)
    matrices = dict.fromkeys(scheme_of(entry) for entry in header.tensors if len(entry.shape) > 1)
    names = (Path(pieces[0].name).name, header.values.get("general.name"))
    report = Report(
        name=pieces[0].name,
        n_files=len(pieces),
        n_bytes=header.n_bytes,
        n_parameters=n_parameters,
        n_vocab=next((entry.shape[-1] for entry in header.tensors if entry.name == "token_embd.weight"), None),
        file_type=file_type,
        weights_bytes=weights,
        bits_per_weight=precision.bits_per_weight,
        precision=precision,
        types=_types(header, weights),
        parts=_parts(header),
        is_output_tied=is_tied(header),
        cache_bytes=_caches(header),
        effective={
            backend.name: {scheme.name: effective(scheme, backend) for scheme in matrices} for backend in backends
        },
        warnings=(),
        is_reinforced=is_reinforced(*names),
        **_metadata(header.values),
    )
    return replace(report, warnings=tuple(_warnings(pieces, header, report, cache_type)))


def _metadata(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the report that are told by the metadata alone."""
    texts = {key: value for key, value in values.items() if isinstance(value, str)}
    architecture, template = texts.get("general.architecture", ""), texts.get("tokenizer.chat_template")
    return {
        "architecture": architecture,
        "title": texts.get("general.name", ""),
        "n_layers": _integer(values.get(f"{architecture}.block_count")),
        "n_context": _integer(values.get(f"{architecture}.context_length")),
        "has_template": bool(template),
        "thinking_format": detect(template, texts).name,
        "made_from": {
            key.removeprefix(RECORD): value for key, value in values.items() if key.startswith(RECORD) and value != ""
        },
        "imatrix": {key.removeprefix(IMATRIX): value for key, value in values.items() if key.startswith(IMATRIX)},
        "quantization_version": _integer(values.get("general.quantization_version")),
    }


def _integer(value: Any, default: int | None = None) -> Any:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _caches(header: Header) -> dict[str, int | None]:
    return {
        kind: round(_N_TOKENS * token_bytes(header, kind)) if is_cache_possible(header, kind) else None
        for kind in CACHE_TYPES
    }


def _types(header: Header, weights: int) -> tuple[TypeSum, ...]:
    """The sums by type, most bytes first."""
    found: dict[str, list[TensorEntry]] = {}
    for entry in header.tensors:
        found.setdefault(scheme_of(entry).name, []).append(entry)
    sums = []
    for name, entries in found.items():
        n_bytes = sum(map(tensor_bytes, entries))
        n_parameters = sum(math.prod(entry.shape) for entry in entries)
        sums.append(TypeSum(name, len(entries), n_parameters, n_bytes, n_bytes / weights, SCHEMES[name].bits))
    return tuple(sorted(sums, key=lambda one: -one.n_bytes))


def _parts(header: Header) -> tuple[PartSum, ...]:
    named = {"blk": "layers", "token_embd": "embedding", "output": "output", "output_norm": "output"}
    found: dict[str, list[int]] = {"embedding": [], "layers": [], "output": [], "other": []}
    for entry in header.tensors:
        found[named.get(entry.name.split(".")[0], "other")].append(tensor_bytes(entry))
    return tuple(PartSum(name, len(sizes), sum(sizes)) for name, sizes in found.items() if sizes or name != "other")


def _warnings(pieces: Sequence[Piece], header: Header, report: Report, cache_type: str) -> Iterable[str]:
    """One sentence each, what makes the file unusable first."""
    precision = report.precision
    for piece in pieces:
        ends = [
            (piece.header.data_offset + entry.offset + tensor_bytes(entry), entry) for entry in piece.header.tensors
        ]
        end, last = max(ends, key=lambda pair: pair[0], default=(0, None))
        if last is not None and end > piece.n_bytes:
            yield (
                f"{piece.name} is truncated: the tensor {last.name!r} ends at {end} and the file at {piece.n_bytes}; "
                f"get it again"
            )
    try:
        check_header(header.values, pieces[0].name)
    except ModelBroken as error:
        yield str(error)
    yield from _about_types(header, report.file_type)
    if precision.is_requantised:
        yield (
            f"the {precision.scheme} weights were made of {precision.source_scheme} and have the losses of both; take "
            f"a file made of 16 bits"
        )
    if precision.is_inflated:
        yield (
            f"the {precision.scheme} weights were made of {precision.source_scheme} and are no better than that; "
            f"make the file of one of 16 bits"
        )
    if report.architecture not in ARCHITECTURES:
        yield (
            f"the architecture {report.architecture!r} is not known to give the same answers cut in windows, so it "
            f"cannot be shared with --cluster; known are {', '.join(ARCHITECTURES)}"
        )
    if not is_cache_possible(header, cache_type):
        yield f"the heads of the model do not fill the blocks of a {cache_type} cache; take the cache type f16"
    yield from report.advice(cache_type)


def _about_types(header: Header, file_type: str | None) -> Iterable[str]:
    shares = layer_shares(header)
    main = MAIN_SCHEMES[file_type].name if file_type is not None else next(iter(shares))
    listed = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    if shares.get(main, 0.0) < MAIN_SHARE:
        said = f", although the file says {file_type}, which is mostly {main}" if file_type is not None else ""
        yield f"types are mixed: the weights of the layers are {listed}{said}; judge the file by these"
    packed = SCHEMES[next(iter(shares))]
    if packed.weight_bits <= 4 and not packed.is_native and not has_imatrix(header.values):
        yield (
            f"{packed.name} weights were made without an importance matrix, or the file does not tell; "
            f"one made with it, from the model's own reasoning, loses less"
        )
