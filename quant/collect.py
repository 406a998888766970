"""Collects an importance matrix: texts through a model, in chunks that each begin a context of their own."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np

from ..runtime.cache import Cache
from ..runtime.engine import Span
from ..runtime.errors import DecodeFailed, InputError, ModelUnsupported
from ..runtime.llama import LlamaTokenizer
from ..runtime.native import Model, library
from ..runtime.room import available_bytes, cell_bytes, check_room
from .activations import Squares
from .gguf import ModelFile
from .imatrix import Entry, Importance
from .traces import Trace, trace_encoder

CHUNK_TOKENS = 512
"""What llama-imatrix takes, too."""
_N_BATCH = 128
_ALL_LAYERS = 10_000


def collect(
    model: Path,
    documents: Iterable[Trace] | Iterable[str],
    dataset: str,
    n_tokens: int | None = None,
    n_threads: int = 1,
    n_gpu_layers: int | None = None,
    report: Callable[[int], None] | None = None,
) -> Importance:
    """Evaluate texts, at most `n_tokens` tokens of them, and sum the squares of each weight's inputs.

    `report` is told of the tokens done. Layers go to a GPU where there is one: all, if their number is not given.
    A KeyboardInterrupt ends the reading; the matrix is of what was read. Raises ModelError, OutOfMemory, InputError,
    DecodeFailed.
    """
    names = [name for name in ModelFile(model).tensors if name.startswith("blk.") or name == "output.weight"]
    squares = Squares([name for name in names if name.endswith(".weight")])
    n_gpu_layers = (
        (_ALL_LAYERS if n_gpu_layers is None else n_gpu_layers) if library().llama_supports_gpu_offload() else 0
    )
    opened = Model(model, n_gpu_layers)
    try:
        if not n_gpu_layers:
            check_room(CHUNK_TOKENS, cell_bytes(opened.header, "f16"), available_bytes())
        tokenizer = LlamaTokenizer(opened)
        n_chunk = min(CHUNK_TOKENS, opened.n_context_train or CHUNK_TOKENS)
        chunks = _chunks(documents, tokenizer, n_chunk, n_tokens)
        cache = Cache(opened, n_chunk, 1, _N_BATCH, n_threads, "f16", watch=squares.callback)
        try:
            n_done, is_whole = _evaluate(cache, squares, chunks, report)
        finally:
            cache.close()
    finally:
        opened.close()
    if not n_done:
        raise InputError(f"{dataset} holds no text; give a file with some")
    if not squares.sums:
        raise ModelUnsupported(f"{model} has no weights whose inputs can be watched; take another model")
    return _importance(squares, n_done, n_chunk, dataset, is_whole)


def _evaluate(
    cache: Cache, squares: Squares, chunks: Iterator[list[int]], report: Callable[[int], None] | None
) -> tuple[int, bool]:
    """Run the chunks in a thread of their own, which Ctrl-C does not reach; the number of tokens, and whether these are
    all. Each matrix counts its rows, so it may be left in the middle of a batch."""
    n_done = 0
    with ThreadPoolExecutor(1) as worker:
        try:
            for chunk in chunks:
                for start in range(0, len(chunk), cache.n_batch):
                    part = chunk[start : start + cache.n_batch]
                    # All rows: what no logits are wanted of leaves the graph before the last layer's end.
                    worker.submit(cache.decode, [Span(0, start, part, len(part))]).result()
                    if squares.failure is not None:
                        raise DecodeFailed(
                            f"{squares.failure} behind token {n_done}; take another file of the model"
                        ) from squares.failure
                    n_done += len(part)
                    if report is not None:
                        report(n_done)
                cache.remove(0, 0)
        except KeyboardInterrupt:
            squares.is_stopped = True
            if not n_done:
                raise
            return n_done, False
        except BaseException:
            squares.is_stopped = True
            raise
    return n_done, True


def _importance(squares: Squares, n_tokens: int, n_chunk: int, dataset: str, is_whole: bool) -> Importance:
    entries = {
        name: Entry(sums.astype(np.float32), squares.counts[name].astype(np.float32))
        for name, sums in squares.sums.items()
    }
    return Importance(entries, -(-n_tokens // n_chunk), n_chunk, dataset, n_tokens, is_whole)


def _chunks(
    documents: Iterable[Trace] | Iterable[str], tokenizer: LlamaTokenizer, n_chunk: int, n_tokens: int | None
) -> Iterator[list[int]]:
    """Tokens by chunks, each beginning as a prompt of the model does."""
    encode_trace, prefix, n_left = trace_encoder(tokenizer), tokenizer.prefix, n_tokens
    for document in documents:
        tokens = encode_trace(document) if isinstance(document, Trace) else tokenizer.encode(document, is_first=True)
        left = iter(tokens if n_left is None else tokens[:n_left])
        while body := list(islice(left, n_chunk - len(prefix))):
            yield prefix + body
            n_left = None if n_left is None else n_left - len(body)
        if n_left == 0:
            return
