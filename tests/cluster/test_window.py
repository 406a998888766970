"""Layer windows give the whole model's logits, bit for bit, for every architecture of the table and every cut."""

import contextlib
import struct
import sys

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localreason.cluster import probe
from localreason.cluster.window import LayerWindow, WindowOptions
from localreason.quant.gguf import ARCHITECTURES, ModelFile
from localreason.runtime.engine import Span
from localreason.runtime.errors import DecodeFailed, ModelBroken, ModelError, ModelUnsupported
from localreason.runtime.llama import EngineOptions, load
from tests.cluster.rings import LocalRing
from tests.gguf_models import N_EMBD, N_FF, N_HEAD, write_model

N_LAYERS = 7
PROMPT = list(b"The residual stream leaves one window and enters the next one.")
MODELS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3moe": {},
    "gemma3": {},
    "gemma3 of period 3": {"values": {"gemma3.attention.sliding_window_pattern": 3}},
    "llama untied": {"extra": {"output.weight": (265, N_EMBD), "rope_freqs.weight": (N_EMBD // N_HEAD // 2,)}},
    "llama as of Mistral": {
        "values": {"llama.attention.sliding_window": 4096, "llama.rope.freq_base": 1e6},
        "extra": {"output.weight": (265, N_EMBD)},
    },
    "llama with an array a layer": {
        "values": {"llama.attention.head_count_kv": [1] * N_LAYERS, "llama.feed_forward_length": [N_FF] * N_LAYERS}
    },
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    n_layers = 13 if request.param == "gemma3" else N_LAYERS
    return write_model(folder / "whole.gguf", request.param.split()[0], 3, n_layers, **MODELS[request.param])


def whole(path):
    return contextlib.closing(load(path, EngineOptions(512, 4, 1, n_batch=64))[0])


def script(engine):
    """All rows of a prompt, single tokens, a fork, two sequences in a batch, a rewind, a drop and a new start."""
    rows = []

    def decode(*spans):
        rows.append(np.array(engine.decode(list(spans))))

    decode(Span(0, 0, PROMPT, len(PROMPT)))
    for i in range(4):
        decode(Span(0, len(PROMPT) + i, [65 + i]))
    engine.fork(0, 1, 20)
    engine.fork(0, 2, len(PROMPT))
    decode(Span(1, 20, [66, 67]), Span(0, len(PROMPT) + 4, [68]), Span(2, 62, [69]))
    engine.rewind(0, 30)
    decode(Span(0, 30, [70, 71, 72], 2))
    engine.rewind(1, 0)
    decode(Span(1, 0, PROMPT[:9]))
    return np.concatenate(rows)


def test_every_architecture_of_the_table_is_tried():
    assert {name.split()[0] for name in MODELS} == set(ARCHITECTURES)
    assert len(PROMPT) == 62


def test_every_cut_gives_the_whole_models_logits_bit_for_bit(model, tmp_path):
    with whole(model) as engine:
        expected = script(engine)
    assert np.isfinite(expected).all()
    assert len(np.unique(expected.argmax(axis=1))) > 3, "a model that always says the same shows nothing"
    file, n_tried = ModelFile(model), 0
    cuts = [[i] for i in range(1, file.n_layers)] + [[1, 2], [2, 5], [1, 3, 6], list(range(1, file.n_layers)), []]
    for cut in cuts:
        if not all(map(file.is_window, [0, *cut], [*cut, file.n_layers])):
            continue
        n_tried += 1
        with contextlib.closing(LocalRing(model, cut, tmp_path)) as ring:
            rows = script(ring)
        assert np.array_equal(rows, expected), f"cut at {cut}: off by {np.abs(rows - expected).max()}"
    assert n_tried == len(cuts) or file.architecture == "gemma3"
    assert n_tried > 1


def test_windows_of_sliding_layers_only_are_refused(tmp_path):
    file = ModelFile(write_model(tmp_path / "g.gguf", "gemma3", n_layers=13))
    allowed = [(a, b) for a in range(13) for b in range(a + 1, 14) if file.is_window(a, b)]
    assert allowed == [(a, b) for a in range(13) for b in range(a + 1, 14) if {5, 11} & set(range(a, b))]
    with pytest.raises(ModelUnsupported, match="0 to 5 cannot be a window"):
        file.window(0, 5, False)


def test_quantised_bytes_are_copied_untouched(model):
    file = ModelFile(model)
    window = file.window(2, 6, False)
    sources = [file.tensors[f"blk.{i}.{t.name.split('.', 2)[2]}"] for i in range(2, 6) for t in file.layer(i)]
    copied = [part.source_offset for part in window.parts if part.source_offset is not None]
    assert set(copied) >= {tensor.offset for tensor in sources}
    assert len(window.header) % 32 == 0


def test_unknown_architectures_and_inexact_cuts_are_refused(tmp_path):
    with pytest.raises(ModelUnsupported, match="'mamba' is not known"):
        ModelFile(write_model(tmp_path / "m.gguf", "mamba")).window(0, 1, False)
    large = ModelFile(write_model(tmp_path / "g.gguf", "gemma3", n_layers=62))
    with pytest.raises(ModelUnsupported, match="62 layers cannot be cut"):
        large.window(0, 1, False)


def test_a_table_that_no_window_has_is_looked_at_all_the_same(tmp_path):
    tables = {"output.weight": (265, N_EMBD), "token_embd.weight": (265, N_EMBD // 2)}
    path = write_model(tmp_path / "evil.gguf", extra=tables)
    with pytest.raises(ModelBroken, match=r"'token_embd.weight' has the shape \(32, 265\), not \(64, 265\)"):
        ModelFile(path).check_cut()


@pytest.mark.parametrize("name", ["blk", "blk.0", "blk.²", "blk.0.", "blk.99999999999.x"])
def test_tensors_with_strange_names_are_in_no_layer(tmp_path, name):
    file = ModelFile(write_model(tmp_path / "m.gguf", extra={name: (4,)}))
    assert [len(file.layer(i)) for i in range(2)] == [9, 9]
    file.window(0, 2, True)


def test_activations_of_another_shape_are_refused(tmp_path, tiny_model):
    with contextlib.closing(LocalRing(tiny_model, [1], tmp_path)) as ring:
        first = ring.windows[0]
        with pytest.raises(DecodeFailed, match="activations of"):
            first.run([Span(0, 0, [0, 0])], np.zeros((1, N_EMBD), np.float32))
        with pytest.raises(DecodeFailed, match="does not continue"):
            first.run([Span(0, 5, [0])], np.zeros((1, N_EMBD), np.float32))


@settings(max_examples=60, deadline=None)
@given(st.floats(0, 1))
def test_a_file_cut_anywhere_is_an_error_of_ours(tmp_path_factory, tiny_model, share):
    data = tiny_model.read_bytes()
    broken = tmp_path_factory.mktemp("cut") / "cut.gguf"
    broken.write_bytes(data[: int(share * (len(data) - 1))])
    with pytest.raises(ModelError):
        ModelFile(broken).window(0, 1, False)


def test_a_tensor_outside_the_file_is_refused(tmp_path, tiny_model):
    data = bytearray(tiny_model.read_bytes())
    place = data.index(b"output_norm.weight") + len("output_norm.weight") + 4 + 8 + 4
    data[place : place + 8] = struct.pack("<Q", 1 << 40)
    (tmp_path / "far.gguf").write_bytes(data)
    with pytest.raises(ModelError, match="truncated: the tensor 'output_norm"):
        ModelFile(tmp_path / "far.gguf")


@pytest.mark.skipif(sys.platform != "linux", reason="private memory is told apart on Linux")
def test_weights_that_are_read_from_disk_are_not_copied_into_memory(tmp_path):
    path = tmp_path / "weights.gguf"
    n_bytes = probe._write(path, "Q4_0", 32 << 20, 1024)  # of a type that llama.cpp packs anew

    def n_private(is_disk_used):
        before = psutil.Process().memory_info().data
        window = LayerWindow(path, WindowOptions(256, 1, 8), 1, 0, True, is_disk_used)
        try:
            window.warm()
            return psutil.Process().memory_info().data - before
        finally:
            window.close()

    n_private(False)  # threads and libraries
    assert min(n_private(True) for _ in range(2)) < n_bytes / 2
