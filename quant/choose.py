"""Which file, cache type and context to take: what fits, in the order of what is known of quantised reasoning. Pure.

The rules are our reading of "Quantization Hurts Reasoning?" (COLM 2025) for GGUF: 8-bit weights are the default; 4-bit
weights cost about a point from 7B on and three to four at 1.5B, on AIME up to six; below 4 bits much is lost. The cache
is 16-bit below 7B and 8-bit from there on, 4-bit from 14B only. A larger model at 4 bits comes before a smaller one at
16. Hard tasks, and models trained by reinforcement, lose several times as much and get one class more bits: weights of
16 bits before 8, a warning of 4 at any size, a cache of 16 bits before 8, and none of 4. Sizes are those that names
speak of, parameters rounded to whole billions.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Protocol

from ..runtime.errors import ModelUnsupported, OutOfMemory
from ..runtime.fit import N_BATCH_CPU, N_BATCH_GPU, Free, Wish, fit
from ..runtime.header import Header
from ..runtime.memory import is_cache_possible, split_usage, token_bytes, weights_bytes
from ..runtime.precision import is_reinforced
from .evidence import Measured
from .weights import find_precision, has_imatrix

SAME_SIZE = 1.5
"""Models of which one has less than this many times the other's parameters count as equally large."""
_BILLION = 10**9
_FEW_BITS = 5
"""Below which an importance matrix is worth having."""
_N_CONTEXT_UNKNOWN = 4096
_BITS = re.compile(r"(?:^|[-._/])(?:UD-)?((?:BF|FP|F|I?Q|TQ|MXFP|NVFP)(\d+)(?:_[A-Z0-9]+)*)(?=[-.]|$)", re.IGNORECASE)


class Verdict(IntEnum):
    """What becomes of a file, the better first."""

    FITS = 0
    SHORT = 1
    """It fits with less context than was asked for."""
    LARGE = 2
    REFUSED = 3
    """The rules are against it."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A file that could be taken. `n_bits` is the class of its weights: 4 for Q4_K_M, although its
    `bits_per_weight` are more, and for what was made of 4 bits. `header` is None where none was read."""

    name: str
    n_bytes: int
    n_parameters: int
    bits_per_weight: float
    n_bits: int
    scheme: str
    architecture: str
    n_context_train: int
    header: Header | None = field(default=None, compare=False, repr=False)
    is_reinforced: bool = False
    """Trained by reinforcement, as far as the names tell."""
    source_scheme: str = ""
    """The scheme of fewer bits, or of few, that its weights were made of, if they were."""
    is_requantised: bool = False
    """True where that has no fewer bits: the losses of both."""
    has_imatrix: bool = False
    """Made with an importance matrix, as far as the file tells."""

    @property
    def n_billions(self) -> int:
        return round(self.n_parameters / _BILLION)


@dataclass(frozen=True, slots=True)
class Fit:
    """What a room has for a file: the tokens of context, 0 where it does not fit, the bytes that they, or all that were
    wanted, need with the weights, and seconds a token where known."""

    n_context: int
    needed_bytes: int
    token_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class _Wish:
    """What a file is to be taken for. `is_forced` admits what the rules refuse."""

    n_context: int
    is_forced: bool
    is_hard: bool

    def has_more(self, candidate: Candidate) -> bool:
        """True where one class more bits is called for."""
        return self.is_hard or candidate.is_reinforced


class Room(Protocol):
    """Where a file is to run."""

    def fit(self, candidate: Candidate, cache_type: str, n_context: int) -> Fit:
        """The context up to `n_context` that there is room for."""
        ...


@dataclass(frozen=True, slots=True)
class Machine:
    """One machine and what is free on it, as loading counts it; `repacked` as in `split_usage`."""

    free: Free
    repacked: frozenset[str] = frozenset()

    def fit(self, candidate: Candidate, cache_type: str, n_context: int) -> Fit:
        assert candidate.header is not None
        header, n_batch = candidate.header, N_BATCH_CPU if self.free.gpu_bytes is None else N_BATCH_GPU
        # A published file may have more bytes than the types say that stand in for its own.
        rest = max(0, candidate.n_bytes - header.data_offset - weights_bytes(header))
        free = replace(self.free, host_bytes=max(0, self.free.host_bytes - rest))
        try:
            found = fit(header, Wish(None, n_context, n_context, cache_type, n_batch=n_batch), free, self.repacked)
        except OutOfMemory:
            usage = split_usage(header, n_context, cache_type, n_batch, repacked=self.repacked)
            return Fit(0, usage["host"].needed_bytes + rest)
        needed = sum(usage.needed_bytes for usage in found.usage.values())
        return Fit(min(found.n_context, n_context), needed + rest)


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate judged; `needed_bytes` are all that it takes."""

    candidate: Candidate
    verdict: Verdict
    cache_type: str
    n_context: int
    needed_bytes: int
    token_seconds: float | None
    reasons: tuple[str, ...]
    warnings: tuple[str, ...]
    measured: tuple[Measured, ...] = ()


def find_scheme(name: str) -> tuple[str, int] | None:
    """The scheme in a file's name and its class of bits, such as ("Q4_K_M", 4); None where it names none."""
    found = _BITS.findall(name.removesuffix(".gguf"))
    return (found[-1][0].upper(), int(found[-1][1])) if found else None


