"""How far a candidate's next-token distribution is from a reference's, on a text or on traces of reasoning.

The text is cut as llama.cpp's perplexity tool cuts it: chunks of `n_context` tokens, the first of each replaced by BOS
where the model wants one, and only the second half of a chunk scored. The models evaluate a chunk in turns, so no more
than one chunk of the reference's logits is held: float32, shape (n_context - n_context // 2 - 1, n_vocab).

Both are fed batches of the same size where the engines allow it: llama.cpp's kernels round otherwise for another size,
which alone was seen to give a divergence of 0.002 to 0.005 nats on a model of 135 million parameters. What is measured
below that is not the candidate's doing.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.engine import Engine, Logits, Span
from ..runtime.errors import InputError, ModelBroken, ModelUnsupported
from ..runtime.tokenizer import Tokenizer

_N_BLOCK = 1 << 22
"""Numbers of float64 that are worked on at once."""
_LEAST_CONTEXT = 16
Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean over the scored tokens and its standard error, the tokens taken as independent, as llama.cpp does."""

    value: float
    error: float

    @classmethod
    def of(cls, values: Values) -> "Mean":
        n = len(values)
        return cls(float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0)


@dataclass(frozen=True, slots=True)
class Drift:
    """A candidate against its reference. Divergences and log-probabilities are in nats."""

    n_context: int
    n_chunks: int
    n_scored: int
    """Tokens whose distributions were compared."""
    reference_perplexity: Mean
    candidate_perplexity: Mean
    divergence: Mean
    """KL(reference || candidate) of the next token."""
    divergence_p99: float
    divergence_max: float
    same_top: Mean
    """Share of positions at which both hold the same token for the likeliest."""
    log_probability_difference: Mean
    """The candidate's log-probability of the text's token less the reference's; negative is worse."""


def cut(tokens: list[int], prefix: list[int], n_context: int, n_most: int | None = None) -> list[list[int]]:
    """Chunks of `n_context` tokens out of the first `n_most`; `prefix` is BOS or empty. Raises InputError where the
    text does not fill one."""
    if n_context < _LEAST_CONTEXT:
        raise InputError(f"the context is {n_context} tokens; give {_LEAST_CONTEXT} or more")
    whole = (prefix + tokens)[:n_most]
    n_chunks = len(whole) // n_context
    if not n_chunks:
        what = f"the first {n_most} tokens of the text do" if n_most and n_most < len(tokens) else "the text does"
        raise InputError(
            f"{what} not fill one chunk: {len(whole)} tokens where the context takes {n_context}; "
            f"give a longer text or a smaller context"
        )
    chunks = [whole[i * n_context : (i + 1) * n_context] for i in range(n_chunks)]
    return [prefix + chunk[len(prefix) :] for chunk in chunks]


def check_vocabulary(reference: Tokenizer, candidate: Tokenizer, names: tuple[str, str]) -> None:
    """Refuse a candidate whose tokens are not the reference's. Raises ModelUnsupported."""
    remedy = "compare files of one model"
    if reference.n_vocab != candidate.n_vocab:
        raise ModelUnsupported(
            f"{names[1]} has a vocabulary of {candidate.n_vocab} tokens and {names[0]} one of {reference.n_vocab}; "
            f"{remedy}"
        )
    for token in range(reference.n_vocab):
        one, other = reference.piece(token), candidate.piece(token)
        if one != other:
            raise ModelUnsupported(
                f"{names[1]} has another vocabulary than {names[0]}: token {token} is {_brief(other)} and not "
                f"{_brief(one)}; {remedy}"
            )


def _brief(piece: bytes) -> str:
    return repr(piece[:40].decode("utf-8", "replace"))


