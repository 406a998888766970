"""The process that converts: one job as JSON on standard input, events as JSON lines on standard output.

llama.cpp cannot be interrupted while it quantises and ends its process on some tensors, so it does both here, where
whoever asked is safe from it. When standard input closes, because that one is gone, the half file goes with it.
"""

import ctypes
import json
import os
import re
import sys
import threading
from pathlib import Path
from typing import Any

from ..runtime import native
from ..runtime.room import available_bytes
from .imatrix import read_importance
from .job import Job

_TENSOR = re.compile(r"\[ *\d+/ *\d+\] (.+?) +- \[")
_SIZE = re.compile(r"size = [^\n]*?(?:\((\w+)\))?\n")
_FAILURE = re.compile(r"failed to quantize: (.*)")
_QUANTIZATION_VERSION = 2
"""What llama.cpp writes itself; here only its length counts."""
_SPLIT_KEYS = (b"split.no", b"split.count", b"split.tensors.count")
_SMALLEST_BUFFER, _LARGEST_BUFFER = 64 << 20, 8 << 30


class _Log:
    """Turns llama.cpp's log into events: a tensor begun, its type in a dry run, the cause of a failure."""

    def __init__(self, channel: Any, is_dry: bool) -> None:
        self._channel = channel
        self._is_dry = is_dry
        self._name = ""
        self.cause = ""
        self.callback: Any = None

    def take(self, level: int, text: str) -> None:
        failure = _FAILURE.search(text)
        if failure:
            self.cause = failure[1].strip()
        begun = _TENSOR.search(text)
        if begun:
            self._name = begun[1]
            if not self._is_dry:
                self.tell(tensor=self._name)
        sized = _SIZE.search(text)
        if sized and self._is_dry and self._name:
            self.tell(tensor=self._name, type=sized[1])
            self._name = ""

    def tell(self, **event: Any) -> None:
        self._channel.write(json.dumps(event).encode() + b"\n")
        self._channel.flush()


def _header_bytes(job: Job) -> int:
    """Bytes before the data of the file that the job makes, by ggml's own count. -1 where ggml cannot read it."""

    class Parameters(ctypes.Structure):
        _fields_ = (("no_alloc", ctypes.c_bool), ("context", ctypes.c_void_p))

    ggml, pointer, text = native.ggml(), ctypes.c_void_p, ctypes.c_char_p
    types: dict[str, tuple[Any, list[Any]]] = {
        "gguf_init_from_file": (pointer, [text, Parameters]),
        "gguf_remove_key": (ctypes.c_int64, [pointer, text]),
        "gguf_set_val_u32": (None, [pointer, text, ctypes.c_uint32]),
        "gguf_set_val_bool": (None, [pointer, text, ctypes.c_bool]),
        "gguf_set_val_str": (None, [pointer, text, text]),
        "gguf_get_meta_size": (ctypes.c_size_t, [pointer]),
        "gguf_free": (None, [pointer]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(ggml, name)
        function.restype, function.argtypes = result, arguments
    context = ggml.gguf_init_from_file(os.fsencode(job.source), Parameters(True, None))
    if not context:
        return -1
    for key in _SPLIT_KEYS:
        ggml.gguf_remove_key(context, key)
    ggml.gguf_set_val_u32(context, b"general.quantization_version", _QUANTIZATION_VERSION)
    ggml.gguf_set_val_u32(context, b"general.file_type", job.ftype)
    for key, value in job.values.items():
        if isinstance(value, bool):
            ggml.gguf_set_val_bool(context, key.encode(), value)
        elif isinstance(value, int):
            ggml.gguf_set_val_u32(context, key.encode(), value)
        else:
            ggml.gguf_set_val_str(context, key.encode(), value.encode())
    n_bytes = ggml.gguf_get_meta_size(context)
    ggml.gguf_free(context)
    return n_bytes


def _overrides(values: dict[str, str | int | bool]) -> Any:
    """Metadata as llama.cpp takes it, closed by an empty key."""
    lib = native.library()
    array = (lib.llama_model_kv_override * (len(values) + 1))()
    for place, (key, value) in zip(array, values.items(), strict=False):
        place.key = key.encode()
        if isinstance(value, bool):
            place.tag, place.value.val_bool = lib.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            place.tag, place.value.val_i64 = lib.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            place.tag, place.value.val_str = lib.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()
    return array


def _importance(path: Path) -> tuple[Any, list[Any]]:
    """The importance matrix as llama.cpp takes it, closed by an empty name, and what it points to."""
    lib, weights = native.library(), read_importance(path).weights()
    array, kept = (lib.llama_model_imatrix_data * (len(weights) + 1))(), []
    for place, (name, values) in zip(array, weights.items(), strict=False):
        place.name, place.size = name.encode(), values.size
        place.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        kept.append(values)
    return array, kept


def _run(job: Job, log: _Log) -> int:
    """llama.cpp's own return code."""
    lib = native.library()
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = job.ftype, job.n_threads
    parameters.allow_requantize, parameters.pure = job.allows_requantize, job.is_pure
    parameters.dry_run = job.target is None
    if job.output_type is not None:
        parameters.output_tensor_type = job.output_type
    if job.embedding_type is not None:
        parameters.token_embedding_type = job.embedding_type
    parameters.max_buf_size = min(_LARGEST_BUFFER, max(_SMALLEST_BUFFER, available_bytes() // 4))
    # Arrays are held by `kept` until the call returns: the structure has only their addresses.
    kept: list[Any] = []
    if job.tensors:
        array = (lib.llama_model_tensor_override * (len(job.tensors) + 1))()
        for place, (pattern, kind) in zip(array, job.tensors, strict=False):
            place.pattern, place.type = pattern.encode(), kind
        kept.append(array)
        parameters.tt_overrides = array
    values = _overrides(job.values)
    parameters.kv_overrides = values
    if job.imatrix is not None:
        importance, held = _importance(Path(job.imatrix))
        kept += [importance, held]
        parameters.imatrix = importance

    @lib.llama_log_callback
    def hear(level: int, text: bytes, data: Any) -> None:
        log.take(level, text.decode("utf-8", "replace"))

    lib.llama_log_set(hear, ctypes.c_void_p(0))
    target = job.target or os.devnull
    code = lib.llama_model_quantize(os.fsencode(job.source), os.fsencode(target), ctypes.byref(parameters))
    log.callback = hear  # llama.cpp keeps its address
    del kept, values
    return code


def _watch(target: str | None) -> None:
    """End with whoever asked."""
    os.read(0, 1)
    if target is not None:
        Path(target).unlink(missing_ok=True)
    os._exit(1)


def main() -> None:
    """Read the job, run it, say how it ended."""
    # What llama.cpp prints must not come between the events.
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    line = b""
    while not line.endswith(b"\n"):
        block = os.read(0, 1 << 16)
        if not block:
            sys.exit(1)
        line += block
    job = Job(**json.loads(line))
    watcher = threading.Thread(target=_watch, args=(job.target,), daemon=True)
    watcher.start()
    log = _Log(channel, job.target is None)
    if job.target is None:
        log.tell(header_bytes=_header_bytes(job))
    code = _run(job, log)
    log.tell(done=code == 0, cause=log.cause)
    watcher.join()  # whoever asked ends this process, or is gone before it could take the file


if __name__ == "__main__":
    main()
