"""The one seam of the project: something that evaluates tokens of many sequences and returns logits.

A local GGUF file is an `Engine`, a ring of machines is another, a script in a test a third. What is planned fits
without changing it:

- several rows of logits for one sequence (lossless speculation): `Span.n_logits` already asks for any number;
- embeddings in place of tokens (continuous thinking): a second kind of span with an `(n, n_embd)` array where
  `Span` has ids; the loop's `Blend` action would make one, all else in the batch stays;
- hidden states on request: a method beside `collect` that returns the `(n_rows, n_embd)` array of the batch just
  collected, since the rows are in the same order as the logits;
- batches under way: `submit` and `collect` are apart, so a ring of machines works on several batches at once; one
  machine evaluates at `submit`;
- a second model: a second `Engine` held by whoever runs both; no engine knows of another.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]
"""Logits of one position, shape (n_vocab,)."""
Logits = NDArray[np.float32]
"""Logits of the rows asked for, shape (n_rows, n_vocab), valid until the engine is used again."""


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one sequence, the first at `position`; logits are wanted for the last `n_logits`."""

    sequence_id: int
    position: int
    tokens: list[int]
    n_logits: int = 1


Batch = list[Span]
"""At most one span per sequence and at most `Engine.n_batch` tokens in all."""


_LEAST_PIECE = 16
"""Tokens of a prompt; with fewer rows most kernels cost nearly as much for each as with one row alone."""


def piece_size(n_tokens: int, n_batch: int, n_in_flight: int) -> int:
    """Most tokens of a prompt of `n_tokens` in one batch.

    The machines of a ring wait for the first piece and after the last one, so a short prompt is cut into as many pieces
    as can be under way. More would wait less and be slower to compute. One machine takes whole batches."""
    if n_in_flight == 1:
        return n_batch
    return min(n_batch, max(1, -(-n_tokens // (n_in_flight * _LEAST_PIECE))) * _LEAST_PIECE)


class Engine(Protocol):
    """Evaluates batches; keeps one key-value cache of `n_context` cells for `n_sequences` sequences."""

    n_vocab: int
    n_context: int
    """Cells of the cache: what all sequences hold together, a shared prefix counted once."""
    n_context_sequence: int
    """Most tokens of one sequence, at most what the model was trained for."""
    n_sequences: int
    n_batch: int
    notes: tuple[str, ...]
    """Sentences on what was reduced to fit into the memory."""
    can_rewind: bool
    """False where only a whole sequence can be forgotten, as with recurrent models."""
    is_forgetful: bool
    """True where a rewind may find that what it needs is gone, as with recurrent models and sliding windows: who will
    come back to a place makes a fork there in time, a checkpoint."""

    @property
    def n_in_flight(self) -> int:
        """Batches that are worth submitting before the first is collected: 1 on one machine."""
        ...

    @property
    def n_spread(self) -> int:
        """Of these, as many as decoding sequences are spread over: those of one batch share the reading of weights."""
        ...

    def begin_request(self) -> None:
        """A request begins: what would interrupt an answer may be done now."""
        ...

    def submit(self, batch: Batch) -> None:
        """Hand a batch over; memory operations that follow see it done. Raises ContextFull, nothing changed."""
        ...

    def collect(self) -> Logits:
        """The wanted rows of the oldest batch that was submitted, in its order."""
        ...

    def discard(self) -> None:
        """Forget the rows of all batches that were submitted and not collected."""
        ...

    def fork(self, source: int, target: int, n_tokens: int) -> int:
        """Let the empty sequence `target` share the first `n_tokens` of `source`, which must be all that
        `source` holds where `can_rewind` is false; how many it holds then, which is none where they are not all there
        any more."""
        ...

    def rewind(self, sequence_id: int, n_tokens: int) -> int:
        """Forget all but the first `n_tokens` of a sequence; 0 drops it. How many it holds then, as with `fork`."""
        ...

    def close(self) -> None:
        """Free everything; closing twice does nothing."""
        ...
