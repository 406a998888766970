"""`Engine` and `Tokenizer` over one GGUF file, by llama.cpp."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from . import devices
from .cache import Cache
from .engine import Batch, Logits
from .errors import InputError, OutOfMemory, StateError
from .fit import N_BATCH_CPU, N_BATCH_GPU, Fit, Free, Wish, fit
from .grammar import Grammar
from .header import Header, check_header
from .memory import repacked_schemes
from .native import CACHE_TYPES, Model, library
from .parts import join, read_local
from .room import Memory, available_bytes, cell_bytes
from .state import fingerprint, read_state, write_state

_ALL_LAYERS = 10_000
_N_CONTEXT_UNKNOWN = 4096


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How a file is opened. None takes what fits: a context for the free memory, a cache of f16, or of q8_0 where f16
    does not hold what is needed, the physical cores that this process may use, as many layers on a GPU as it holds,
    batches of 128 tokens or 512 with a GPU. Raises InputError."""

    n_context: int | None = None
    n_sequences: int = 8
    n_threads: int | None = None
    n_gpu_layers: int | None = None
    cache_type: str | None = None
    n_batch: int | None = None
    use_mmap: bool = True
    n_needed: int | None = None
    """Tokens beyond which a larger context has no use; a context that is not given is not made larger."""
    n_busy: int = 1
    """Sequences that will usually decode at once: what a ring is planned for."""

    def __post_init__(self) -> None:
        if self.cache_type is not None and self.cache_type not in CACHE_TYPES:
            raise InputError(f"cache_type is {self.cache_type!r}; give one of {', '.join(CACHE_TYPES)}")
        for name, low, high in (
            ("n_context", 16, 1 << 24),
            ("n_sequences", 1, 256),
            ("n_threads", 1, 512),
            ("n_gpu_layers", 0, _ALL_LAYERS),
            ("n_batch", 1, 4096),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise InputError(f"{name} is {value}; give a value from {low} to {high}")


class LlamaTokenizer:
    """A GGUF file's vocabulary; a context manager where it was opened alone, by `load_tokenizer`.

    `prefix` is what a prompt begins with: BOS, where the model wants it. `control_texts` are the texts of its marks.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.n_vocab = model.n_vocab
        self.prefix: list[int] = model.prefix()
        self._pieces: list[bytes | None] = [None] * self.n_vocab
        self._ends = model.ends()
        texts = (self.piece(token).decode("utf-8", "replace") for token in model.marks())
        # Runs of spaces and newlines are user-defined in some vocabularies; they are ordinary text.
        self.control_texts = frozenset(text for text in texts if len(text) > 2 and text[0] in "<[" and text[-1] in ">]")

    def encode(self, text: str, special: bool = False, is_first: bool = False) -> list[int]:
        """Token ids of a text, without BOS; halves of surrogate pairs become "?"."""
        data = text.encode("utf-8", "replace")
        if not data:
            return []
        if not is_first and (lead := self._lead):
            ids = self._model.tokenize(b"\n" + data, special)
            if ids[: len(lead)] == lead:
                return ids[len(lead) :]
        return self._model.tokenize(data, special)

    @cached_property
    def _lead(self) -> list[int]:
        """What a newline at the beginning is, with the space that SentencePiece puts before it; nothing in
        vocabularies that put none."""
        word = self._model.tokenize(b"a", False)
        return self._model.tokenize(b"\n", False) if word and self.piece(word[0]).startswith(b" ") else []

    def piece(self, token: int) -> bytes:
        piece = self._pieces[token]
        if piece is None:
            piece = self._pieces[token] = self._model.piece(token)
        return piece

    def is_end(self, token: int) -> bool:
        return token in self._ends

    def grammar(self, rules: str) -> Grammar:
        """The state of one text in a grammar over this vocabulary. Raises InputError."""
        return Grammar(self._model.vocabulary, self.n_vocab, self.piece, rules)

    @property
    def metadata(self) -> dict[str, str]:
        """All scalar metadata of the file as text."""
        return self._model.metadata()

    @property
    def template_tokens(self) -> dict[str, str]:
        """What a chat template knows as `bos_token` and `eos_token`."""
        return self._model.template_tokens()

    @property
    def chat_template(self) -> str | None:
        return self._model.chat_template

    def close(self) -> None:
        """Free the model; closing twice, or after its engine, does nothing."""
        self._model.close()

    def __enter__(self) -> "LlamaTokenizer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LlamaEngine:
    """A GGUF file's model and cache as an `Engine`; a context manager. Made by `load`.

    `notes` are sentences on what was reduced to fit into the memory.
    """

    def __init__(self, model: Model, options: EngineOptions, fitted: Fit) -> None:
        self._model = model
        self.path = model.path
        self.architecture = str(model.header.get("general.architecture", ""))
        self.n_context_train = model.n_context_train or _N_CONTEXT_UNKNOWN
        self.can_rewind = not model.is_recurrent
        self.is_forgetful = model.is_recurrent or model.n_window > 0
        self.n_vocab = model.n_vocab
        self._cache = _open_cache(model, options, fitted)
        self.notes = fitted.notes
        self._rows: Logits = np.empty((0, model.n_vocab), np.float32)
        self.n_sequences = options.n_sequences
        self.n_batch = self._cache.n_batch
        self.n_context = self._cache.n_context
        self.n_context_sequence = min(self.n_context, self.n_context_train)
        per_cell = cell_bytes(model.header, fitted.cache_type)
        self.memory = Memory(model.n_bytes, int(per_cell * self.n_context), self.n_context, fitted.cache_type)

    @property
    def context(self) -> Any:
        """llama.cpp's own context, for measuring beside the engine."""
        return self._cache.pointer

    def decode(self, batch: Batch) -> Logits:
        """Evaluate the batch; the rows are llama.cpp's own memory until the next decode. Raises ContextFull,
        DecodeFailed."""
        return self._cache.decode(batch)

    n_in_flight = n_spread = 1

    def begin_request(self) -> None:
        """There is nothing to be done."""

    def submit(self, batch: Batch) -> None:
        """Evaluate the batch; its rows wait for `collect`."""
        self._rows = self._cache.decode(batch)

    def collect(self) -> Logits:
        return self._rows

    def discard(self) -> None:
        """There is nothing that could come back later."""

    def fork(self, source: int, target: int, n_tokens: int) -> int:
        if not self._cache.holds(source, n_tokens):
            return 0
        self._cache.copy(source, target, n_tokens)
        return n_tokens

    def rewind(self, sequence_id: int, n_tokens: int) -> int:
        n_kept = n_tokens if self._cache.holds(sequence_id, n_tokens) else 0
        self._cache.remove(sequence_id, n_kept)
        return n_kept

    @cached_property
    def _fingerprint(self) -> bytes:
        return fingerprint(self.path)

    def save(self, sequence_id: int, tokens: list[int], path: Path) -> None:
        """Write a sequence and its tokens; the file appears whole or not at all. Raises StateError."""
        held = self._cache.length(sequence_id)
        if len(tokens) != held or not held:
            raise StateError(
                f"{len(tokens)} tokens were given for sequence {sequence_id} of {held}; give what it holds"
            )
        write_state(path, self._fingerprint, tokens, self._cache.get_state(sequence_id))

    def restore(self, sequence_id: int, path: Path) -> list[int]:
        """Read what `save` wrote into an empty sequence. Raises StateError for any other file."""
        held = self._cache.length(sequence_id)
        if held:
            raise StateError(f"sequence {sequence_id} holds {held} tokens; drop it first")
        tokens, state = read_state(path, self._fingerprint, self.n_context, self.n_vocab)
        if not self._cache.set_state(sequence_id, state, len(tokens)):
            raise StateError(
                f"{path} of {len(tokens)} tokens does not fit this cache of {self.n_context} {self.memory.cache_type} "
                f"cells; drop other sequences or open the model as it was"
            )
        return tokens

    def close(self) -> None:
        """Free the cache and the weights; closing twice does nothing."""
        self._cache.close()
        self._model.close()

    def __enter__(self) -> "LlamaEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(path: Path, options: EngineOptions | None = None) -> tuple[LlamaEngine, LlamaTokenizer]:
    """Open a GGUF file, or the model of which it is a part; closing the engine frees both. Raises ModelError,
    OutOfMemory."""
    asked = options or EngineOptions()
    pieces, options = read_local(Path(path)), _complete(asked)
    path, header = Path(pieces[0].name), join(pieces)  # llama.cpp finds the other parts by the first
    check_header(header.values, path)
    fitted = _fit(header, options)
    fitted = replace(fitted, notes=(*_unmet(asked, _n_train(header)), *fitted.notes))
    model = Model(path, fitted.n_gpu_layers, options.use_mmap, header=header.values)
    try:
        tokenizer = LlamaTokenizer(model)
        return LlamaEngine(model, options, fitted), tokenizer
    except BaseException:
        model.close()
        raise


def load_tokenizer(path: Path) -> LlamaTokenizer:
    """The vocabulary of a file, or of the model of which it is a part, without its weights. Raises ModelError."""
    model = Model(Path(read_local(Path(path))[0].name), vocab_only=True)
    try:
        return LlamaTokenizer(model)
    except BaseException:
        model.close()
        raise


def _complete(options: EngineOptions) -> EngineOptions:
    """The options with batch and threads decided, and no layers for a GPU that is not there."""
    has_gpu = library().llama_supports_gpu_offload() and options.n_gpu_layers != 0
    n_batch = options.n_batch or (N_BATCH_GPU if has_gpu else N_BATCH_CPU)
    return replace(
        options,
        n_gpu_layers=options.n_gpu_layers if has_gpu else 0,
        n_batch=max(n_batch, options.n_sequences),
        n_threads=options.n_threads or physical_cores(),
    )


def _n_train(header: Header) -> int:
    """Tokens that the model was trained for."""
    found = header.values.get(f"{header.values.get('general.architecture')}.context_length")
    return found if isinstance(found, int) and found > 0 else _N_CONTEXT_UNKNOWN


def _unmet(asked: EngineOptions, n_train: int) -> Iterator[str]:
    """What was asked for and is not to be had, whatever the memory."""
    if asked.n_gpu_layers and not library().llama_supports_gpu_offload():
        yield (
            f"none of the {asked.n_gpu_layers} layers is on a GPU: llama.cpp is built without one, or finds none; see "
            f"`localreason doctor`"
        )
    if asked.n_context is not None and asked.n_context > n_train and asked.n_busy == 1:
        yield f"a reply with its prompt has room for {n_train} of {asked.n_context} tokens: for no more was it trained"


def free_memory(is_gpu_wanted: bool = True) -> Free:
    """What is free now on this machine and, if they are wanted, on its GPUs."""
    gpu = devices.gpu_memory() if is_gpu_wanted else None
    if gpu is None:
        return Free(available_bytes())
    return Free(available_bytes(), gpu.free_bytes, gpu.n_devices, gpu.is_shared)


def _fit(header: Header, options: EngineOptions) -> Fit:
    """What the memory that is free now holds of the options. Raises OutOfMemory, ModelUnsupported."""
    free = free_memory(options.n_gpu_layers != 0)
    wish = Wish(
        options.n_context,
        _n_train(header),
        options.n_needed,
        options.cache_type,
        _ALL_LAYERS if options.n_gpu_layers is None and free.gpu_bytes is None else options.n_gpu_layers,
        options.n_batch or 1,
        options.n_sequences,
        options.use_mmap,
    )
    return fit(header, wish, free, repacked_schemes(devices.cpu_features()))


def _open_cache(model: Model, options: EngineOptions, fitted: Fit) -> Cache:
    """The cache as it was found to fit; a smaller one where a GPU has less than it said, and the size is ours."""
    n_cells = fitted.n_context
    while True:
        try:
            cache = Cache(
                model, n_cells, options.n_sequences, options.n_batch or 1, options.n_threads or 1, fitted.cache_type
            )
            break
        except OutOfMemory:
            if options.n_context is not None or n_cells <= _N_CONTEXT_UNKNOWN:
                raise
            n_cells //= 2
    try:
        cache.warm(0)
    except BaseException:
        cache.close()
        raise
    return cache


def physical_cores() -> int:
    """Physical cores that this process may use."""
    process = psutil.Process()
    n_all = psutil.cpu_count() or 1
    n_allowed = len(process.cpu_affinity() or range(n_all)) if hasattr(process, "cpu_affinity") else n_all
    return max(1, min(psutil.cpu_count(logical=False) or n_allowed, n_allowed))
