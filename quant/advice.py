"""A ranking in words: what to take, why, and what was measured. Pure."""

from ..runtime.room import size
from .choose import SAME_SIZE, Option, Verdict


def explain(options: list[Option], where: str) -> list[str]:
    """The choice in three lines: what to take, why, and what was measured. `where` says what there is to fit into."""
    best = options[0] if options else None
    if best is None or best.verdict > Verdict.SHORT:
        refused = [option for option in options if option.verdict is Verdict.REFUSED]
        smallest = min((option.needed_bytes for option in options), default=0)
        remedy = "give --force" if refused and len(refused) == len(options) else "give a smaller model or --context"
        return [
            f"Take none: nothing of {len(options)} files fits {where} within the rules; {remedy}.",
            f"Why: {_against(options)}.",
            f"The smallest needs {size(smallest)}.",
        ]
    seconds = f", {best.token_seconds * 1000:.1f} ms a token expected" if best.token_seconds else ""
    lines = [
        f"Take {best.candidate.name} with {best.n_context} tokens of context and a {best.cache_type} cache: "
        f"{size(best.needed_bytes)} of {where}{seconds}."
    ]
    n = max(option.candidate.n_parameters for option in options if option.verdict is best.verdict)
    place = "it is the largest model that fits" if best.candidate.n_parameters == n else "it fits"
    why = [place, *best.reasons, *(f"but {text}" for text in best.warnings), *_beside(options)]
    lines.append(f"Why: {'; '.join(why)}.")
    found = "; ".join(one.sentence() for one in best.measured)
    lines.append(f"Measured here: {found or 'nothing yet; see `localreason quant measure`'}.")
    return lines


def _beside(options: list[Option]) -> list[str]:
    """What speaks for the first option against others."""
    best, found = options[0], []
    n = best.candidate.n_parameters
    second = next((option for option in options[1:] if option.verdict <= Verdict.SHORT), None)
    if second is not None:
        other = second.candidate
        if other.n_bits < 4 <= best.candidate.n_bits:
            found.append(f"the {other.n_bits}-bit weights of {other.name} come after all that the rules allow")
        elif best.verdict < second.verdict:
            found.append(f"{other.name} fits with less context only")
        elif other.n_parameters * SAME_SIZE <= n:
            found.append(f"a larger model comes before more bits, so before {other.name}")
        elif best.candidate.n_bits == other.n_bits:
            if best.candidate.has_imatrix and not other.has_imatrix:
                found.append(f"it was made with an importance matrix, {other.name} without, or it does not tell")
        else:
            found.append(f"{best.candidate.n_bits} bits come before the {other.n_bits} of {other.name}")
    larger = [o for o in options if o.verdict is Verdict.LARGE and o.candidate.n_parameters > n]
    if larger:
        least = min(larger, key=lambda option: option.needed_bytes)
        found.append(f"{least.candidate.name} needs {size(least.needed_bytes)}")
    return found


def _against(options: list[Option]) -> str:
    texts = [
        f"{option.candidate.name} needs {size(option.needed_bytes)}"
        if option.verdict is Verdict.LARGE
        else f"{option.candidate.name}: {option.reasons[-1]}"
        for option in options[:3]
    ]
    return "; ".join(texts) or "no file was given"
