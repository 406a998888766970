"""Arrays and batches to wire messages and back; what comes in is checked before it is believed.

Activations go as raw little-endian float32, so that a ring gives the bits of one machine. float16 halves the bytes and
int8 quarters them, both with a float32 scale a row, for some models' activations pass what float16 holds, and both at a
cost in exactness that `bench/ring.py` measures.
"""

import numpy as np
from numpy.typing import NDArray

from ..runtime.engine import Span
from .errors import ProtocolError
from .wire import ring_pb2 as wire

PROTOCOL = 1
"""What `Open` and `Describe` carry; nodes of another number are not used."""
MICRO_BATCH = 64
"""Tokens of a prompt that pass a ring at once, and with which the speed of prompts is measured."""
LONGEST_MESSAGE = 32 << 20
"""Bytes; a larger message ends its stream before it is read."""
ROW_TYPES = {"f32": wire.F32, "f16": wire.F16, "i8": wire.I8}
_DTYPES = {wire.F32: np.dtype("<f4"), wire.F16: np.dtype("<f2"), wire.I8: np.dtype("i1")}
_LARGEST = {wire.F16: np.float32(65504), wire.I8: np.float32(127)}
_LEAST_SCALE = np.finfo(np.float32).tiny
"""Below it numbers lose digits, and a row divided by so rough a scale could pass what the type holds."""
VALUE_BYTES = {name: _DTYPES[kind].itemsize for name, kind in ROW_TYPES.items()}
"""Bytes of one number of an activation on the wire."""


def pack_rows(rows: NDArray[np.float32], row_type: wire.RowType) -> wire.Rows:
    """Rows of activations, shape (n_tokens, n_embd), as a message."""
    if row_type == wire.F32:
        return wire.Rows(type=wire.F32, data=rows.astype("<f4", copy=False).tobytes())
    with np.errstate(invalid="ignore"):  # what is no number stays none, and the logits tell
        scales = np.abs(rows).max(axis=1, keepdims=True).astype("<f4") / _LARGEST[row_type]
        scales = np.maximum(scales, _LEAST_SCALE)
        values = rows / scales
        data = (np.rint(values) if row_type == wire.I8 else values).astype(_DTYPES[row_type])
    return wire.Rows(type=row_type, data=data.tobytes(), scales=scales.tobytes())


def unpack_rows(message: wire.Rows, n_tokens: int, n_embd: int) -> NDArray[np.float32]:
    """The rows of a message, shape (n_tokens, n_embd). Raises ProtocolError."""
    dtype = _DTYPES.get(message.type)
    if dtype is None:
        raise ProtocolError(f"activations of type {message.type} came; this version knows {', '.join(ROW_TYPES)}")
    wanted = n_tokens * n_embd * dtype.itemsize
    n_scales = 0 if message.type == wire.F32 else 4 * n_tokens
    if len(message.data) != wanted or len(message.scales) != n_scales:
        raise ProtocolError(
            f"activations of {len(message.data)} bytes with {len(message.scales)} bytes of scales came for {n_tokens} "
            f"rows of {n_embd}; {wanted} with {n_scales} were expected; use the same version of localreason everywhere"
        )
    rows = np.frombuffer(message.data, dtype).reshape(n_tokens, n_embd)
    if message.type == wire.F32:
        return rows.astype(np.float32, copy=False)
    scales = np.frombuffer(message.scales, "<f4").reshape(n_tokens, 1)
    with np.errstate(invalid="ignore", over="ignore"):  # as above
        return (rows * scales).astype(np.float32)


def pack_spans(spans: list[Span]) -> list[wire.Span]:
    """Where the rows belong; their tokens stay at home."""
    return [wire.Span(sequence=span.sequence_id, position=span.position, n_tokens=len(span.tokens)) for span in spans]


def unpack_spans(step: wire.Step, n_sequences: int, n_batch: int) -> list[Span]:
    """The spans of a step with blanks in place of tokens. Raises ProtocolError."""
    spans: list[Span] = []
    n = 0
    for span in step.spans:
        n += span.n_tokens
        if not 1 <= span.n_tokens <= n_batch or n > n_batch or span.sequence >= n_sequences:
            raise ProtocolError(
                f"a span of {span.n_tokens} rows of sequence {span.sequence} came; a batch holds {n_batch} rows of "
                f"{n_sequences} sequences"
            )
        spans.append(Span(span.sequence, span.position, [0] * span.n_tokens))
    if not spans:
        raise ProtocolError("a step without rows came")
    return spans
