"""What is given up where memory is short, and what is said of it; with sizes that no machine here has."""

from pathlib import Path

import pytest

from localreason.runtime import llama
from localreason.runtime.errors import OutOfMemory
from localreason.runtime.fit import Fit, Free, Wish, fit
from localreason.runtime.header import Header, TensorEntry
from localreason.runtime.llama import EngineOptions, load
from localreason.runtime.memory import split_usage
from localreason.runtime.native import library
from localreason.runtime.schemes import SCHEMES
from tests.gguf_models import write_model

GIB = 1 << 30
N_LAYERS, N_EMBD, N_FF, N_VOCAB, N_KV = 28, 1536, 8960, 151_936, 256
REPACKED = frozenset({"Q4_K"})


def model(kind: str = "Q4_K", tied: bool = True) -> Header:
    """Like Qwen2.5 1.5B, of one type."""
    scheme, values = SCHEMES[kind], {"general.architecture": "qwen2"}
    sizes = {"block_count": N_LAYERS, "embedding_length": N_EMBD, "feed_forward_length": N_FF, "context_length": 32768}
    sizes |= {"attention.head_count": 12, "attention.head_count_kv": 2}
    values |= {f"qwen2.{name}": size for name, size in sizes.items()}
    shapes = {"attn_q": (N_EMBD, N_EMBD), "attn_k": (N_EMBD, N_KV), "attn_v": (N_EMBD, N_KV)}
    shapes |= {"attn_output": (N_EMBD, N_EMBD), "ffn_up": (N_EMBD, N_FF), "ffn_gate": (N_EMBD, N_FF)}
    shapes |= {"ffn_down": (N_FF, N_EMBD)}
    names = {f"blk.{i}.{name}.weight": shape for i in range(N_LAYERS) for name, shape in shapes.items()}
    names |= {"token_embd.weight": (N_EMBD, N_VOCAB)} | ({} if tied else {"output.weight": (N_EMBD, N_VOCAB)})
    return Header(values, {}, [TensorEntry(name, shape, scheme.kind, 0) for name, shape in names.items()], 6_000_000)


def chosen(free: Free, header: Header | None = None, **wish: object) -> Fit:
    return fit(header or model(), Wish(**{"n_context": None, "n_train": 32768, **wish}), free, REPACKED)  # type: ignore


def test_nothing_is_reduced_and_nothing_said_where_all_fits():
    found = chosen(Free(64 * GIB), n_needed=8000, n_sequences=4)
    assert (found.n_context, found.cache_type, found.n_gpu_layers, found.notes) == (8192, "f16", 0, ())


