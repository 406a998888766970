"""The file of a saved sequence: tokens and cache, refused unless it is whole and of the same model."""

import hashlib
import struct
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .errors import StateError
from .files import replacing

_MAGIC = b"LRSTATE1"
_HEAD = struct.Struct("<8s16s32sQQ")
"""Magic, fingerprint of the model, digest of all that follows the head, number of tokens, bytes of cache."""
_N_SAMPLES, _SAMPLE_BYTES = 64, 4096


def fingerprint(path: Path) -> bytes:
    """Sixteen bytes that tell model files apart: their size and samples of their content."""
    n_bytes = path.stat().st_size
    digest = hashlib.sha256(struct.pack("<Q", n_bytes))
    with path.open("rb") as file:
        for i in range(_N_SAMPLES):
            file.seek(max(0, n_bytes - _SAMPLE_BYTES) * i // (_N_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()[:16]


def write_state(path: Path, model: bytes, tokens: list[int], state: NDArray[np.uint8]) -> None:
    """Write the file whole or not at all. Raises StateError."""
    ids = np.array(tokens, "<i4").tobytes()
    try:
        with replacing(path) as part, part.open("wb") as file:
            file.write(_HEAD.pack(_MAGIC, model, _digest(ids, state), len(tokens), state.nbytes))
            file.write(ids)
            file.write(state.data)
    except OSError as error:
        raise StateError(f"{path} cannot be written: {error.strerror}; free space or choose another place") from error


def read_state(path: Path, model: bytes, n_most: int, n_vocab: int) -> tuple[list[int], NDArray[np.uint8]]:
    """Tokens and cache of a file that `write_state` wrote for the same model. Raises StateError."""
    try:
        n_bytes = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_HEAD.size)
            if head[:8] != _MAGIC:
                raise StateError(
                    f"{path} is not a saved sequence: it begins with {head[:8]!r}; give a file that was saved"
                )
            if len(head) < _HEAD.size:
                raise StateError(f"{path} is truncated at {n_bytes} bytes; delete it")
            _, wrote, digest, n_tokens, n_state = _HEAD.unpack(head)
            if wrote != model:
                raise StateError(f"{path} was saved with another model file; open the one that wrote it")
            if _HEAD.size + 4 * n_tokens + n_state != n_bytes:
                raise StateError(f"{path} is truncated or damaged at {n_bytes} bytes; delete it")
            if n_tokens > n_most:
                raise StateError(f"{path} holds {n_tokens} tokens and the cache {n_most}; open with a larger context")
            ids = file.read(4 * n_tokens)
            state = np.fromfile(file, np.uint8)
    except (OSError, ValueError) as error:
        raise StateError(f"{path} cannot be read: {error}; give a file that was saved") from error
    tokens = np.frombuffer(ids, "<i4").tolist()
    # llama.cpp trusts much of a state, so it sees only bytes that are as they were written.
    if _digest(ids, state) != digest or not all(0 <= token < n_vocab for token in tokens):
        raise StateError(f"{path} is damaged: its content is not what was written; delete it")
    return tokens, state


def _digest(ids: bytes, state: NDArray[np.uint8]) -> bytes:
    return hashlib.sha256(ids + hashlib.sha256(state.data).digest()).digest()
