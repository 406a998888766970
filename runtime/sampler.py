"""Sampling parameters, and pure functions from a row of logits to a token or a number."""

from dataclasses import dataclass

import numpy as np

from .engine import Row
from .errors import DecodeFailed, InputError

_N_NUCLEUS = 512
"""Candidates sorted first; the nucleus nearly always lies within them, else all are sorted."""
_NEGLIGIBLE = 30.0
"""exp(-30) of the best token's weight is below float32's rounding of the sum over any vocabulary."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a token is drawn. Order as in the papers' runs: temperature, top-k, top-p, min-p.

    llama.cpp applies the temperature last. A temperature of 0 takes the best token; `top_k` 0 and `min_p` 0 and
    `top_p` 1 are off. Raises InputError for a value out of range.
    """

    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 0.0, 1.0),
            ("top_k", self.top_k, 0, 2**31),
            ("min_p", self.min_p, 0.0, 1.0),
        ):
            if not low <= value <= high:
                raise InputError(f"{name} is {value}; give a value from {low} to {high}")


def choose(row: Row, sampling: Sampling, uniform: float) -> int:
    """The token that `uniform` in [0, 1) falls on. Raises DecodeFailed where the row has no finite maximum."""
    best = int(row.argmax())
    top = float(row[best])
    if not np.isfinite(top):
        raise DecodeFailed(f"the model gave a logit of {top}; its file is damaged or its precision overflows")
    if not np.float32(sampling.temperature) or sampling.top_k == 1:  # 1e-300 is 0 too
        return best
    ids = np.flatnonzero(row >= top - _NEGLIGIBLE * sampling.temperature)
    if 0 < sampling.top_k < len(ids):
        ids = ids[np.argpartition(row[ids], -sampling.top_k)[-sampling.top_k :]]
    weights = np.exp((row[ids] - top) / np.float32(sampling.temperature), dtype=np.float64)
    wanted = sampling.top_p * float(weights.sum())
    if len(ids) > _N_NUCLEUS:
        largest = np.argpartition(weights, -_N_NUCLEUS)[-_N_NUCLEUS:]
        if float(weights[largest].sum()) >= wanted:
            ids, weights = ids[largest], weights[largest]
    order = np.lexsort((ids, -weights))
    sums = np.cumsum(weights[order])
    n_likely = int(np.count_nonzero(weights >= sampling.min_p))  # the best one's weight is 1
    n_kept = min(int(np.searchsorted(sums, wanted)) + 1, n_likely)
    index = int(np.searchsorted(sums[:n_kept], uniform * sums[n_kept - 1], side="right"))
    return int(ids[order[min(index, n_kept - 1)]])


def entropy(row: Row) -> float:
    """Shannon entropy in nats of softmax(row) at temperature 1 over the whole vocabulary."""
    # A banned token's -inf would make its product NaN; the weight of -100 is as good as none.
    shifted = np.maximum(row - row.max(), np.float32(-100.0))
    weights = np.exp(shifted)
    total = float(weights.sum(dtype=np.float64))
    return float(np.log(total) - np.dot(weights, shifted) / total)
