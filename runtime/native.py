"""The only importer of llama_cpp: typed calls, checked before they are made, failures mapped to our errors.

llama.cpp answers some inputs by ending the process. What is known to do so is refused here: empty batches, batches over
`n_batch`, ids out of range, positions that do not continue a sequence, models without a decoder or a cache.
"""

import ctypes
import struct
from collections import deque
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from .errors import ContextFull, DecodeFailed, ModelBroken, ModelNotFound, ModelUnsupported, OutOfMemory

CACHE_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}
"""Names of key-value cache types and their ggml numbers."""
_LONGEST_METADATA = 1 << 22
_messages: deque[str] = deque(maxlen=40)
_callbacks: list[Any] = []


@cache
def library() -> ModuleType:
    """llama_cpp, imported at first use, its log kept to the last lines."""
    import llama_cpp

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, data: Any) -> None:
        _messages.append(text.decode("utf-8", "replace").strip())

    _callbacks.append(keep)
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def _cause() -> str:
    """What llama.cpp logged about the latest failure."""
    words = ("error", "fail", "invalid", "unknown", "missing", "not within", "unable", "wrong", "corrupt", "duplicated")
    lines = [line for line in _messages if any(word in line.lower() for word in words)]
    return lines[0] if lines else "llama.cpp gave no reason"


def check_file(path: Path) -> None:
    """Refuse what is no readable GGUF file of a known version, before llama.cpp sees it."""
    if not path.exists():
        raise ModelNotFound(f"there is no model file {path}; see `localreason models list`")
    if path.is_dir():
        raise ModelNotFound(f"{path} is a folder; give the .gguf file in it")
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError as error:
        raise ModelNotFound(f"{path} cannot be read: {error.strerror}") from error
    if len(head) < 24 or head[:4] != b"GGUF":
        raise ModelBroken(f"{path} is not a GGUF file: it has {len(head)} header bytes and begins with {head[:4]!r}; get it again")
    version, n_tensors, n_values = struct.unpack("<IQQ", head[4:])
    if version not in (2, 3):
        raise ModelBroken(f"{path} is GGUF version {version}; versions 2 and 3 are read, convert it again")
    # Each tensor and each value takes at least 12 bytes of header: more than the file holds is a damaged count.
    if (n_tensors + n_values) * 12 > path.stat().st_size:
        raise ModelBroken(f"{path} claims {n_tensors} tensors and {n_values} values in {path.stat().st_size} bytes; get it again")


def load_model(path: Path, n_gpu_layers: int, vocab_only: bool = False) -> Any:
    """A model pointer. Raises ModelNotFound, ModelBroken, ModelUnsupported or OutOfMemory."""
    check_file(path)
    lib = library()
    parameters = lib.llama_model_default_params()
    parameters.n_gpu_layers = n_gpu_layers
    parameters.vocab_only = vocab_only
    _messages.clear()
    model = lib.llama_model_load_from_file(str(path).encode(), parameters)
    if not model:
        raise _load_error(path)
    if not vocab_only and (not lib.llama_model_has_decoder(model) or lib.llama_model_has_encoder(model)):
        lib.llama_model_free(model)
        raise ModelUnsupported(f"{path} is an encoder; only decoder models that write text can be run")
    return model


def _load_error(path: Path) -> Exception:
    text, cause = "\n".join(_messages).lower(), _cause()
    if "unknown model architecture" in text or "unknown pre-tokenizer" in text:
        return ModelUnsupported(f"{path} cannot be run by this llama.cpp: {cause}; update llama-cpp-python or take another file")
    if "unable to allocate" in text or "failed to allocate" in text or "out of memory" in text:
        return OutOfMemory(f"{path} does not fit into memory: {cause}; take a smaller file or fewer GPU layers")
    return ModelBroken(f"{path} is truncated or damaged: {cause}; get it again")


