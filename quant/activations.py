"""Sums the squares of what flows into each weight while llama.cpp evaluates.

llama.cpp binds no access to the nodes of its graph, so they are read by the layout of ggml's structure. That layout is
compared with ggml's own functions before it is believed.
"""

import ctypes
from collections.abc import Collection
from functools import cache
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from ..runtime import native
from ..runtime.errors import EngineError

_F32, _I32 = 0, 26


class _Tensor(ctypes.Structure):
    """`ggml_tensor` up to its name."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("shape", ctypes.c_int64 * 4),
        ("strides", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_parameters", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("sources", ctypes.c_void_p * 10),
        ("view", ctypes.c_void_p),
        ("view_offset", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
    )


class _Parameters(ctypes.Structure):
    """`ggml_init_params`."""

    _fields_ = (("n_bytes", ctypes.c_size_t), ("buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@cache
def _ggml() -> Any:
    """ggml-base with the types of what is called here."""
    library, pointer, size = native.ggml(), ctypes.c_void_p, ctypes.c_size_t
    types: dict[str, tuple[Any, list[Any]]] = {
        "ggml_init": (pointer, [_Parameters]),
        "ggml_free": (None, [pointer]),
        "ggml_new_tensor_3d": (pointer, [pointer, ctypes.c_int, *[ctypes.c_int64] * 3]),
        "ggml_set_name": (pointer, [pointer, ctypes.c_char_p]),
        "ggml_mul_mat": (pointer, [pointer] * 3),
        "ggml_mul_mat_id": (pointer, [pointer] * 4),
        "ggml_op_desc": (ctypes.c_char_p, [pointer]),
        "ggml_nbytes": (size, [pointer]),
        "ggml_backend_tensor_get": (None, [pointer, pointer, size, size]),
    }
    for name, (result, arguments) in types.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


@cache
def _operations() -> tuple[int, int]:
    """The numbers of MUL_MAT and MUL_MAT_ID. Raises EngineError where `_Tensor` is not how this ggml lays it out."""
    ggml = _ggml()
    context = ggml.ggml_init(_Parameters(1 << 16, None, True))
    try:
        weights = ggml.ggml_new_tensor_3d(context, _F32, 32, 5, 3)
        rows = ggml.ggml_new_tensor_3d(context, _F32, 32, 2, 7)
        chosen = ggml.ggml_new_tensor_3d(context, _I32, 2, 7, 1)
        dense = ggml.ggml_mul_mat(context, ggml.ggml_new_tensor_3d(context, _F32, 32, 5, 1), rows)
        routed = ggml.ggml_mul_mat_id(context, weights, rows, chosen)
        ggml.ggml_set_name(weights, b"blk.0.weight")
        first, second, node = (_Tensor.from_address(item) for item in (weights, dense, routed))
        found = (
            (first.name, first.type, list(first.shape), list(first.strides)),
            (list(second.shape), second.sources[1], ggml.ggml_op_desc(dense)),
            (list(node.shape), list(node.sources)[:4], ggml.ggml_op_desc(routed), node.view, node.data),
        )
        wanted = (
            (b"blk.0.weight", _F32, [32, 5, 3, 1], [4, 128, 640, 1920]),
            ([5, 2, 7, 1], rows, b"MUL_MAT"),
            ([5, 2, 7, 1], [weights, rows, chosen, None], b"MUL_MAT_ID", None, None),
        )
        if found != wanted or second.op == node.op or _Tensor.from_address(chosen).type != _I32:
            raise EngineError(
                "this llama.cpp lays its tensors out in another way than localreason knows, so that no activations can "
                "be read; install the llama-cpp-python that localreason asks for"
            )
        return second.op, node.op
    finally:
        ggml.ggml_free(context)


class Squares:
    """Sums over all evaluations, by weight tensor: `sums` of shape (n_matrices, n_columns), `counts` of rows, shape
    (n_matrices,) for experts and (1,) for others.

    `callback` is for llama.cpp. It must be called in another thread than the main one: there Ctrl-C would be raised
    inside of it and be lost.
    """

    def __init__(self, names: Collection[str]) -> None:
        """Watch the weights of these names. Raises EngineError where this ggml is not known."""
        self.sums: dict[str, NDArray[np.float64]] = {}
        self.counts: dict[str, NDArray[np.float64]] = {}
        self.is_stopped = False
        """Set it to end the evaluation under way."""
        self.failure: Exception | None = None
        self._names = {name.encode(): name for name in names}
        self._dense, self._routed = _operations()
        self._ggml = _ggml()
        self.callback = native.library().ggml_backend_sched_eval_callback(self._visit)

    def _visit(self, address: int, is_asked: bool, _: Any) -> bool:
        if self.is_stopped or self.failure is not None:
            return is_asked  # then llama.cpp comes back with the node, and is told to end
        node = _Tensor.from_address(address)
        if node.op not in (self._dense, self._routed):
            return not is_asked
        weights, rows = (_Tensor.from_address(source) for source in node.sources[:2])
        # A copy on another device is named CUDA0#name#0.
        name = self._names.get(weights.name.split(b"#")[1] if b"#" in weights.name else weights.name)
        if name is None or rows.type != _F32:
            return not is_asked
        if not is_asked:
            try:
                self._add(name, node, weights)
            except (ValueError, ArithmeticError) as error:
                self.failure = error
                return False
        return True

    def _add(self, name: str, node: _Tensor, weights: _Tensor) -> None:
        rows = self._read(node.sources[1], np.float32)
        n_columns = rows.shape[-1]
        if node.op == self._routed:
            chosen = self._read(node.sources[2], np.int32)[0, 0]
            sums, counts = self._places(name, int(weights.shape[2]), int(weights.shape[2]), n_columns)
            # Down-projections have rows of their own for each chosen expert, others share the token's one.
            given = np.broadcast_to(rows[0], (*chosen.shape, n_columns))
            for expert in np.unique(chosen):
                picked = given[chosen == expert]
                sums[expert] += _squares(picked)
                counts[expert] += len(picked)
            return
        n_matrices = int(weights.shape[2] * weights.shape[3])
        sums, counts = self._places(name, n_matrices, 1, n_columns)
        for i3, i2 in np.ndindex(rows.shape[:2]):
            matrix = (i3 % weights.shape[3]) * weights.shape[2] + i2 % weights.shape[2]
            sums[matrix] += _squares(rows[i3, i2])
        counts += rows.size // n_columns / n_matrices

    def _places(self, name: str, n_matrices: int, n_counts: int, n_columns: int) -> Any:
        if name not in self.sums:
            self.sums[name] = np.zeros((n_matrices, n_columns))
            self.counts[name] = np.zeros(n_counts)
        return self.sums[name], self.counts[name]

    def _read(self, address: int, dtype: Any) -> NDArray[Any]:
        """A tensor's values, last dimension first, wherever they are."""
        tensor, n = _Tensor.from_address(address), self._ggml.ggml_nbytes(address)
        data = np.empty(n, np.uint8)
        self._ggml.ggml_backend_tensor_get(address, data.ctypes.data, 0, n)
        # A view may skip bytes at its end, so its length need not be a whole number of values.
        values = data[: n // 4 * 4].view(dtype)
        return as_strided(values, tuple(tensor.shape)[::-1], tuple(tensor.strides)[::-1], writeable=False)


def _squares(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """Sums of squares by column, shape (n_columns,). Raises ValueError where they are not finite."""
    sums = np.einsum("ij,ij->j", rows, rows)
    if not np.isfinite(sums).all():
        raise ValueError("the activations are not finite")
    return sums.astype(np.float64)
