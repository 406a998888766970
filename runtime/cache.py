"""A llama_context and its cache: batches, forks and states, each call checked against what the sequences hold."""

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import native
from .engine import Batch, Logits, Span
from .errors import ContextFull, DecodeFailed, EngineError, InputError, ModelUnsupported, OutOfMemory
from .room import padded


class Cache:
    """The cache of one model and what evaluates into it; `lengths` are the tokens that each sequence holds."""

    def __init__(
        self,
        model: native.Model,
        n_context: int,
        n_sequences: int,
        n_batch: int,
        n_threads: int,
        cache_type: str,
        tap: native.Tap | None = None,
        watch: Any = None,
    ) -> None:
        """A `tap` takes the place of logits; `watch` is ggml's callback on each node of the graph. Raises OutOfMemory,
        ModelUnsupported, InputError."""
        lib = self._lib = native.library()
        if not 1 <= n_sequences <= lib.llama_max_parallel_sequences():
            raise InputError(f"n_sequences is {n_sequences}; llama.cpp holds 1 to {lib.llama_max_parallel_sequences()}")
        if cache_type not in native.CACHE_TYPES:
            raise InputError(f"cache type {cache_type!r} is not known; choose one of {', '.join(native.CACHE_TYPES)}")
        # Rounded up here: a smaller value would also lower n_batch, and too large a batch ends the process.
        n_context = padded(n_context)
        parameters = _parameters(n_context, n_sequences, n_batch, n_threads, cache_type)
        self._tap = tap
        if tap is not None or watch is not None:
            parameters.cb_eval = tap.callback if tap is not None else watch
        native.forget_messages()
        self._pointer = None
        try:
            with native.interrupts_after():
                self._pointer = lib.llama_init_from_model(model.pointer, parameters)
        except BaseException:
            self.close()
            raise
        if not self._pointer:
            raise _context_error(model, n_context, cache_type)
        self._memory = lib.llama_get_memory(self._pointer)
        if not self._memory:
            self.close()
            raise ModelUnsupported(f"{model.path} has no cache and cannot write token by token; take another file")
        self._is_recurrent = model.is_recurrent
        self._n_window = model.n_window
        self._n_vocab = model.n_vocab
        self._n_embd = model.n_embd
        self.n_context: int = lib.llama_n_ctx(self._pointer)
        self.n_batch: int = lib.llama_n_batch(self._pointer)
        self.lengths = [0] * n_sequences
        self._decode = lib.llama_decode if tap is None and watch is None else self._decode_watched
        self._logits = native.address_of_logits()
        self._views: dict[int, Logits] = {}
        self._address = 0
        self._make_batch()

    def _make_batch(self) -> None:
        """One llama_batch over arrays of ours. Each place has one sequence id: `seq_id` points into `_ids`."""
        n = self.n_batch
        self._tokens, self._positions, self._ids, self._counts = (np.ones(n, np.int32) for _ in range(4))
        self._wanted = np.zeros(n, np.int8)
        self._places = (self._ids.ctypes.data + 4 * np.arange(n)).astype(np.uintp)
        batch = self._batch = self._lib.llama_batch()
        for name, array in (
            ("token", self._tokens),
            ("pos", self._positions),
            ("n_seq_id", self._counts),
            ("seq_id", self._places),
            ("logits", self._wanted),
        ):
            setattr(batch, name, ctypes.cast(array.ctypes.data, dict(batch._fields_)[name]))
        # The same arrays with activations in place of tokens.
        self._fed = self._lib.llama_batch.from_buffer_copy(batch)
        self._fed.token = None

    @property
    def pointer(self) -> Any:
        """The llama_context. Raises EngineError once it is freed."""
        if not self._pointer:
            raise EngineError("the engine is closed; open the model again")
        return self._pointer

    def decode(self, batch: Batch, activations: NDArray[np.float32] | None = None) -> Logits:
        """Evaluate spans; the wanted rows in the batch's order, as a view of llama.cpp's buffer.

        `activations`, shape (n_tokens, n_embd), take the place of the tokens, of which then only the number counts;
        with a tap the rows are activations too.
        """
        context, n, n_rows, native_batch = self.pointer, 0, 0, self._batch
        # Of activations no tokens are known; any number passes for one.
        self._check_batch(batch, self._n_vocab if activations is None else 1 << 31)
        for span in batch:
            size = len(span.tokens)
            if size == 1:  # most steps: every line here runs with cold caches after the weights went through them
                self._tokens[n], self._positions[n], self._ids[n] = span.tokens[0], span.position, span.sequence_id
                self._wanted[n] = span.n_logits
            else:
                end = n + size
                self._tokens[n:end] = span.tokens
                self._positions[n:end] = np.arange(span.position, span.position + size)
                self._ids[n:end] = span.sequence_id
                self._wanted[n:end] = 0
                self._wanted[end - span.n_logits : end] = 1
            n, n_rows = n + size, n_rows + span.n_logits
        if activations is not None:
            native_batch = self._fed
            native_batch.embd = self._address_of(activations, n)
        if self._tap is not None:
            self._tap.begin()
        native_batch.n_tokens = n
        try:
            status = self._decode(context, native_batch)
        except BaseException:  # Ctrl-C arrives when the call returns: the tokens are in the cache
            self._read_lengths()
            raise
        if status:
            self._fail(status, n)
        for span in batch:
            self.lengths[span.sequence_id] += len(span.tokens)
        return self._rows(n_rows) if self._tap is None else self._tapped(batch, native_batch, n_rows)

    def _decode_watched(self, context: Any, native_batch: Any) -> int:
        """Evaluate where llama.cpp calls back for each node: Ctrl-C would be lost in there."""
        with native.interrupts_after():
            return self._lib.llama_decode(context, native_batch)

    def _tapped(self, batch: Batch, native_batch: Any, n_rows: int) -> NDArray[np.float32]:
        """What the tap caught; the batch is run again where the graph was another one than before."""
        assert self._tap is not None
        if len(self._tap.rows()) != n_rows:
            for span in batch:
                self._lib.llama_memory_seq_rm(self._memory, span.sequence_id, span.position, -1)
            self._tap.begin(is_exhaustive=True)
            status = self._decode(self.pointer, native_batch)
            if status or len(self._tap.rows()) != n_rows:
                self._read_lengths()
                raise DecodeFailed(f"{len(self._tap.rows())} of {n_rows} activations came out of the window")
        return self._tap.rows()

    def _address_of(self, activations: NDArray[np.float32], n: int) -> Any:
        """A checked pointer to input rows."""
        wanted = (n, self._n_embd)
        if activations.shape != wanted or activations.dtype != np.float32 or not activations.flags.c_contiguous:
            raise DecodeFailed(
                f"activations of {activations.shape} {activations.dtype} came in place of {wanted} float32"
            )
        return ctypes.cast(activations.ctypes.data, ctypes.POINTER(ctypes.c_float))

    def _rows(self, n_rows: int) -> Logits:
        if not n_rows:
            return np.empty((0, self._n_vocab), np.float32)
        address = self._logits(self._pointer)
        view = self._views.get(n_rows) if address == self._address else None
        if view is None:
            view = self._view(address, n_rows)
        return view

    def _view(self, address: int | None, n_rows: int) -> Logits:
        """A view of llama.cpp's buffer, kept until the buffer moves."""
        if not address:
            raise DecodeFailed("llama.cpp kept no logits of the batch; report this with the model's name")
        if address != self._address:
            self._address = address
            self._views.clear()
        pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_float))
        view = self._views[n_rows] = np.ctypeslib.as_array(pointer, (n_rows, self._n_vocab))
        return view

    def _check_batch(self, batch: Batch, n_vocab: int) -> None:
        n, lengths = 0, self.lengths
        for span in batch:
            tokens, sequence = span.tokens, span.sequence_id
            size = len(tokens)
            if not 0 <= sequence < len(lengths):
                self.length(sequence)
            if not tokens:
                raise DecodeFailed(f"the span of sequence {sequence} is empty; give it 1 token or more")
            if span.position != lengths[sequence]:
                raise DecodeFailed(
                    f"position {span.position} does not continue sequence {sequence} of {lengths[sequence]} tokens"
                )
            if not (0 <= tokens[0] < n_vocab) or (size > 1 and not 0 <= min(tokens) <= max(tokens) < n_vocab):
                raise DecodeFailed(
                    f"token ids {min(tokens)} to {max(tokens)} are not within the vocabulary of {n_vocab}; "
                    f"take the tokenizer of the same model"
                )
            if not 0 <= span.n_logits <= size:
                raise DecodeFailed(f"{span.n_logits} rows of logits were asked for of {size} tokens")
            n += size
        if not 1 <= n <= self.n_batch:
            raise DecodeFailed(
                f"a batch of {n} tokens was to be decoded; it holds 1 to {self.n_batch}, feed it in parts"
            )
        if len(batch) > 1 and len({span.sequence_id for span in batch}) < len(batch):
            raise DecodeFailed("a sequence has two spans in one batch; join them")

    def _fail(self, status: int, n: int) -> None:
        why = native.cause()
        native.forget_messages()
        if status == 1:
            raise ContextFull(
                f"no room for {n} more tokens in a cache of {self.n_context}; drop a sequence or give a larger context"
            )
        self._read_lengths()
        raise DecodeFailed(f"llama_decode gave {status} for {n} tokens: {why}; try a smaller batch or context")

    def _read_lengths(self) -> None:
        for i in range(len(self.lengths)):
            self.lengths[i] = self._lib.llama_memory_seq_pos_max(self._memory, i) + 1

    def length(self, sequence: int) -> int:
        """Tokens that a sequence holds. Raises DecodeFailed for an id that the cache does not have."""
        if not 0 <= sequence < len(self.lengths):
            raise DecodeFailed(f"there is no sequence {sequence}; the cache has 0 to {len(self.lengths) - 1}")
        return self.lengths[sequence]

    def holds(self, sequence: int, n_tokens: int) -> bool:
        """Whether a sequence could go on behind its first `n_tokens`. llama.cpp gives cells to other tokens that a
        sliding window has left behind, though they would be in sight again after a rewind."""
        if not self._n_window or not self._pointer or not 0 < n_tokens < self.length(sequence):
            return True
        least = self._lib.llama_memory_seq_pos_min(self._memory, sequence)
        return least <= max(0, n_tokens - self._n_window)

    def remove(self, sequence: int, n_kept: int) -> None:
        """Forget all but the first `n_kept` tokens of a sequence."""
        held = self.length(sequence)
        if not 0 <= n_kept <= held:
            raise DecodeFailed(f"sequence {sequence} holds {held} tokens and cannot keep {n_kept}")
        if self._is_recurrent and 0 < n_kept < held:
            raise DecodeFailed(
                f"a recurrent model cannot keep {n_kept} of {held} tokens; drop the sequence, evaluate again"
            )
        if self.pointer and (n_kept < held or not n_kept):
            if not self.holds(sequence, n_kept) or not self._lib.llama_memory_seq_rm(
                self._memory, sequence, n_kept or -1, -1
            ):
                raise DecodeFailed(
                    f"the model cannot keep {n_kept} of {held} tokens; drop the sequence, evaluate again"
                )
            self.lengths[sequence] = n_kept

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        """Let an empty sequence share the first tokens of another."""
        held, taken = self.length(source), self.length(target)
        if source == target or taken or not 0 <= n_tokens <= held:
            raise DecodeFailed(
                f"sequence {target} of {taken} tokens cannot share {n_tokens} of the {held} of sequence {source}; "
                f"drop it first, share at most what is there"
            )
        is_whole = n_tokens == held
        if self._is_recurrent and not is_whole:
            raise DecodeFailed(f"a recurrent model cannot share {n_tokens} of {held} tokens; share all")
        if not self.holds(source, n_tokens):
            raise DecodeFailed(f"of {held} tokens the first {n_tokens} are not all there any more; evaluate them again")
        if self.pointer and n_tokens:
            first, end = (-1, -1) if is_whole else (0, n_tokens)
            self._lib.llama_memory_seq_cp(self._memory, source, target, first, end)
            self.lengths[target] = n_tokens

    def get_state(self, sequence: int) -> NDArray[np.uint8]:
        """The cache of one sequence as bytes."""
        self.length(sequence)
        state = np.empty(self._lib.llama_state_seq_get_size(self.pointer, sequence), np.uint8)
        n = self._lib.llama_state_seq_get_data(self.pointer, _bytes_at(state), len(state), sequence)
        return state[:n]

    def set_state(self, sequence: int, state: NDArray[np.uint8], n_tokens: int) -> bool:
        """Put such bytes into an empty sequence; False where they do not fit, and the sequence stays empty."""
        native.forget_messages()
        n = self._lib.llama_state_seq_set_data(self.pointer, _bytes_at(state), len(state), sequence)
        lib, memory = self._lib, self._memory
        is_sound = n == len(state) and lib.llama_memory_seq_pos_max(memory, sequence) == n_tokens - 1
        if not is_sound or not (self._is_recurrent or lib.llama_memory_seq_pos_min(memory, sequence) == 0):
            lib.llama_memory_seq_rm(memory, sequence, -1, -1)
            return False
        self.lengths[sequence] = n_tokens
        return True

    def warm(self, token: int) -> None:
        """Evaluate one token for nothing, so that weights are read and threads started."""
        self._lib.llama_set_warmup(self.pointer, True)
        self.decode([Span(0, 0, [token])])
        self._lib.llama_set_warmup(self.pointer, False)
        self.remove(0, 0)
        native.forget_messages()

    def close(self) -> None:
        """Free the cache; closing twice does nothing."""
        if self._pointer:
            self._lib.llama_free(self._pointer)
            self._pointer = None


def _parameters(n_context: int, n_sequences: int, n_batch: int, n_threads: int, cache_type: str) -> Any:
    lib = native.library()
    parameters = lib.llama_context_default_params()
    parameters.n_ctx, parameters.n_seq_max = n_context, n_sequences
    parameters.n_batch = parameters.n_ubatch = n_batch
    parameters.n_threads = parameters.n_threads_batch = n_threads
    parameters.type_k = parameters.type_v = native.CACHE_TYPES[cache_type]
    parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_AUTO
    parameters.kv_unified = True
    parameters.no_perf = True
    return parameters


def _bytes_at(array: NDArray[np.uint8]) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(ctypes.c_uint8))


def _context_error(model: native.Model, n_context: int, cache_type: str) -> EngineError | ModelUnsupported:
    why = native.cause()
    if native.is_out_of_memory():
        return OutOfMemory(
            f"a {cache_type} cache of {n_context} tokens does not fit into memory: {why}; "
            f"give a smaller context or the cache type q8_0"
        )
    return ModelUnsupported(
        f"{model.path} cannot be run with a {cache_type} cache: {why}; try f16 or take another file"
    )
