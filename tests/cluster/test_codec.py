"""Activations on the wire: exact bytes for float32, bounded loss for the others, nothing believed unchecked."""

import contextlib

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from localreason.cluster.codec import ROW_TYPES, pack_rows, pack_spans, unpack_rows, unpack_spans
from localreason.cluster.errors import ProtocolError
from localreason.cluster.wire import ring_pb2 as wire
from localreason.runtime.engine import Span

ROWS = arrays.arrays(
    np.float32, arrays.array_shapes(min_dims=2, max_dims=2, max_side=9), elements=st.floats(-1e6, 1e6, width=32)
)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.sampled_from(sorted(ROW_TYPES)))
@example(np.array([[2.90495e-40]], np.float32), "f16")
@example(np.array([[1e-44, 0.0], [0.0, 0.0]], np.float32), "i8")
def test_rows_come_back_within_what_their_type_holds(rows, row_type):
    message = wire.Rows.FromString(pack_rows(rows, ROW_TYPES[row_type]).SerializeToString())
    found = unpack_rows(message, *rows.shape)
    assert found.dtype == np.float32
    assert found.flags.c_contiguous
    if row_type == "f32":
        assert np.array_equal(found, rows)
    else:
        most = np.abs(rows).max(axis=1, keepdims=True)
        assert (np.abs(found - rows) <= most * (0.001 if row_type == "f16" else 0.0041) + 1e-7).all()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300), st.integers(1, 5), st.integers(1, 16))
def test_any_bytes_are_rows_or_an_error_of_ours(data, n_tokens, n_embd):
    with contextlib.suppress(DecodeError, ProtocolError):
        assert unpack_rows(wire.Rows.FromString(data), n_tokens, n_embd).shape == (n_tokens, n_embd)


@pytest.mark.parametrize("row_type", ROW_TYPES)
def test_what_is_no_number_stays_none_and_warns_nobody(row_type):
    rows = np.array([[np.inf, 1.0], [np.nan, 1.0], [2.0, 1.0]], np.float32)
    back = unpack_rows(pack_rows(rows, ROW_TYPES[row_type]), 3, 2)
    assert np.isfinite(back).all(axis=1).tolist() == [False, False, True]


def test_spans_leave_their_tokens_at_home():
    spans = [Span(3, 17, [5, 6, 7], 1), Span(0, 0, [9])]
    step = wire.Step(spans=pack_spans(spans))
    assert unpack_spans(step, 4, 8) == [Span(3, 17, [0, 0, 0]), Span(0, 0, [0])]
    assert b"\x05\x06\x07" not in step.SerializeToString()


@pytest.mark.parametrize(
    "span", [{"n_tokens": 0}, {"n_tokens": 9}, {"n_tokens": 1, "sequence": 4}, {"n_tokens": 2**32 - 1}]
)
def test_spans_over_the_limits_are_refused(span):
    with pytest.raises(ProtocolError):
        unpack_spans(wire.Step(spans=[wire.Span(**span)]), 4, 8)
    with pytest.raises(ProtocolError):
        unpack_spans(wire.Step(), 4, 8)
