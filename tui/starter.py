"""The first start: which model of a list to take on this machine, and why. Pure."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from ..quant.advice import size
from ..quant.choose import Candidate, Fit, Option, find_scheme, rank
from ..runtime.fit import RESERVE_BYTES
from ..runtime.room import N_PADDED
from ..runtime.schemes import SCHEMES

_CELL_BYTES = 160 << 10
"""16-bit cache bytes of a token, where no header was read: Qwen3 has 112 KiB up to 1.7B and 144 KiB up to 8B."""
_SLOW = 4.0
"""Tokens a second below which a reader waits for the words."""
_SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([bm])(?![A-Za-z0-9])", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Offer:
    """A model that could be fetched or is here. `name` is what is given to --model; without `n_parameters` they are
    taken from it or from the bytes; `scheme` such as Q4_K_M; `cell_bytes` are 16-bit cache bytes of a token, None where
    no header was read."""

    name: str
    n_bytes: int
    n_parameters: int | None = None
    scheme: str = ""
    summary: str = ""
    sha256: str | None = None
    cell_bytes: float | None = None
    n_context_train: int | None = None
    is_here: bool = False


@dataclass(frozen=True, slots=True)
class _Rough:
    """One machine, for models of which no header was read: all that is known is the bytes of the file, and about those
    of a token in a 16-bit cache, by name."""

    free_bytes: int
    cell_bytes: Mapping[str, float]

    def token_bytes(self, name: str, cache_type: str) -> float:
        return self.cell_bytes[name] * SCHEMES[cache_type.upper()].bits / SCHEMES["F16"].bits

    def fit(self, candidate: Candidate, cache_type: str, n_context: int) -> Fit:
        per_token = self.token_bytes(candidate.name, cache_type)
        left = max(0, self.free_bytes - candidate.n_bytes - RESERVE_BYTES)
        n_fitting = int(left / per_token) // N_PADDED * N_PADDED if per_token else n_context
        n_held = min(n_fitting, n_context)
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
    tokens_per_second: float | None
    reason: str
    """One sentence."""


def suggest(
    offers: Iterable[Offer], free_bytes: int, n_context: int = 8192, bytes_per_second: float | None = None
) -> list[Suggestion]:
    """All offers, the one to take first. `bytes_per_second` is the speed at which this machine reads weights, where
    it was measured; with it a model too slow to read along comes after faster ones that fit as well."""
    by_name = {offer.name: offer for offer in offers}
    cells = {name: _CELL_BYTES if offer.cell_bytes is None else offer.cell_bytes for name, offer in by_name.items()}
    room = _Rough(free_bytes, cells)
    options = rank([_candidate(offer, n_context) for offer in by_name.values()], room, n_context)
    found = [_judge(by_name[o.candidate.name], o, room, n_context, bytes_per_second) for o in options]
    order = ("fits", "short", "large")
    return sorted(found, key=lambda one: (order.index(one.verdict), _is_slow(one)))


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
        n_context_train=offer.n_context_train or n_context,
    )


def _judge(offer: Offer, option: Option, room: _Rough, n_context: int, bytes_per_second: float | None) -> Suggestion:
    n_wanted = min(n_context, option.candidate.n_context_train)
    fit = room.fit(option.candidate, option.cache_type, n_wanted)
    n_held = fit.n_context
    speed = bytes_per_second / offer.n_bytes if bytes_per_second and offer.n_bytes else None
    has_reservation = bool(n_held < n_wanted or option.verdict > 0)
    verdict = "large" if not n_held else "short" if has_reservation else "fits"
    return Suggestion(
        offer,
        verdict,
        n_held,
        option.cache_type,
        fit.needed_bytes,
        speed if n_held else None,
        _reason(option, fit, n_wanted, room.free_bytes, speed),
    )


def _reason(option: Option, fit: Fit, n_wanted: int, free_bytes: int, speed: float | None) -> str:
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
    if speed is not None:
        slow = ", slower than one reads" if speed < _SLOW else ""
        parts.append(f"writes at most about {speed:.0f} tokens a second{slow}" if speed >= 1 else "is very slow here")
    parts += [*option.reasons[-1:], *option.warnings[:1]]
    return "; ".join(parts) + "."


def _is_slow(one: Suggestion) -> bool:
    return one.tokens_per_second is not None and one.tokens_per_second < _SLOW