def test_the_cache_becomes_8_bits_before_the_context_becomes_less_than_is_needed():
    full = chosen(Free(64 * GIB), n_needed=32768).usage["host"]
    spare = full.cache_bytes * 3 // 4
    found = chosen(Free(full.needed_bytes - full.cache_bytes + spare + (512 << 20)), n_needed=32768)
    assert (found.n_context, found.cache_type) == (32768, "q8_0")
    assert "the cache is q8_0" in found.notes[0]
    short = chosen(Free(full.needed_bytes - full.cache_bytes + spare // 4 + (512 << 20)), n_needed=32768)
    assert (short.cache_type, short.n_context % 256) == ("q8_0", 0)
    assert 4096 < short.n_context < 32768
    assert f"holds {short.n_context} of 32768 tokens" in short.notes[0]


def test_a_context_that_nobody_needs_takes_no_bits():
    found = chosen(Free(3 * GIB), n_sequences=8)
    assert (found.cache_type, found.n_context < 8 * 32768) == ("f16", True)
    assert found.notes == ()


def test_a_cache_type_that_was_given_stays():
    full = chosen(Free(64 * GIB), n_needed=32768).usage["host"]
    free = Free(full.needed_bytes - full.cache_bytes // 4 + (512 << 20))
    found = chosen(free, n_needed=32768, cache_type="f16")
    assert (found.cache_type, found.n_context < 32768) == ("f16", True)


def test_a_context_that_was_given_is_held_in_full_or_refused():
    full = chosen(Free(64 * GIB), n_context=32768).usage["host"]
    found = chosen(Free(full.locked_bytes - full.cache_bytes // 3), n_context=32768)
    assert (found.n_context, found.cache_type) == (32768, "q8_0")
    assert "weights are read from the disk again" in found.notes[-1]
    with pytest.raises(OutOfMemory, match=r"cache of 32768 tokens takes \d+ bytes and \d+ are free; .*smaller context"):
        chosen(Free(full.locked_bytes - full.cache_bytes), n_context=32768)


def test_a_context_between_two_paddings_is_held_as_it_would_be_at_the_next_one():
    assert chosen(Free(8 << 30), n_context=1100, n_needed=900) == chosen(Free(8 << 30), n_context=1280, n_needed=900)


def test_weights_that_are_not_mapped_must_fit_too():
    full = chosen(Free(64 * GIB), n_context=4096).usage["host"]
    free = Free(full.needed_bytes - (1 << 20))
    assert chosen(free, n_context=4096, cache_type="f16").notes
    with pytest.raises(OutOfMemory):
        chosen(free, n_context=4096, cache_type="f16", is_mapped=False)


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded():
    with pytest.raises(OutOfMemory, match=r"takes \d+ bytes with a cache of 256 tokens .* take a smaller file"):
        chosen(Free(GIB))


def test_copies_of_weights_count_once_and_twice_where_the_originals_are_read_too():
    header = model()
    host = split_usage(header, 512, repacked=REPACKED)["host"]
    embedding = N_EMBD * N_VOCAB // 256 * 144
    assert host.repacked_bytes == host.weights_bytes
    assert host.spare_bytes == host.weights_bytes - embedding
    plain = split_usage(header, 512)["host"]
    assert host.needed_bytes - plain.needed_bytes == embedding
    assert host.resident_bytes - plain.resident_bytes == host.weights_bytes


@pytest.mark.parametrize("tied", [True, False])
def test_layers_go_to_a_gpu_until_it_is_full(tied: bool):
    header = model(tied=tied)
    whole = split_usage(header, 4096, n_gpu_layers=99)["gpu"].total_bytes
    assert chosen(Free(64 * GIB, 8 * GIB), header, n_needed=4096).n_gpu_layers == N_LAYERS + 1
    found = chosen(Free(64 * GIB, whole // 2 + (512 << 20)), header, n_needed=4096)
    assert 0 < found.n_gpu_layers < N_LAYERS
    assert found.usage["gpu"].total_bytes <= whole // 2
    assert f"{found.n_gpu_layers} of {N_LAYERS + 1} layers are on the GPU" in found.notes[0]
    assert chosen(Free(64 * GIB, 300 << 20), header, n_needed=4096).n_gpu_layers == 0


def test_layers_that_were_given_are_not_taken_back():
    with pytest.raises(OutOfMemory, match="fewer GPU layers"):
        chosen(Free(64 * GIB, GIB), n_gpu_layers=99, n_context=4096, cache_type="f16")
    assert chosen(Free(64 * GIB, 8 * GIB), n_gpu_layers=5, n_context=4096).n_gpu_layers == 5


def test_memory_that_gpu_and_host_share_is_counted_once():
    alone = chosen(Free(3 * GIB // 2, 8 * GIB), n_needed=4096)
    shared = chosen(Free(4 * GIB, 8 * GIB, is_shared=True), n_needed=4096)
    assert alone.n_gpu_layers == shared.n_gpu_layers == N_LAYERS + 1
    with pytest.raises(OutOfMemory):
        chosen(Free(GIB, 8 * GIB, is_shared=True), n_needed=4096)


def test_what_loading_reduces_is_told_by_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_model(tmp_path / "m.gguf", n_layers=4)
    monkeypatch.setattr(llama, "available_bytes", lambda: (512 << 20) + (10 << 20) + (1 << 20))
    with load(path, EngineOptions(n_sequences=8, n_needed=4096, n_threads=1))[0] as engine:
        assert engine.n_context < 4096
        assert f"{engine.n_context} of 4096 tokens" in engine.notes[0]
    with load(path, EngineOptions(n_context=1024, n_sequences=2, n_threads=1, n_gpu_layers=3))[0] as engine:
        assert engine.n_context_sequence == 512
        assert "room for 512 of 1024 tokens" in engine.notes[-1]
        if not library().llama_supports_gpu_offload():
            assert "none of the 3 layers is on a GPU" in engine.notes[0]
    monkeypatch.setattr(llama, "available_bytes", lambda: 100 << 20)
    with pytest.raises(OutOfMemory, match="close other programs"):
        load(path)
