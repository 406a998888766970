"""`Engine` and `Tokenizer` over a GGUF file, by llama.cpp."""

import ctypes
import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from . import native
from .engine import Batch, Logits
from .errors import InputError, OutOfMemory, StateError

_MAGIC = b"LRSTATE1"
_RESERVE_BYTES = 512 << 20
"""Memory left to the rest of the machine when the context is sized by what is free."""
_BYTES_PER_VALUE = {"f16": 2.0, "q8_0": 34 / 32, "q4_0": 18 / 32}
_MARK_ATTRIBUTES = 1 << 3 | 1 << 4
"""llama.cpp's CONTROL and USER_DEFINED."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a file is loaded. `n_context` None takes what fits the free memory, `n_threads` None the physical cores,
    `n_gpu_layers` None all layers where the build has a GPU. Raises InputError for a value out of range."""

    n_context: int | None = None
    n_sequences: int = 8
    n_threads: int | None = None
    n_gpu_layers: int | None = None
    cache_type: str = "f16"

    def __post_init__(self) -> None:
        if self.cache_type not in native.CACHE_TYPES:
            raise InputError(f"cache type {self.cache_type!r} is not known; choose one of {', '.join(native.CACHE_TYPES)}")
        for name, low, high in (
            ("n_context", 16, 1 << 24),
            ("n_sequences", 1, 256),
            ("n_threads", 1, 1024),
            ("n_gpu_layers", 0, 10_000),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} is {value}; give a value from {low} to {high}")


class LlamaTokenizer:
    """A GGUF file's vocabulary. `prefix` is what a prompt begins with, `control_texts` the texts of its marks."""

    def __init__(self, model: Any) -> None:
        self._lib = native.library()
        self._vocab = self._lib.llama_model_get_vocab(model)
        self.n_vocab = self._lib.llama_vocab_n_tokens(self._vocab)
        self._pieces: list[bytes | None] = [None] * self.n_vocab
        self._ends = frozenset(i for i in range(self.n_vocab) if self._lib.llama_vocab_is_eog(self._vocab, i))
        bos = self._lib.llama_vocab_bos(self._vocab)
        self.prefix = [bos] if self._lib.llama_vocab_get_add_bos(self._vocab) and bos >= 0 else []
        marks = (i for i in range(self.n_vocab) if self._lib.llama_vocab_get_attr(self._vocab, i) & _MARK_ATTRIBUTES)
        texts = (self.piece(i).decode("utf-8", "replace") for i in marks)
        # Runs of spaces and newlines are user-defined in some vocabularies; they are ordinary text.
        self.control_texts = frozenset(text for text in texts if len(text) > 2 and text[0] in "<[" and text[-1] in ">]")

    def encode(self, text: str, special: bool = False) -> list[int]:
        data = text.encode("utf-8", "replace")
        if not data:
            return []
        size = len(data) + 8
        ids = (ctypes.c_int32 * size)()
        n = self._lib.llama_tokenize(self._vocab, data, len(data), ids, size, False, special)
        if n < 0:
            ids = (ctypes.c_int32 * -n)()
            n = self._lib.llama_tokenize(self._vocab, data, len(data), ids, -n, False, special)
        return list(ids[: max(n, 0)])

    def piece(self, token: int) -> bytes:
        piece = self._pieces[token]
        if piece is None:
            piece = self._pieces[token] = self._read_piece(token)
        return piece

    def _read_piece(self, token: int) -> bytes:
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, True)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def is_end(self, token: int) -> bool:
        return token in self._ends