def describe(header: Header, name: str, file_name: str = "") -> Candidate:
    """A model as a candidate. Raises ModelUnsupported for one without matrices."""
    if not any(len(entry.shape) > 1 for entry in header.tensors):
        raise ModelUnsupported(f"{name} has no matrices of weights; give a whole model")
    precision, values = find_precision(header), header.values
    architecture = str(values.get("general.architecture", ""))
    n_train = values.get(f"{architecture}.context_length")
    return Candidate(
        name=name,
        n_bytes=weights_bytes(header),
        n_parameters=sum(math.prod(entry.shape) for entry in header.tensors),
        bits_per_weight=precision.bits_per_weight,
        n_bits=precision.weight_bits,
        scheme=precision.scheme,
        source_scheme=precision.source_scheme if precision.is_inflated or precision.is_requantised else "",
        is_requantised=precision.is_requantised,
        architecture=architecture,
        n_context_train=n_train if isinstance(n_train, int) and n_train > 0 else _N_CONTEXT_UNKNOWN,
        header=header,
        is_reinforced=is_reinforced(name, file_name, values.get("general.name")),
        has_imatrix=has_imatrix(values),
    )


def rank(
    candidates: Iterable[Candidate],
    room: Room,
    n_context: int,
    measured: Mapping[str, tuple[Measured, ...]] | None = None,
    is_forced: bool = False,
    is_hard: bool = False,
) -> list[Option]:
    """All candidates, the best first; `measured` by name. `is_forced` admits what the rules refuse, `is_hard` means
    hard tasks."""
    known = measured or {}
    wish = _Wish(n_context, is_forced, is_hard)
    options = [_judge(candidate, room, wish, known.get(candidate.name, ())) for candidate in candidates]
    levels = _levels(options)
    order = sorted(range(len(options)), key=lambda i: (*_class(options[i]), *_preference(options[i], levels[i], wish)))
    return [options[i] for i in order]


def _class(option: Option) -> tuple[int, int]:
    """What fits by the rules comes first, then what fits against them, then the rest."""
    is_taken = option.verdict <= Verdict.SHORT
    return (0 if is_taken and option.candidate.n_bits >= 4 else 1 if is_taken else 2, option.verdict)


def _levels(options: list[Option]) -> dict[int, int]:
    """By place: 0 for the largest models that can be taken and those about as large, 1 for the next, and so on."""
    levels, level, largest = dict[int, int](), 0, 0
    for i in sorted(range(len(options)), key=lambda i: (*_class(options[i]), -options[i].candidate.n_parameters)):
        n = options[i].candidate.n_parameters
        if n * SAME_SIZE <= largest or n > largest:
            level, largest = level + 1, n
        levels[i] = level
    return levels


def _preference(option: Option, level: int, wish: _Wish) -> tuple[float, ...]:
    """Larger models first, then 8 bits, then 16 (or 16 before 8), then the more bits; of few bits alike, those made
    with an importance matrix."""
    candidate = option.candidate
    preferred = candidate.n_bits == 8 if not wish.has_more(candidate) else candidate.n_bits > 8
    order = 0 if preferred else 1 if candidate.n_bits >= 8 else 10 - candidate.n_bits
    is_worse = any(one.is_worse(option.cache_type) for one in option.measured)
    is_blind = candidate.n_bits < _FEW_BITS and (not candidate.has_imatrix or candidate.is_requantised)
    return (level, is_worse, order, is_blind, len(option.warnings), -candidate.n_parameters, candidate.n_bytes)