def metadata(model: Any) -> dict[str, str]:
    """All scalar metadata of a model as text."""
    lib = library()
    found = {}
    for index in range(lib.llama_model_meta_count(model)):
        texts = []
        for get in (lib.llama_model_meta_key_by_index, lib.llama_model_meta_val_str_by_index):
            buffer = ctypes.create_string_buffer(256)
            n = get(model, index, buffer, 256)
            if 256 <= n < _LONGEST_METADATA:
                buffer = ctypes.create_string_buffer(n + 1)
                get(model, index, buffer, n + 1)
            texts.append(buffer.value.decode("utf-8", "replace"))
        found[texts[0]] = texts[1]
    return found


class Context:
    """A llama_context and its cache, which knows how many tokens each sequence holds."""

    def __init__(self, model: Any, n_context: int, n_sequences: int, n_batch: int, n_threads: int, cache_type: str) -> None:
        lib = self._lib = library()
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = n_context
        parameters.n_batch = parameters.n_ubatch = n_batch
        parameters.n_seq_max = n_sequences
        parameters.n_threads = parameters.n_threads_batch = n_threads
        parameters.type_k = parameters.type_v = CACHE_TYPES[cache_type]
        parameters.kv_unified = True
        parameters.no_perf = True
        _messages.clear()
        self.pointer = lib.llama_init_from_model(model, parameters)
        if not self.pointer:
            raise OutOfMemory(
                f"a {cache_type} cache of {n_context} tokens cannot be made: {_cause()}; "
                f"give a smaller context or another cache type"
            )
        self._memory = lib.llama_get_memory(self.pointer)
        if not self._memory:
            lib.llama_free(self.pointer)
            raise ModelUnsupported("the model has no cache and cannot write text token by token; take another file")
        self.n_batch = n_batch
        self.n_context = lib.llama_n_ctx(self.pointer)
        self.lengths = [0] * n_sequences
        self._vocab = lib.llama_model_get_vocab(model)
        self._n_vocab = lib.llama_vocab_n_tokens(self._vocab)
        self._batch = lib.llama_batch_init(n_batch, 0, 1)
        self._tokens = np.ctypeslib.as_array(self._batch.token, (n_batch,))
        self._positions = np.ctypeslib.as_array(self._batch.pos, (n_batch,))
        self._wanted = np.ctypeslib.as_array(self._batch.logits, (n_batch,))
        ids = ctypes.cast(self._batch.seq_id, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32)))
        counts = np.ctypeslib.as_array(self._batch.n_seq_id, (n_batch,))
        counts[:] = 1
        # The one sequence id of each place, as a table of their addresses: written without a Python loop.
        self._ids = [np.ctypeslib.as_array(ids[i], (1,)) for i in range(n_batch)]

    def decode(self, spans: list[tuple[int, int, list[int], int]]) -> np.ndarray:
        """Evaluate spans of (sequence, position, tokens, wanted rows); rows wanted as a view of llama.cpp's buffer."""
        n = 0
        n_rows = 0
        for sequence, position, tokens, n_logits in spans:
            self._check(sequence, position, tokens, n_logits, n)
            end = n + len(tokens)
            self._tokens[n:end] = tokens
            self._positions[n:end] = np.arange(position, position + len(tokens)) if len(tokens) > 1 else position
            self._wanted[n:end] = 0
            if n_logits:
                self._wanted[end - n_logits : end] = 1
            for i in range(n, end):
                self._ids[i][0] = sequence
            n, n_rows = end, n_rows + n_logits
        if not n:
            raise DecodeFailed("an empty batch was to be decoded; a span needs at least one token")
        self._batch.n_tokens = n
        status = self._lib.llama_decode(self.pointer, self._batch)
        if status:
            self._raise(status, n)
        for sequence, position, tokens, _ in spans:
            self.lengths[sequence] = position + len(tokens)
        if not n_rows:
            return np.empty((0, self._n_vocab), dtype=np.float32)
        pointer = self._lib.llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(pointer, (n_rows, self._n_vocab))

    def _check(self, sequence: int, position: int, tokens: list[int], n_logits: int, n: int) -> None:
        self.check_sequence(sequence)
        if not tokens or n + len(tokens) > self.n_batch:
            raise DecodeFailed(f"a batch of {n + len(tokens)} tokens was to be decoded; it holds 1 to {self.n_batch}")
        if position != self.lengths[sequence]:
            raise DecodeFailed(f"position {position} does not continue sequence {sequence} of {self.lengths[sequence]} tokens")
        if min(tokens) < 0 or max(tokens) >= self._n_vocab:
            raise DecodeFailed(f"token ids {min(tokens)} to {max(tokens)} are not within the vocabulary of {self._n_vocab}")
        if not 0 <= n_logits <= len(tokens):
            raise DecodeFailed(f"{n_logits} rows of logits were asked for of {len(tokens)} tokens")

    def _raise(self, status: int, n: int) -> None:
        if status == 1:
            raise ContextFull(f"no room for {n} more tokens in a cache of {self.n_context}; give a larger context")
        if status == 2:
            raise DecodeFailed("decoding was aborted")
        raise DecodeFailed(f"llama_decode failed with {status} on {n} tokens: {_cause()}")

    def check_sequence(self, sequence: int) -> None:
        """Refuse a sequence id that the cache does not have."""
        if not 0 <= sequence < len(self.lengths):
            raise DecodeFailed(f"there is no sequence {sequence}; the cache has {len(self.lengths)}")

    def remove(self, sequence: int, n_kept: int) -> None:
        """Forget all but the first `n_kept` tokens of a sequence."""
        self.check_sequence(sequence)
        if n_kept >= self.lengths[sequence]:
            return
        if not self._lib.llama_memory_seq_rm(self._memory, sequence, n_kept if n_kept > 0 else -1, -1):
            raise DecodeFailed(f"the model cannot forget a part of a sequence (from token {n_kept}); forget all of it")
        self.lengths[sequence] = max(n_kept, 0)

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        """Let an empty sequence share the first tokens of another."""
        self.check_sequence(source)
        self.check_sequence(target)
        if source == target or self.lengths[target] or not 0 <= n_tokens <= self.lengths[source]:
            raise DecodeFailed(
                f"sequence {target} of {self.lengths[target]} tokens cannot take {n_tokens} of the "
                f"{self.lengths[source]} tokens of sequence {source}"
            )
        if n_tokens:
            self._lib.llama_memory_seq_cp(self._memory, source, target, 0 if n_tokens < self.lengths[source] else -1,
                                          n_tokens if n_tokens < self.lengths[source] else -1)
            self.lengths[target] = n_tokens

    def get_state(self, sequence: int) -> bytes:
        """The cache of one sequence as bytes."""
        self.check_sequence(sequence)
        size = self._lib.llama_state_seq_get_size(self.pointer, sequence)
        buffer = (ctypes.c_uint8 * size)()
        return bytes(buffer[: self._lib.llama_state_seq_get_data(self.pointer, buffer, size, sequence)])

    def set_state(self, sequence: int, state: bytes, n_tokens: int) -> bool:
        """Put such bytes into an empty sequence; False where llama.cpp refuses them."""
        buffer = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if not self._lib.llama_state_seq_set_data(self.pointer, buffer, len(state), sequence):
            self._lib.llama_memory_seq_rm(self._memory, sequence, -1, -1)
            return False
        self.lengths[sequence] = n_tokens
        if self._lib.llama_memory_seq_pos_max(self._memory, sequence) != n_tokens - 1:
            self.remove(sequence, 0)
            return False
        return True

    def warm(self, token: int) -> None:
        """Evaluate one token for nothing, so that weights are read and threads started."""
        self._lib.llama_set_warmup(self.pointer, True)
        self.decode([(0, 0, [token], 0)])
        self._lib.llama_set_warmup(self.pointer, False)
        self.remove(0, 0)

    def close(self) -> None:
        if self.pointer:
            self._lib.llama_batch_free(self._batch)
            self._lib.llama_free(self.pointer)
            self.pointer = None