class LlamaEngine:
    """A GGUF file's model and cache as an `Engine`; a context manager. Made by `load`."""

    def __init__(self, path: Path, model: Any, options: EngineOptions) -> None:
        self._lib = native.library()
        self._model = model
        self._context: native.Context | None = None
        self.path = path
        self.metadata = native.metadata(model)
        self.architecture = self.metadata.get("general.architecture", "")
        self.n_context_train = self._lib.llama_model_n_ctx_train(model) or 4096
        template = self._lib.llama_model_chat_template(model, None)
        self.chat_template: str | None = template.decode("utf-8", "replace") if template else None
        self.can_rewind = not (self._lib.llama_model_is_recurrent(model) or self._lib.llama_model_is_hybrid(model))
        self.n_sequences = options.n_sequences
        is_offloaded = bool(_gpu_layers(options))
        self.n_batch = max(512 if is_offloaded else 128, options.n_sequences)
        n_context = options.n_context or self._fitting_context(options)
        self._context = native.Context(
            model, n_context, options.n_sequences, self.n_batch, options.n_threads or _physical_cores(), options.cache_type
        )
        self.n_context = self._context.n_context
        self.n_context_sequence = min(self.n_context, self.n_context_train)
        self.n_vocab = self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(model))
        self._context.warm(0)

    @property
    def context(self) -> Any:
        """The native context, for measuring beside the engine."""
        return self._open.pointer

    @property
    def _open(self) -> native.Context:
        assert self._context is not None, "the engine is closed"
        return self._context

    @property
    def bytes_per_cell(self) -> int:
        """Cache bytes of one token as f16, every layer counted as full attention."""
        layers = _integers(self.metadata.get(f"{self.architecture}.block_count", "1"))[0]
        n_heads = _integers(self.metadata.get(f"{self.architecture}.attention.head_count", "1"))[0] or 1
        n_kv = max(_integers(self.metadata.get(f"{self.architecture}.attention.head_count_kv", str(n_heads))))
        width = self._lib.llama_model_n_embd(self._model) // n_heads
        key = int(self.metadata.get(f"{self.architecture}.attention.key_length", width))
        value = int(self.metadata.get(f"{self.architecture}.attention.value_length", width))
        return max(1, layers * n_kv * (key + value) * 2)

    def _fitting_context(self, options: EngineOptions) -> int:
        """Cells for every sequence at the trained length, or what half of the free memory holds."""
        wanted = self.n_context_train * options.n_sequences
        per_cell = self.bytes_per_cell * _BYTES_PER_VALUE[options.cache_type] / 2
        weights = self._lib.llama_model_size(self._model)
        free = psutil.virtual_memory().available - weights - _RESERVE_BYTES
        fits = int(max(free, 0) / 2 / per_cell)
        if fits < 256:
            raise OutOfMemory(
                f"{max(free, 0) >> 20} MiB are free beside the weights, a context of 256 tokens needs "
                f"{int(256 * 2 * per_cell) >> 20} MiB; close other programs or take a smaller file"
            )
        return max(256, min(wanted, fits) // 256 * 256)

    def decode(self, batch: Batch) -> Logits:
        return self._open.decode([(span.sequence_id, span.position, span.tokens, span.n_logits) for span in batch])

    def fork(self, source: int, target: int, n_tokens: int) -> None:
        self._open.copy(source, target, n_tokens)

    def rewind(self, sequence_id: int, n_tokens: int) -> None:
        self._open.remove(sequence_id, n_tokens)

    @property
    def _fingerprint(self) -> bytes:
        """Sixteen bytes that differ between models whose states do not fit each other."""
        digest = hashlib.sha256(repr(sorted(self.metadata.items())).encode())
        digest.update(struct.pack("<QQ", self.n_vocab, self._lib.llama_model_size(self._model)))
        return digest.digest()[:16]

    def save(self, sequence_id: int, tokens: list[int], path: Path) -> None:
        """Write a sequence and its tokens; the file appears whole or not at all. Raises StateError."""
        state = self._open.get_state(sequence_id)
        if len(tokens) != self._open.lengths[sequence_id]:
            raise StateError(f"{len(tokens)} tokens were given for a sequence of {self._open.lengths[sequence_id]}")
        body = struct.pack("<QQ", len(tokens), len(state)) + np.array(tokens, dtype="<i4").tobytes() + state
        head = _MAGIC + self._fingerprint + hashlib.sha256(body).digest()
        scratch = path.with_name(path.name + ".part")
        try:
            with scratch.open("wb") as file:
                file.write(head + body)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise StateError(f"{path} cannot be written: {error.strerror}; free space or choose another place") from error

    def restore(self, sequence_id: int, path: Path) -> list[int]:
        """Read what `save` wrote into an empty sequence. Raises StateError for any other file."""
        self._open.check_sequence(sequence_id)
        if self._open.lengths[sequence_id]:
            raise StateError(f"sequence {sequence_id} holds {self._open.lengths[sequence_id]} tokens; drop it first")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StateError(f"{path} cannot be read: {error.strerror}") from error
        if data[:8] != _MAGIC:
            raise StateError(f"{path} is not a saved sequence state")
        if data[8:24] != self._fingerprint:
            raise StateError(f"{path} was saved with another model; open it with the model that wrote it")
        body = data[56:]
        # llama.cpp trusts a state's sizes, so it sees only bytes that are as they were written.
        if hashlib.sha256(body).digest() != data[24:56]:
            raise StateError(f"{path} is truncated or damaged ({len(data)} bytes); delete it")
        n_tokens, n_state = struct.unpack_from("<QQ", body)
        tokens = np.frombuffer(body, "<i4", n_tokens, 16).tolist()
        if not self._open.set_state(sequence_id, body[16 + 4 * n_tokens :][:n_state], n_tokens):
            raise StateError(f"{path} does not fit the cache: its type or its room differ; open the model as it was")
        return tokens

    def close(self) -> None:
        """Free the cache and the weights; closing twice does nothing."""
        if self._context is not None:
            self._context.close()
            self._context = None
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> "LlamaEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(path: Path, options: EngineOptions | None = None) -> tuple[LlamaEngine, LlamaTokenizer]:
    """Open a GGUF file. Raises ModelError, OutOfMemory."""
    options = options or EngineOptions()
    model = native.load_model(path, _gpu_layers(options))
    try:
        return LlamaEngine(path, model, options), LlamaTokenizer(model)
    except BaseException:
        native.library().llama_model_free(model)
        raise


def load_tokenizer(path: Path) -> tuple[LlamaTokenizer, dict[str, str]]:
    """The vocabulary and metadata of a file, without weights."""
    model = native.load_model(path, 0, vocab_only=True)
    return LlamaTokenizer(model), native.metadata(model)


def _gpu_layers(options: EngineOptions) -> int:
    if not native.library().llama_supports_gpu_offload():
        return 0
    return 10_000 if options.n_gpu_layers is None else options.n_gpu_layers


def _physical_cores() -> int:
    """Physical cores that this process may use."""
    process = psutil.Process()
    n_allowed = len(process.cpu_affinity()) if hasattr(process, "cpu_affinity") else psutil.cpu_count() or 1  # pyright: ignore
    return max(1, min(psutil.cpu_count(logical=False) or n_allowed, n_allowed))


def _integers(text: str) -> list[int]:
    """The numbers of a scalar or of an array as llama.cpp prints it."""
    found = [int(part) for part in text.strip("[] ").split(",") if part.strip().lstrip("-").isdigit()]
    return found or [1]
