"""The arithmetic of memory against what llama.cpp says that it allocates, and against what a process really holds.

Run as a program, in a process of its own: `sizes` prints what llama.cpp logs, `resident` what loading adds.
"""

import ctypes
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from localreason.runtime import memory, native
from localreason.runtime.devices import cpu_features
from localreason.runtime.errors import InputError, ModelUnsupported
from localreason.runtime.header import TensorEntry, read_table
from localreason.runtime.schemes import FTYPES, KINDS, SCHEMES, find_file_type
from tests.gguf_models import write_model

ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3moe", "gemma3", "mamba")
CASES = [(512, 128, "f16"), (4096, 128, "f16"), (4000, 512, "q8_0"), (1000, 64, "q4_0")]
N_SEQUENCES = 2


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("memory")
    # Eight layers, so that Gemma has one that looks at the whole context.
    return {name: write_model(folder / f"{name}.gguf", name, n_layers=8) for name in ARCHITECTURES}


def measured(*args: object) -> list[dict[str, float]]:
    command = [sys.executable, __file__, *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def logged(files: dict[str, Path]) -> dict[str, list[dict[str, float]]]:
    """By architecture, what llama.cpp allocates in each case."""
    rows = measured("sizes", *files.values())
    return {name: rows[i * len(CASES) : (i + 1) * len(CASES)] for i, name in enumerate(files)}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_weights_and_cache_are_what_llama_cpp_allocates(
    name: str, files: dict[str, Path], logged: dict[str, list[dict[str, float]]]
):
    header = read_table(files[name])
    for (n_context, _, cache_type), row in zip(CASES, logged[name], strict=True):
        assert memory.weights_bytes(header) == row["model"]
        # The log rounds each buffer to hundredths of a MiB.
        found = memory.cache_bytes(header, n_context, cache_type, N_SEQUENCES)
        assert found == pytest.approx(row["cache"], rel=0.01, abs=12_000)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_compute_buffer_is_estimated_and_hardly_ever_too_low(
    name: str, files: dict[str, Path], logged: dict[str, list[dict[str, float]]]
):
    header = read_table(files[name])
    for (n_context, n_batch, _), row in zip(CASES, logged[name], strict=True):
        found = memory.compute_bytes(header, n_batch, n_context)
        assert 0.9 * row["compute"] - 12_000 < found < 1.4 * row["compute"] + 12_000


@pytest.mark.parametrize("name", ["llama", "qwen3moe"])
def test_a_process_holds_what_was_computed(name: str, tmp_path: Path):
    path = write_model(tmp_path / "tall.gguf", name, n_layers=32)
    (row,) = measured("resident", path, 65536, "f16")
    usage = memory.split_usage(read_table(path), 65536)["host"]
    assert row["resident"] == pytest.approx(usage.resident_bytes, rel=0.05)


@pytest.mark.model
@pytest.mark.parametrize(("n_context", "cache_type"), [(256, "f16"), (2048, "f16"), (16384, "q8_0")])
def test_a_process_holds_what_was_computed_for_the_demo(n_context: int, cache_type: str):
    from localreason.cli.store import demo

    (row,) = measured("resident", demo(), n_context, cache_type)
    repacked = memory.repacked_schemes(cpu_features())
    usage = memory.split_usage(read_table(demo()), n_context, cache_type, repacked=repacked)["host"]
    assert row["resident"] == pytest.approx(usage.resident_bytes, rel=0.05)
    assert row["compute"] == pytest.approx(usage.compute_bytes, rel=0.1)


def test_layers_go_to_a_gpu_from_the_end_and_the_output_first(files: dict[str, Path]):
    header = read_table(files["llama"])
    whole = memory.split_usage(header, 512)
    assert set(whole) == {"host"}
    embedding = memory.tensor_bytes(next(one for one in header.tensors if one.name == "token_embd.weight"))
    output = memory.split_usage(header, 512, n_gpu_layers=1)
    # The embedding is the output too: it stays where it is, and a copy goes along.
    assert output["host"].cache_bytes == whole["host"].cache_bytes
    assert output["gpu"].weights_bytes == embedding + 4 * 64
    some = memory.split_usage(header, 512, n_gpu_layers=3)
    assert some["gpu"].cache_bytes == whole["host"].cache_bytes * 2 // 8
    every = memory.split_usage(header, 512, n_gpu_layers=10_000)
    assert every["host"].weights_bytes == embedding
    assert every["host"].cache_bytes == 0
    assert every["gpu"].weights_bytes == whole["host"].weights_bytes
    assert 0 < every["host"].compute_bytes < every["gpu"].compute_bytes
    assert every["gpu"].total_bytes == sum(
        (every["gpu"].weights_bytes, every["gpu"].cache_bytes, every["gpu"].compute_bytes)
    )


def test_matrices_are_repacked_and_an_embedding_only_where_it_is_the_output(files: dict[str, Path]):
    header = read_table(files["llama"])
    kinds = memory.repacked_schemes({"REPACK", "AVX2"})
    assert "Q4_K" in kinds
    assert "Q8_0" not in kinds
    assert memory.repacked_schemes({"AVX2"}) == frozenset()
    assert memory.repacked_bytes(header, kinds) == 0
    header.tensors = [
        TensorEntry("token_embd.weight", (256, 64), SCHEMES["Q4_K"].kind, 0),
        TensorEntry("blk.0.ffn_up.weight", (256, 16), SCHEMES["Q4_K"].kind, 0),
        TensorEntry("blk.0.ffn_gate.weight", (256, 15), SCHEMES["Q4_K"].kind, 0),
        TensorEntry("blk.0.ffn_down.weight", (256, 16), SCHEMES["Q6_K"].kind, 0),
    ]
    assert memory.repacked_bytes(header, kinds) == (64 + 16) * 144
    header.tensors.append(TensorEntry("output.weight", (256, 64), SCHEMES["Q6_K"].kind, 0))
    assert memory.repacked_bytes(header, kinds) == 16 * 144
    header.tensors.append(TensorEntry("odd", (256, 64), 4, 0))
    with pytest.raises(ModelUnsupported, match="'odd' is of type 4"):
        memory.weights_bytes(header)


def test_latent_attention_and_layers_without_heads_take_less_cache(tmp_path: Path):
    values = {"llama.attention.key_length": 96, "llama.attention.value_length": 64}
    header = read_table(write_model(tmp_path / "m.gguf", values=values))
    plain = memory.cache_bytes(header, 512, "f16")
    assert plain == 2 * 512 * (96 + 64) * 2
    header.values |= {"llama.attention.key_length_mla": 32}
    assert memory.cache_bytes(header, 512, "f16") == 2 * 512 * 96 * 2
    del header.values["llama.attention.key_length_mla"]
    header.values |= {"llama.ssm.inner_size": 128, "llama.ssm.state_size": 16, "llama.ssm.conv_kernel": 4}
    header.values |= {"llama.full_attention_interval": 2}
    state = 4 * (3 * 128 + 16 * 128)
    assert memory.cache_bytes(header, 512, "f16", 3) == plain // 2 + 3 * state


def test_heads_that_do_not_fill_blocks_bar_packed_caches(tmp_path: Path):
    header = read_table(write_model(tmp_path / "m.gguf", values={"llama.attention.key_length": 40}))
    assert memory.is_cache_possible(header, "f16")
    assert not memory.is_cache_possible(header, "q8_0")


def test_the_table_of_types_is_ggmls():
    base = native.ggml()
    base.ggml_type_name.restype, base.ggml_type_size.restype = ctypes.c_char_p, ctypes.c_size_t
    base.ggml_blck_size.restype = ctypes.c_int64
    for kind, scheme in KINDS.items():
        assert base.ggml_type_name(kind).decode().upper() == scheme.name
        assert (base.ggml_blck_size(kind), base.ggml_type_size(kind)) == (scheme.n_values, scheme.n_bytes)
    # Numbers that llama.cpp has withdrawn have blocks of 0 values.
    assert {kind for kind in range(43) if base.ggml_blck_size(kind)} == set(KINDS)


def test_the_file_types_are_llama_cpps():
    library = native.library()
    theirs = {
        re.sub(r"^LLAMA_FTYPE_(ALL|MOSTLY)_", "", name): getattr(library, name)
        for name in dir(library)
        if name.startswith(("LLAMA_FTYPE_ALL_", "LLAMA_FTYPE_MOSTLY_"))
    }
    assert {name: number for name, number in theirs.items() if name in FTYPES} == dict(FTYPES)


def test_names_and_aliases_of_file_types():
    assert find_file_type("q4_k_m") == "Q4_K_M"
    assert find_file_type("W8A8") == "Q8_0"
    assert find_file_type("w4a16") == "Q4_K_M"
    assert SCHEMES["Q8_0"].bits == 8.5
    with pytest.raises(InputError, match="Q4_K_M"):
        find_file_type("Q4")


def sizes(paths: list[str]) -> list[dict[str, float]]:
    """What llama.cpp allocates for each file in each case, by its log; bytes."""
    library, lines = native.library(), []

    @library.llama_log_callback
    def keep(level: int, text: bytes, data: object) -> None:
        lines.append(text.decode("utf-8", "replace"))

    library.llama_log_set(keep, ctypes.c_void_p(0))
    rows = []
    for path in paths:
        for n_context, n_batch, cache_type in CASES:
            lines.clear()
            model = native.Model(Path(path))
            cache = _cache(model, n_context, n_batch, cache_type)
            text = "".join(lines)
            found = {
                name: sum(float(n) * 2**20 for n in re.findall(rf"CPU {word} buffer size = +([\d.]+) MiB", text))
                for name, word in (("cache", "(?:KV|RS)"), ("compute", "compute"))
            }
            rows.append({"model": model.n_bytes, **found})
            cache.close()
            model.close()
    return rows


def _cache(model: native.Model, n_context: int, n_batch: int, cache_type: str):
    from localreason.runtime.cache import Cache

    return Cache(model, n_context, N_SEQUENCES, n_batch, 1, cache_type)


def resident(path: str, n_context: str, cache_type: str) -> list[dict[str, float]]:
    """What a process holds more once a model is loaded and has evaluated some tokens; bytes."""
    import psutil

    from localreason.runtime.engine import Span
    from localreason.runtime.llama import EngineOptions, load

    native.library()  # is none of the model's
    process = psutil.Process()
    before = process.memory_info().rss
    options = EngineOptions(int(n_context), n_sequences=1, n_threads=1, n_batch=128, cache_type=cache_type)
    engine, _ = load(Path(path), options)
    for start in range(0, 128, 64):
        engine.decode([Span(0, start, list(range(1, 65)), 1)])
    held = process.memory_info().rss - before
    engine.close()
    return [{"resident": held, "compute": _compute(path, int(n_context), cache_type)}]


def _compute(path: str, n_context: int, cache_type: str) -> float:
    CASES[:] = [(n_context, 128, cache_type)]
    return sizes([path])[0]["compute"]


if __name__ == "__main__":
    print(json.dumps({"sizes": lambda *paths: sizes(list(paths)), "resident": resident}[sys.argv[1]](*sys.argv[2:])))
