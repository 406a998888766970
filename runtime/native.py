"""The only importer of llama_cpp: typed calls, checked before they are made, failures mapped to our errors.

llama.cpp answers some inputs by ending the process. What is known to do so is refused here, in `cache.py` and in
`header.py`, and never reaches it.
"""

import contextlib
import ctypes
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from .errors import EngineError, LocalReasonError, ModelBroken, ModelUnsupported, OutOfMemory
from .header import check_header, check_tensors, read_table
from .runs import check_runs, is_recursive

CACHE_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}
"""Names of key-value cache types and their ggml numbers."""
_WARN, _ERROR, _CONTINUED = 3, 4, 5
"""ggml's log levels."""
_NO_VOCABULARY, _SENTENCEPIECE = 0, 1
_NO_DEVICES = (ctypes.c_void_p * 1)()
"""The end of a list that names no GPU."""
_MARK_ATTRIBUTES = 1 << 3 | 1 << 4
"""llama.cpp's CONTROL and USER_DEFINED."""
_N_SPINS = 1000
"""Looks of a thread at a barrier before it sleeps."""
_messages: deque[str] = deque(maxlen=20)
_kept: list[Any] = []
"""What llama.cpp holds pointers to."""


@cache
def library() -> ModuleType:
    """llama_cpp, imported at first use; its log is silent, the last warnings and errors are kept."""
    _share_processors()
    import llama_cpp

    level_before = 0

    @llama_cpp.llama_log_callback
    def keep(level: int, text: bytes, data: Any) -> None:
        nonlocal level_before
        level_before = level_before if level == _CONTINUED else level
        if level_before in (_WARN, _ERROR) and text.strip():
            _messages.append(text.decode("utf-8", "replace").strip())

    _kept.append(keep)
    llama_cpp.llama_log_set(keep, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


def _share_processors() -> None:
    """Have OpenMP's threads look 1000 times at a barrier before they sleep, where they take every processor, unless
    the user has chosen otherwise. Where processors are to spare (two for each core), its own choice is right.

    By default they look for milliseconds, on the processor that the other thread, put off by another program, would
    need. And a thread of its own that decodes, while the main thread that loaded the model keeps its team, makes OpenMP
    count more threads than processors and sleep at nearly every barrier; "active" has it look as often then too.
    """
    has_spare = (psutil.cpu_count() or 1) > (psutil.cpu_count(logical=False) or 1)
    if not has_spare and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ.update(OMP_WAIT_POLICY="active", GOMP_SPINCOUNT=str(_N_SPINS))


@cache
def address_of_logits() -> Any:
    """llama_get_logits as a function that gives a plain address: cheaper than a typed pointer made at every step."""
    place = ctypes.cast(library().llama_get_logits, ctypes.c_void_p).value or 0
    return ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p)(place)


@cache
def ggml() -> ctypes.CDLL:
    """The library ggml-base, of which llama_cpp binds little; who calls a function first says its types."""
    folder = Path(library().__file__ or "").parent / "lib"
    names = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise EngineError(f"there is no ggml-base library in {folder}; install llama-cpp-python again")
    return ctypes.CDLL(str(path))


@cache
def _tensor_functions() -> tuple[Any, Any, Any]:
    """ggml's name, size and read of a tensor, which llama_cpp does not bind."""
    base = ggml()
    base.ggml_get_name.restype, base.ggml_get_name.argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    base.ggml_nbytes.restype, base.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    base.ggml_backend_tensor_get.restype = None
    base.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    return base.ggml_get_name, base.ggml_nbytes, base.ggml_backend_tensor_get


@cache
def _dequantizer(kind: int) -> Any:
    """ggml's function from a row of a type to float32: (address, address, number of values)."""
    base = ggml()
    base.ggml_type_name.restype, base.ggml_type_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    name = (base.ggml_type_name(kind) or b"").decode()
    floats = {"f16": "ggml_fp16_to_fp32_row", "bf16": "ggml_bf16_to_fp32_row"}
    function = getattr(base, floats.get(name, f"dequantize_row_{name}"), None)
    if function is None:
        raise ModelUnsupported(f"rows of type {name or kind} cannot be read; convert the file to another type")
    function.restype, function.argtypes = None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64]
    return function