def _judge(candidate: Candidate, room: Room, wish: _Wish, measured: tuple[Measured, ...]) -> Option:
    n_wanted, is_forced, has_more = wish.n_context, wish.is_forced, wish.has_more(candidate)
    reasons, warnings, is_refused = _weights(candidate, has_more)
    if candidate.is_requantised:
        warnings.append(
            f"its weights were quantised a second time: {candidate.scheme} of {candidate.source_scheme} has the losses "
            f"of both"
        )
    elif candidate.source_scheme:
        warnings.append(
            f"its {candidate.scheme} weights were made of {candidate.source_scheme}: the bytes of the one "
            f"with the losses of the other"
        )
    n_context = min(n_wanted, candidate.n_context_train)
    if n_context < n_wanted:
        warnings.append(f"it was trained for {n_context} tokens of context, not for {n_wanted}")
    kinds = cache_types(candidate, is_forced, has_more)
    fits = [(kind, room.fit(candidate, kind, n_context)) for kind in kinds]
    # The first type that holds all of it, else the one that holds most.
    kind, found = next(
        (pair for pair in fits if pair[1].n_context >= n_context), max(fits, key=lambda p: p[1].n_context)
    )
    verdict = Verdict.FITS if found.n_context >= n_context else Verdict.SHORT if found.n_context else Verdict.LARGE
    if is_refused:
        (warnings if is_forced else reasons).append(is_refused)
        verdict = verdict if is_forced else Verdict.REFUSED
    if verdict is Verdict.SHORT:
        warnings.append(f"only {found.n_context} of {n_context} tokens of context fit")
    warnings += _cache_warnings(candidate, kind, has_more)
    if any(one.is_worse(kind) for one in measured):
        warnings.append("it was measured to answer worse than its reference, by more than chance")
    n_held = found.n_context or n_context
    texts = (tuple(reasons), tuple(warnings))
    return Option(candidate, verdict, kind, n_held, found.needed_bytes, found.token_seconds, *texts, measured)


def _weights(candidate: Candidate, has_more: bool) -> tuple[list[str], list[str], str]:
    """Reasons, warnings, and why the weights are refused if they are."""
    bits, size = candidate.n_bits, candidate.n_billions
    if bits < 4:
        return [], [], f"{bits}-bit weights cost reasoning 3 points at 32B and 12 to 24 at 1.5B; --force takes them"
    if bits >= 16:
        return [f"{bits}-bit weights lose nothing, at {bits // 8} times the bytes of 8-bit ones"], [], ""
    if bits >= 8:
        return ["8-bit weights are within about a point of 16-bit ones"], [], ""
    if bits > 4:
        return [f"{bits}-bit weights lie between 8 bits and 4, for which losses are known"], [], ""
    if has_more:
        return (
            [],
            ["4-bit weights cost hard tasks, and models trained by reinforcement, more than others; take 8 bits"],
            "",
        )
    if size >= 7:
        return ["4-bit weights cost about one point from 7B on"], [], ""
    if size >= 4:
        return [], ["nothing is known of 4-bit weights between 1.5B, where they cost 3 points or more, and 7B"], ""
    return [], ["4-bit weights cost 3 to 4 points on average at 1.5B, 3 to 6 on AIME"], ""


def cache_types(candidate: Candidate, is_forced: bool = False, has_more: bool = False) -> list[str]:
    """Cache types that the rules allow, the preferred first; `has_more` where one class more bits is called for."""
    size = candidate.n_billions
    allowed = ["f16", "q8_0"] if size < 7 or has_more else ["q8_0"]
    is_small_qwen = candidate.architecture.startswith("qwen") and size < 7
    is_four = candidate.n_bits <= 4
    if (size >= 14 and not has_more) or (is_forced and not (is_small_qwen and is_four)):
        allowed.append("q4_0")
    header = candidate.header
    if header is None:
        return allowed
    if not token_bytes(header, "f16"):  # a recurrent model has no such cache
        return ["f16"]
    return [kind for kind in allowed if is_cache_possible(header, kind)] or ["f16"]


def _cache_warnings(candidate: Candidate, kind: str, has_more: bool) -> list[str]:
    if kind == "q4_0":
        if candidate.n_billions < 14:
            return ["a 4-bit cache is near-lossless from 14B on only"]
        return ["a 4-bit cache, since an 8-bit one does not fit"]
    if kind == "q8_0" and (candidate.n_billions < 7 or has_more):
        rule = "below 7B" if candidate.n_billions < 7 else "for hard tasks and models trained by reinforcement"
        return [f"an 8-bit cache, since a 16-bit one, the rule {rule}, does not fit"]
    return []
