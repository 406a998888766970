"""What a measurement proves of a file, and what it does not. Pure."""

from dataclasses import dataclass

_LIKELY_CHANCE = 0.05
"""McNemar's p from which on a difference is taken for chance."""
_N_FEW = 30
"""Problems below which a share of them is off by ten points and more."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What `localreason quant measure` found for a file; accuracies as mean, low and high of a 95 % interval over
    `n_problems`, `mcnemar_p` as in `paired.Comparison`."""

    reference: str
    cache_type: str
    divergence: float | None = None
    same_top: float | None = None
    accuracy: tuple[float, float, float] | None = None
    n_problems: int = 0
    mcnemar_p: float | None = None

    def is_worse(self, cache_type: str) -> bool:
        """True where this cache was measured and the loss of accuracy is more than chance."""
        if self.cache_type != cache_type or self.accuracy is None or self.mcnemar_p is None:
            return False
        # Resampling the same few problems shows no chance at all, so the interval alone proves nothing.
        return self.accuracy[2] < 0 and self.mcnemar_p < _LIKELY_CHANCE

    def sentence(self) -> str:
        parts = []
        if self.divergence is not None:
            parts.append(f"KL {self.divergence:.3g} nats")
        if self.same_top is not None:
            parts.append(f"same top token {self.same_top:.1%}")
        if self.accuracy is not None:
            mean, low, high = (100 * value for value in self.accuracy)
            n = f"{self.n_problems} problem{'s' if self.n_problems != 1 else ''}"
            few = ", too few to tell" if is_too_few(self.n_problems, self.mcnemar_p) else ""
            parts.append(f"accuracy {mean:+.1f} points ({low:+.1f} to {high:+.1f}) on {n}{few}")
        return f"{', '.join(parts) or 'nothing'}, to {self.reference}, with a {self.cache_type} cache"


def is_too_few(n_problems: int, mcnemar_p: float | None) -> bool:
    """True where so few problems tell nothing, whatever the bootstrap's interval."""
    return n_problems < _N_FEW and (mcnemar_p is None or mcnemar_p >= _LIKELY_CHANCE)