def dequantize(rows: NDArray[np.uint8], kind: int, n_values: int) -> NDArray[np.float32]:
    """Rows of bytes of a ggml type as float32, shape (n_rows, n_values), bit for bit as llama.cpp reads them on a CPU.

    The rows must hold `n_values` each by the type's own arithmetic: ggml does not look. Raises ModelUnsupported.
    """
    out = np.empty((len(rows), n_values), np.float32)
    function, rows = _dequantizer(kind), np.ascontiguousarray(rows)
    for row, target in zip(rows, out, strict=True):
        function(row.ctypes.data, target.ctypes.data, n_values)
    return out


class Tap:
    """Takes the residual stream behind the last layer, before the norm, and ends the evaluation there.

    llama.cpp asks for each node of the graph, so the answer must be cheap: a name is looked at only near the place
    where the wanted one stood last time. Where it moved up, nothing is caught, and the batch has to be run again.
    """

    _N_NEAR = 64

    def __init__(self, n_layers: int, n_embd: int, n_batch: int) -> None:
        self._name = b"l_out-%d" % (n_layers - 1)
        self._get_name, self._n_bytes, self._read = _tensor_functions()
        self._rows = np.empty((n_batch, n_embd), np.float32)
        self._start = self._count = self._n_caught = 0
        self.callback = library().ggml_backend_sched_eval_callback(self._visit)

    def begin(self, is_exhaustive: bool = False) -> None:
        """Before each evaluation."""
        self._count = self._n_caught = 0
        if is_exhaustive:
            self._start = 0

    def _visit(self, tensor: int, is_asked: bool, _: Any) -> bool:
        if is_asked:
            self._count += 1
            return self._count > self._start and self._get_name(tensor) == self._name
        self._start = max(0, self._count - self._N_NEAR)
        n = self._n_bytes(tensor)
        if n <= self._rows.nbytes:
            self._read(tensor, self._rows.ctypes.data, 0, n)
            self._n_caught = n // self._rows.strides[0]
        return False

    def rows(self) -> NDArray[np.float32]:
        """What was caught, shape (n_tokens, n_embd), valid until the next evaluation."""
        return self._rows[: self._n_caught]


@contextlib.contextmanager
def interrupts_after() -> Iterator[list[int]]:
    """Ctrl-C takes effect behind the block; the list is not empty once it was pressed. llama.cpp calls back while it
    loads, for its log, and what is raised in there is lost: the program would go on as if no key had been pressed."""
    presses: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    # What is started in the background of a script ignores the key, and goes on doing so.
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield presses
        return
    signal.signal(signal.SIGINT, lambda number, frame: presses.append(number))
    try:
        yield presses
    finally:
        signal.signal(signal.SIGINT, before)
        if presses:
            before(signal.SIGINT, None)


def forget_messages() -> None:
    """Begin a call whose failure `cause` may be asked for."""
    _messages.clear()


def cause() -> str:
    """What llama.cpp logged first about the latest failure, of memory where that is short, without the name of its
    function."""
    lines = [line for line in _messages if not line.startswith("warning")]
    line = max(lines, key=_is_of_memory, default="llama.cpp gave no reason")
    function, _, rest = line.partition(": ")
    return (rest if function.isidentifier() else line).removeprefix("error loading model: ")


def is_out_of_memory() -> bool:
    """True if the latest failure was logged as one of allocation."""
    return any(map(_is_of_memory, _messages))


def _is_of_memory(line: str) -> bool:
    return any(words in line.lower() for words in ("allocat", "out of memory", "bad_alloc"))


