"""What is known of a model's weights, and what that means for reasoning.

The numbers are those of "Quantization Hurts Reasoning?" (COLM 2025) and a reproduction of it on
R1-Distill-Qwen-1.5B. Its formats differ from GGUF's, so they warn and do not predict.
"""

import re
from dataclasses import dataclass

_FEWEST_FOR_4_BITS = 4
"""Billions of parameters, rounded as in names, below which 4-bit weights are warned of; they are fine from 7, and
nothing is known between."""
_FEWEST_FOR_4_BIT_CACHE = 14
_SMALL_QWEN = 7
_BITS = re.compile(r"\d+")
_MANY_BITS = 8
"""Weights of so many may be quantised again for little more loss."""
_REINFORCED = re.compile(
    r"(?:^|[^a-z0-9])(?:qwq|magistral|deepscaler|deepcoder|skywork-or1|polaris|acereason|open-reasoner-zero|r1-zero|"
    r"phi-4-reasoning-plus|grpo|rlvr|rl)(?:[^a-z0-9]|$)",
    re.IGNORECASE,
)
"""Names of models that were trained by reinforcement last, which lose more where QwQ was measured; a list of names can
only miss some."""


@dataclass(frozen=True, slots=True)
class Precision:
    """The weights' scheme, and that of what they were made of."""

    scheme: str
    """A file type such as Q4_K_M, or the tensor type of most matrices."""
    bits_per_weight: float
    """Over all tensors, scales included."""
    source_scheme: str = ""
    """The scheme of the file they were made of, or of one before it with fewer bits; empty where none is told."""

    @property
    def weight_bits(self) -> int:
        """Bits of one weight in most matrices, 4 for Q4_K_M, whatever its scales and larger tensors add; those of
        what it was made of where that had fewer, which nothing brings back."""
        own = self._bits(self.scheme)
        return min(own, self._bits(self.source_scheme)) if self.source_scheme else own

    @property
    def is_inflated(self) -> bool:
        """True where the weights were made of some with fewer bits."""
        return self.weight_bits < self._bits(self.scheme)

    @property
    def is_requantised(self) -> bool:
        """True where weights of few bits were quantised again: the file has the losses of both."""
        return bool(self.source_scheme) and not self.is_inflated and self._bits(self.source_scheme) < _MANY_BITS

    def _bits(self, scheme: str) -> int:
        found = _BITS.search(scheme)
        return int(found[0]) if found else int(self.bits_per_weight)


def is_reinforced(*names: object) -> bool:
    """True where a name of a model tells that it was trained by reinforcement; what is no text is passed over."""
    return any(_REINFORCED.search(name) for name in names if isinstance(name, str))


def advice(
    precision: Precision, n_parameters: int, cache_type: str, architecture: str, has_more: bool = False
) -> list[str]:
    """Warnings of one sentence each about weights and cache in use for reasoning; none means nothing is known against
    them. `n_parameters` counts all experts, `cache_type` is f16, q8_0 or q4_0, `architecture` the GGUF's; `has_more`
    for a model trained by reinforcement, which is to have one class more bits."""
    about_cache = _about_cache(precision, n_parameters, cache_type, architecture, has_more)
    return [*_about_weights(precision, n_parameters, has_more), *about_cache]


def _about_weights(precision: Precision, n_parameters: int, has_more: bool) -> list[str]:
    size, scheme = _size(n_parameters), precision.scheme
    if precision.is_inflated:
        scheme = f"{precision.source_scheme}, of which these {scheme} weights were made,"
    if precision.weight_bits < 4:
        return [
            f"{scheme} stores weights in {precision.weight_bits} bits, and below 4 reasoning breaks "
            f"(at 3 bits 1.5B lost 17 points on average, 32B 3); take 4 bits or more, if need be of a smaller model"
        ]
    if precision.weight_bits == 4 and _billions(n_parameters) < _FEWEST_FOR_4_BITS:
        return [
            f"{scheme} stores weights in 4 bits and the model has {size} parameters, below 4B (at 1.5B 4 bits lost "
            f"3 to 4 points on average, 3 to 6 on AIME); take Q8_0 made of 16 bits, or 4 bits of a larger model"
        ]
    if precision.weight_bits == 4 and has_more:
        return [
            f"{scheme} stores weights in 4 bits and the model was trained by reinforcement, which loses more (at 3 "
            f"bits QwQ-32B lost 15 points on AIME, a distilled 32B 10); take Q8_0 made of 16 bits"
        ]
    return []


def _about_cache(
    precision: Precision, n_parameters: int, cache_type: str, architecture: str, has_more: bool
) -> list[str]:
    if not cache_type.startswith("q4"):
        return []
    size = _size(n_parameters)
    if architecture.startswith("qwen") and _billions(n_parameters) < _SMALL_QWEN:
        together = f" and weights of 4 bits ({precision.scheme})" if precision.weight_bits <= 4 else ""
        return [
            f"a {cache_type} cache{together} hurts a Qwen of {size} parameters, whose keys have large biases; "
            f"below 7B take the cache type f16"
        ]
    if _billions(n_parameters) < _FEWEST_FOR_4_BIT_CACHE:
        better = "q8_0" if _billions(n_parameters) >= _SMALL_QWEN else "f16"
        return [
            f"a {cache_type} cache is near lossless from 14B parameters and the model has {size}; "
            f"take the cache type {better}"
        ]
    if has_more:
        return [f"a {cache_type} cache is a class too low for a model trained by reinforcement; take q8_0 or f16"]
    return []


def _size(n_parameters: int) -> str:
    return f"{n_parameters / 1e9:.3g}B" if n_parameters >= 1e9 else f"{n_parameters / 1e6:.0f}M"


def _billions(n_parameters: int) -> int:
    """The size that names speak of: Gemma 3 4B has 3.88 billion."""
    return round(n_parameters / 1e9)
