"""The first start: which model of a list to take on this machine, and why. Pure."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from ..quant.choose import Candidate, Fit, Option, find_scheme, rank
from ..runtime.fit import RESERVE_BYTES
from ..runtime.room import N_PADDED, size
from ..runtime.schemes import SCHEMES

_CELL_BYTES = 160 << 10
"""16-bit cache bytes of a token, as no header was read: Qwen3 has 112 KiB up to 1.7B and 144 KiB up to 8B."""
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([bm])(?![A-Za-z0-9])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Offer:
    """A model that could be fetched or is here. `name` is what is given to --model; without `n_parameters` they are
    taken from it or from the bytes; `scheme` such as Q4_K_M."""

    name: str
    n_bytes: int
    n_parameters: int | None = None
    scheme: str = ""
    summary: str = ""
    is_here: bool = False


@dataclass(frozen=True, slots=True)
class _Rough:
    """One machine, for models of which no header was read: all that is known is the bytes of the file."""

    free_bytes: int

    def token_bytes(self, name: str, cache_type: str) -> float:
        return _CELL_BYTES * SCHEMES[cache_type.upper()].bits / SCHEMES["F16"].bits

    def fit(self, candidate: Candidate, cache_type: str, n_context: int) -> Fit:
        per_token = self.token_bytes(candidate.name, cache_type)
        left = max(0, self.free_bytes - candidate.n_bytes - RESERVE_BYTES)
        n_held = min(int(left / per_token) // N_PADDED * N_PADDED, n_context)
        return Fit(n_held, candidate.n_bytes + int(per_token * (n_held or n_context)))


@dataclass(frozen=True, slots=True)
class Suggestion:
    """An offer judged. "short" is one with a reservation: less context than was wanted, or weights of too few bits.
    `n_context` is what fits of what was wanted, 0 for "large"; `cache_type` what to open it with."""

    offer: Offer
    verdict: Literal["fits", "short", "large"]
    n_context: int
    cache_type: str
    needed_bytes: int
    """Weights and cache."""
    reason: str
    """One sentence."""


def suggest(offers: Iterable[Offer], free_bytes: int, n_context: int = 8192) -> list[Suggestion]:
    """All offers, the one to take first."""
    by_name = {offer.name: offer for offer in offers}
    room = _Rough(free_bytes)
    options = rank([_candidate(offer, n_context) for offer in by_name.values()], room, n_context)
    found = [_judge(by_name[option.candidate.name], option, room, n_context) for option in options]
    return sorted(found, key=lambda one: ("fits", "short", "large").index(one.verdict))


def count_parameters(name: str) -> int | None:
    """What a name says of the parameters, such as 1.7b or 135M; None where it says nothing."""
    found = _SIZE.findall(name)
    return round(float(found[-1][0]) * (1e9 if found[-1][1] in "bB" else 1e6)) if found else None


def _candidate(offer: Offer, n_context: int) -> Candidate:
    named = find_scheme(offer.scheme)
    # Files of 8 and 4 bits without a scheme in their name: the scales come on top, so bits are rounded down.
    n_parameters = offer.n_parameters or count_parameters(offer.name) or 8 * offer.n_bytes // (named[1] if named else 8)
    bits = 8 * offer.n_bytes / max(1, n_parameters)
    return Candidate(
        name=offer.name,
        n_bytes=offer.n_bytes,
        n_parameters=n_parameters,
        bits_per_weight=bits,
        n_bits=named[1] if named else int(bits),
        scheme=offer.scheme,
        architecture="",
        n_context_train=n_context,
    )


def _judge(offer: Offer, option: Option, room: _Rough, n_context: int) -> Suggestion:
    fit = room.fit(option.candidate, option.cache_type, n_context)
    n_held = fit.n_context
    has_reservation = bool(n_held < n_context or option.verdict > 0)
    verdict = "large" if not n_held else "short" if has_reservation else "fits"
    return Suggestion(
        offer,
        verdict,
        n_held,
        option.cache_type,
        fit.needed_bytes,
        _reason(option, fit, n_context, room.free_bytes),
    )


def _reason(option: Option, fit: Fit, n_wanted: int, free_bytes: int) -> str:
    candidate = option.candidate
    if not fit.n_context:
        cache = size(fit.needed_bytes - candidate.n_bytes)
        return (
            f"It does not fit: its weights take {size(candidate.n_bytes)}, a cache of {n_wanted} tokens {cache}, "
            f"and {size(free_bytes)} are free."
        )
    needed = size(fit.needed_bytes)
    kind = "" if option.cache_type == "f16" else f" with a cache of type {option.cache_type}"
    parts = [f"It takes {needed} of the {size(free_bytes)} that are free for {fit.n_context} tokens of context{kind}"]
    parts += [*option.reasons[-1:], *option.warnings[:1]]
    return "; ".join(parts) + "."