class Model:
    """A loaded GGUF file and its vocabulary; freed once, and refused after that."""

    def __init__(
        self,
        path: Path,
        n_gpu_layers: int = 0,
        use_mmap: bool = True,
        vocab_only: bool = False,
        is_window: bool = False,
        header: dict[str, Any] | None = None,
        is_repacked: bool = True,
    ) -> None:
        """`is_window` opens a part of a model, which has no vocabulary; `header` are the file's values where they were
        read before; without `is_repacked` all weights stay in the file's pages, which the system can drop.

        Raises ModelNotFound, ModelBroken, ModelUnsupported or OutOfMemory."""
        self.path = path
        if header is None:
            table = read_table(path, has_tensors=not vocab_only)
            if not vocab_only:
                check_tensors(table, path)
            header = table.values
        self.header = header
        check_header(self.header, path)
        lib = self._lib = library()
        parameters = lib.llama_model_default_params()
        parameters.n_gpu_layers = n_gpu_layers
        if not n_gpu_layers:  # else a GPU would be taken into use all the same, and prompts sent through it
            parameters.devices = ctypes.addressof(_NO_DEVICES)
        parameters.load_mode = lib.LLAMA_LOAD_MODE_MMAP if use_mmap else lib.LLAMA_LOAD_MODE_NONE
        parameters.vocab_only = vocab_only
        parameters.use_extra_bufts = is_repacked
        forget_messages()
        self._pointer = None
        try:
            with interrupts_after() as presses:
                go_on = lib.llama_progress_callback(lambda done, data: not presses)
                parameters.progress_callback = go_on
                self._pointer = lib.llama_model_load_from_file(os.fsencode(path), parameters)
        except BaseException:
            self.close()
            raise
        if not self._pointer:
            raise KeyboardInterrupt if presses else _load_error(path)
        try:
            self._vocab = lib.llama_model_get_vocab(self._pointer)
            self._check(vocab_only, is_window)
        except BaseException:
            self.close()
            raise

    def _check(self, vocab_only: bool, is_window: bool) -> None:
        lib, kind = self._lib, self._lib.llama_vocab_type(self._vocab)
        if kind == _NO_VOCABULARY and not is_window:
            raise ModelUnsupported(f"{self.path} has no vocabulary; take a file that is a whole model")
        self.n_vocab: int = lib.llama_vocab_n_tokens(self._vocab)
        self._is_recursive = is_recursive(self.metadata())
        if kind == _SENTENCEPIECE:
            texts = {lib.llama_vocab_get_text(self._vocab, token) for token in range(self.n_vocab)}
            # A byte that is no token, as <0xXX> or as itself, is an exception that nothing catches.
            lost = [i for i in range(256) if b"<0x%02X>" % i not in texts and not (i < 128 and bytes([i]) in texts)]
            if lost:
                raise ModelBroken(f"{self.path} has no tokens for {len(lost)} of 256 bytes; get it again")
        if vocab_only:
            return
        if not lib.llama_model_has_decoder(self._pointer) or lib.llama_model_has_encoder(self._pointer):
            raise ModelUnsupported(f"{self.path} has an encoder; only decoder models that write text can be run")
        if lib.llama_model_is_diffusion(self._pointer):
            raise ModelUnsupported(
                f"{self.path} is a diffusion model; only models that write token by token can be run"
            )

    @property
    def pointer(self) -> Any:
        """The llama_model. Raises EngineError once it is freed."""
        if not self._pointer:
            raise EngineError(f"{self.path} is closed; open it again")
        return self._pointer

    @property
    def vocabulary(self) -> Any:
        """The llama_vocab. Raises EngineError once it is freed."""
        return self._vocab if self.pointer else None

    @property
    def n_window(self) -> int:
        """Tokens of the sliding window; 0 where there is none."""
        return self._lib.llama_model_n_swa(self.pointer)

    @property
    def is_recurrent(self) -> bool:
        """True for models that hold a state in place of, or besides, a cache of tokens."""
        return bool(self._lib.llama_model_is_recurrent(self.pointer) or self._lib.llama_model_is_hybrid(self.pointer))

    @property
    def n_context_train(self) -> int:
        return self._lib.llama_model_n_ctx_train(self.pointer)

    @property
    def n_embd(self) -> int:
        return self._lib.llama_model_n_embd(self.pointer)

    @property
    def n_bytes(self) -> int:
        """Bytes of all weights."""
        return self._lib.llama_model_size(self.pointer)

    @property
    def chat_template(self) -> str | None:
        template = self._lib.llama_model_chat_template(self.pointer, None)
        return template.decode("utf-8", "replace") if template else None

    def metadata(self) -> dict[str, str]:
        """All scalars and strings of the metadata as text."""
        lib, found = self._lib, {}
        for index in range(lib.llama_model_meta_count(self.pointer)):
            texts = []
            for get in (lib.llama_model_meta_key_by_index, lib.llama_model_meta_val_str_by_index):
                n = get(self.pointer, index, ctypes.create_string_buffer(1), 1)
                buffer = ctypes.create_string_buffer(max(n, 0) + 1)
                get(self.pointer, index, buffer, len(buffer))
                texts.append(buffer.value.decode("utf-8", "replace"))
            found[texts[0]] = texts[1]
        return found

    def tokenize(self, data: bytes, parse_special: bool) -> list[int]:
        """Token ids of valid UTF-8, without BOS or EOS. Raises PromptError for what llama.cpp would not survive."""
        assert self.pointer
        if self._is_recursive:
            check_runs(data.decode())
        size = len(data) + 8
        for _ in range(2):
            ids = (ctypes.c_int32 * size)()
            n = self._lib.llama_tokenize(self._vocab, data, len(data), ids, size, False, parse_special)
            if n >= 0:
                return ids[:n]
            size = -n
        raise EngineError(f"a text of {len(data)} bytes has too many tokens; give a shorter one")

    def piece(self, token: int) -> bytes:
        """The bytes of a token, control tokens as their names."""
        if not self.pointer or not 0 <= token < self.n_vocab:
            raise EngineError(f"token id {token} is not within the vocabulary of {self.n_vocab}")
        size = 32
        while True:
            # One for each call: several threads ask, and the library is called without Python's lock.
            buffer = ctypes.create_string_buffer(size)
            n = self._lib.llama_token_to_piece(self._vocab, token, buffer, size, 0, True)
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def ends(self) -> frozenset[int]:
        """Tokens that end a generation."""
        assert self.pointer
        is_end, vocab = self._lib.llama_vocab_is_eog, self._vocab
        return frozenset(token for token in range(self.n_vocab) if is_end(vocab, token))

    def marks(self) -> list[int]:
        """Control and user-defined tokens."""
        assert self.pointer
        attribute, vocab = self._lib.llama_vocab_get_attr, self._vocab
        return [token for token in range(self.n_vocab) if attribute(vocab, token) & _MARK_ATTRIBUTES]

    def template_tokens(self) -> dict[str, str]:
        """The texts that a chat template knows as `bos_token` and `eos_token`; empty where the model has none."""
        ids = {"bos_token": self._lib.llama_vocab_bos(self._vocab), "eos_token": self._lib.llama_vocab_eos(self._vocab)}
        return {
            name: self.piece(token).decode("utf-8", "replace") if 0 <= token < self.n_vocab else ""
            for name, token in ids.items()
        }

    def prefix(self) -> list[int]:
        """What a prompt has to begin with: BOS where the model wants it."""
        bos = self._lib.llama_vocab_bos(self._vocab) if self.pointer else -1
        return [bos] if self._lib.llama_vocab_get_add_bos(self._vocab) and 0 <= bos < self.n_vocab else []

    def close(self) -> None:
        """Free the weights; closing twice does nothing."""
        if self._pointer:
            self._lib.llama_model_free(self._pointer)
            self._pointer = None


def _load_error(path: Path) -> LocalReasonError:
    text = "\n".join(_messages).lower()
    if "unknown model architecture" in text or "unknown pre-tokenizer" in text or "clip cannot" in text:
        return ModelUnsupported(
            f"{path} cannot be run by this llama.cpp: {cause()}; update llama-cpp-python or take another"
        )
    if is_out_of_memory():
        return OutOfMemory(f"{path} does not fit into memory: {cause()}; take a smaller file or fewer GPU layers")
    if "file bounds" in text:
        return ModelBroken(f"{path} is truncated at {path.stat().st_size} bytes: {cause()}; get it again")
    return ModelBroken(f"{path} is damaged: {cause()}; get it again")