def compare(
    reference: Engine,
    candidate: Engine,
    chunks: list[list[int]],
    names: tuple[str, str] = ("the reference", "the candidate"),
    on_chunk: Callable[[int], None] = lambda n_done: None,
) -> Drift:
    """Evaluate chunks of one length in both engines, whose vocabularies are the same, in sequence 0.

    A KeyboardInterrupt behind the first chunk ends it; the drift is that of the chunks that both have evaluated.
    Raises ModelBroken where logits are not finite, InputError where a chunk is longer than an engine's context.
    """
    n_context = len(chunks[0])
    for engine, name in ((reference, names[0]), (candidate, names[1])):
        if n_context > engine.n_context_sequence:
            raise InputError(
                f"the context of {n_context} tokens is above the {engine.n_context_sequence} that {name} holds; "
                f"give a smaller --context"
            )
    first = n_context // 2
    kept = np.empty((n_context - first - 1, reference.n_vocab), np.float32)
    scores: list[list[Values]] = []
    try:
        for number, chunk in enumerate(chunks, 1):
            for position, rows in score_rows(reference, chunk, first):
                kept[position - first : position - first + len(rows)] = rows
            _check(kept, names[0], number)
            found = []
            for position, rows in score_rows(candidate, chunk, first):
                _check(rows, names[1], number)
                end = position + len(rows)
                found.append(_scores(kept[position - first : end - first], rows, chunk[position + 1 : end + 1]))
            scores.append(found)
            on_chunk(number)
    except KeyboardInterrupt:
        if not scores:
            raise
    return _summarise(np.concatenate([part for found in scores for part in found]), n_context, len(scores))


def score_rows(engine: Engine, chunk: list[int], first: int) -> Iterator[tuple[int, Logits]]:
    """Evaluate a chunk in sequence 0, which is dropped, batch by batch: the position of the first row of a batch, and
    rows that predict the token behind each position from `first` on, valid until the next one is asked for."""
    engine.rewind(0, 0)
    fed = chunk[:-1]  # what follows the last token is not known
    for start in range(0, len(fed), engine.n_batch):
        part = fed[start : start + engine.n_batch]
        n_rows = min(len(part), max(0, start + len(part) - first))
        engine.submit([Span(0, start, part, n_rows)])
        rows = engine.collect()
        if n_rows:
            yield start + len(part) - n_rows, rows
    engine.rewind(0, 0)


def _check(rows: Logits, name: str, number: int) -> None:
    # The sum tells in one pass without an array of flags; only one that is not finite is looked into.
    with np.errstate(invalid="ignore"):
        total = rows.sum(dtype=np.float64)
    if not np.isfinite(total):
        n_bad = int(np.count_nonzero(~np.isfinite(rows)))
        raise ModelBroken(
            f"{name} gives {n_bad} logits that are not finite numbers in chunk {number}, of {rows.size}; "
            f"take another file, or the cache type f16"
        )


def log_softmax(rows: NDArray[np.float32]) -> Values:
    """Log-probabilities, float64, shape of `rows`."""
    logits = rows.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return logits


def _scores(reference: Logits, candidate: Logits, targets: list[int]) -> Values:
    """For each position the log-probabilities of its target in both, the divergence, and 1 where the top tokens are
    the same; shape (n, 4)."""
    n, n_vocab = reference.shape
    found = np.empty((n, 4), np.float64)
    size = max(1, _N_BLOCK // n_vocab)
    for start in range(0, n, size):
        block = slice(start, min(n, start + size))
        ours, theirs = log_softmax(reference[block]), log_softmax(candidate[block])
        rows, wanted = np.arange(len(ours)), targets[block]
        found[block, 0], found[block, 1] = ours[rows, wanted], theirs[rows, wanted]
        found[block, 3] = ours.argmax(axis=1) == theirs.argmax(axis=1)
        # Rounding can leave a sum just below 0, which no divergence is.
        found[block, 2] = np.maximum(0.0, (np.exp(ours) * (ours - theirs)).sum(axis=1))
    return found


def _summarise(scores: Values, n_context: int, n_chunks: int) -> Drift:
    ours, theirs, divergence, same = scores.T
    return Drift(
        n_context=n_context,
        n_chunks=n_chunks,
        n_scored=len(scores),
        reference_perplexity=_perplexity(ours),
        candidate_perplexity=_perplexity(theirs),
        divergence=Mean.of(divergence),
        divergence_p99=float(np.percentile(divergence, 99)),
        divergence_max=float(divergence.max()),
        same_top=Mean.of(same),
        log_probability_difference=Mean.of(theirs - ours),
    )


def _perplexity(log_probabilities: Values) -> Mean:
    mean = Mean.of(-log_probabilities)
    # Random weights can reach what no float64 holds.
    value = math.exp(min(mean.value, 600.0))
    return Mean(value, value * mean.error)
