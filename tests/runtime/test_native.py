"""Opening files: each failure has its own message, and no file ends the process."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import gguf.quants
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from localreason.runtime import native
from localreason.runtime.errors import ModelBroken, ModelNotFound, ModelUnsupported
from localreason.runtime.llama import EngineOptions, load, load_tokenizer
from tests.gguf_models import write_model

OPTIONS = EngineOptions(n_context=256, n_sequences=2, n_threads=1)

# Opens every file named on standard input, one a line, and says how it went. A crash ends it early.
OPEN_ALL = """
import sys
from pathlib import Path
from localreason.runtime.engine import Span
from localreason.runtime.errors import ModelError, OutOfMemory
from localreason.runtime.llama import EngineOptions, load
for line in sys.stdin:
    print(line.strip(), end=" ", flush=True)
    try:
        engine, tokenizer = load(Path(line.strip()), EngineOptions(n_context=256, n_sequences=2, n_threads=1))
    except (ModelError, OutOfMemory) as error:
        print(type(error).__name__, error, flush=True)
        continue
    tokenizer.encode("the <think> \\n", special=True)
    for token in range(tokenizer.n_vocab):
        tokenizer.piece(token)
    engine.decode([Span(0, 0, [0] * min(3, engine.n_batch))])
    engine.close()
    print("opened", flush=True)
"""

# Restores 300 damaged states of the file named, each with the digest that belongs to it.
FORGE = """
import sys
from pathlib import Path
import numpy as np
from localreason.runtime.engine import Span
from localreason.runtime.errors import ContextFull, StateError
from localreason.runtime.llama import EngineOptions, load
from localreason.runtime.state import fingerprint, read_state, write_state
path, state = Path(sys.argv[1]), Path(sys.argv[2])
engine, _ = load(path, EngineOptions(n_context=256, n_sequences=4, n_threads=1))
tokens = list(range(8))
engine.decode([Span(0, 0, tokens)])
engine.save(0, tokens, state)
_, body = read_state(state, fingerprint(path), 256, engine.n_vocab)
random = np.random.default_rng(0)
for i in range(300):
    forged = body.copy()
    forged[random.integers(min(200, len(body)), size=1 + i % 4)] = random.choice([0, 1, 127, 255])
    write_state(state, fingerprint(path), tokens, forged[: len(forged) - (i % 5) * 13])
    try:
        engine.restore(1, state)
        engine.decode([Span(1, 8, [1])])
    except (StateError, ContextFull):
        pass
    engine.rewind(1, 0)
engine.decode([Span(0, 8, [1])])
"""


def open_all(paths):
    """How opening each of the files went, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN_ALL], input="\n".join(map(str, paths)), capture_output=True, text=True, timeout=240
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1]}\n{done.stderr[-2000:]}"
    assert len(lines) == len(paths)
    return [line.split(" ", 1)[1] for line in lines]


class TestMessages:
    def test_no_such_file(self, tmp_path):
        with pytest.raises(ModelNotFound, match=r"no model file .*none.gguf"):
            load(tmp_path / "none.gguf", OPTIONS)
        with pytest.raises(ModelNotFound):
            load(Path("\x00"), OPTIONS)

    def test_a_folder(self, tmp_path):
        with pytest.raises(ModelNotFound, match=r"is a folder; give the .gguf file"):
            load(tmp_path, OPTIONS)

    def test_a_device_is_not_read(self):
        with pytest.raises(ModelNotFound):
            load(Path(os.devnull), OPTIONS)

    @pytest.mark.parametrize("data", [b"", b"GG", b"<!DOCTYPE html>" * 9])
    def test_not_a_gguf(self, tmp_path, data):
        (tmp_path / "x.gguf").write_bytes(data)
        with pytest.raises(ModelBroken, match="is not a GGUF file: it begins with"):
            load(tmp_path / "x.gguf", OPTIONS)

    def test_another_version(self, tiny_model, tmp_path):
        data = tiny_model.read_bytes()
        (tmp_path / "x.gguf").write_bytes(data[:4] + b"\x09" + data[5:])
        with pytest.raises(ModelBroken, match="GGUF version 9; versions 2 and 3"):
            load(tmp_path / "x.gguf", OPTIONS)

    def test_truncated_weights(self, tiny_model, tmp_path):
        data = tiny_model.read_bytes()
        (tmp_path / "x.gguf").write_bytes(data[:-100])
        with pytest.raises(ModelBroken, match=rf"truncated at {len(data) - 100} bytes.*file bounds.*get it again"):
            load(tmp_path / "x.gguf", OPTIONS)

    def test_an_unknown_architecture(self, tmp_path):
        path = write_model(tmp_path / "x.gguf", values={"general.architecture": "nonesuch"})
        with pytest.raises(ModelUnsupported, match=r"unknown model architecture: 'nonesuch'.*update llama-cpp-python"):
            load(path, OPTIONS)

    def test_a_missing_tensor(self, tmp_path):
        path = write_model(tmp_path / "x.gguf", without=("blk.1.ffn_up.weight",))
        with pytest.raises(ModelBroken, match=r"tensor 'blk.1.ffn_up.weight' not found"):
            load(path, OPTIONS)

    def test_a_window_without_a_vocabulary(self, tmp_path):
        path = write_model(tmp_path / "x.gguf", values={"tokenizer.ggml.model": "none", "llama.vocab_size": 265})
        with pytest.raises(ModelUnsupported, match="no vocabulary"):
            load(path, OPTIONS)

    def test_a_vocabulary_without_weights(self, tiny_model, tmp_path):
        with load_tokenizer(tiny_model) as tokenizer:
            assert tokenizer.encode("<think>", special=True) == [258]
        (tmp_path / "x.gguf").write_bytes(b"")
        with pytest.raises(ModelBroken):
            load_tokenizer(tmp_path / "x.gguf")


class TestHostileFiles:
    @pytest.mark.parametrize(
        ("name", "kind", "words"),
        [
            (
                "blk.0.attn_norm.weight",
                np.float16,
                "'blk.0.attn_norm.weight' is of type F16, and vectors have to be F32",
            ),
            ("output_norm.weight", np.int8, "is of type I8, and vectors"),
            ("blk.1.attn_q.weight", np.int8, "is of type I8, which no weights are"),
            ("blk.1.ffn_down.weight", np.int16, "I16, which"),
            ("token_embd.weight", np.float64, "F64, which"),
        ],
    )
    def test_types_that_nothing_is_computed_with(self, tmp_path, name, kind, words):
        """llama.cpp would end the process at the first of such a tensor."""
        path = write_model(tmp_path / "x.gguf", types={name: kind})
        with pytest.raises(ModelBroken, match=words):
            load(path, OPTIONS)
        with pytest.raises(ModelBroken, match=words):
            native.Model(path)

    @pytest.mark.parametrize("counts", [[1, 0], [1, 2]])
    def test_listed_heads_that_do_not_fit_the_keys(self, tmp_path, counts):
        path = write_model(tmp_path / "x.gguf", values={"llama.attention.head_count_kv": counts})
        with pytest.raises(ModelBroken, match="layer 1 has keys of 32 numbers"):
            load(path, OPTIONS)
        listed = write_model(tmp_path / "y.gguf", values={"llama.attention.head_count_kv": [1, 1]})
        load(listed, OPTIONS)[0].close()

    def test_a_row_that_does_not_fill_its_blocks(self, tmp_path):
        data = bytearray(write_model(tmp_path / "x.gguf", extra={"odd": (3, 5)}).read_bytes())
        place = data.index(b"odd") + len("odd") + 4 + 2 * 8  # behind two dimensions
        assert data[place : place + 4] == bytes(4)
        data[place] = 2
        (tmp_path / "x.gguf").write_bytes(data)
        with pytest.raises(ModelBroken, match="'odd' has 5 columns, and Q4_0 takes 32 together"):
            load(tmp_path / "x.gguf", OPTIONS)

    def test_truncation_anywhere_is_an_error_and_no_crash(self, tiny_model, tmp_path):
        data = tiny_model.read_bytes()
        n_header = data.index(b"output_norm.weight") + 2000
        cuts = [*range(0, 200, 5), *range(200, n_header, 211), *range(n_header, len(data), 40_009)]
        for n in cuts:
            (tmp_path / f"{n}.gguf").write_bytes(data[:n])
        results = open_all([tmp_path / f"{n}.gguf" for n in cuts])
        assert all(result.startswith("ModelBroken") for result in results)

    def test_absurd_sizes_in_the_header_are_no_crash(self, tiny_model, tmp_path):
        data = tiny_model.read_bytes()
        places = [8, 16, 24]
        for text in (b"general.name", b"tokenizer.ggml.tokens", b"tokenizer.ggml.merges", b"token_embd.weight"):
            start = data.index(text)
            places += [start - 8, *range(start + len(text), start + len(text) + 28, 4)]
        paths = []
        for place in places:
            for i, size in enumerate((2**63, 2**64 - 1, 2**40, 2**31, 0)):
                paths.append(tmp_path / f"{place}-{i}.gguf")
                paths[-1].write_bytes(data[:place] + size.to_bytes(8, "little") + data[place + 8 :])
        open_all(paths)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("llama.block_count", 0),
            ("llama.block_count", 513),
            ("llama.nextn_predict_layers", 3),
            ("llama.expert_count", 4),
            ("llama.expert_count", 1 << 20),
            ("llama.expert_used_count", 1),
            ("llama.expert_group_count", 1),
            ("llama.attention.layer_norm_rms_epsilon", -1.0),
            ("llama.attention.layer_norm_rms_epsilon", float("nan")),
            ("llama.rope.scaling.type", "nonesuch"),
            ("qwen2.rope.dimension_count", 0),
            ("qwen2.attention.key_length", 3),
            ("qwen3.rope.dimension_count", 7),
            ("qwen3moe.rope.dimension_count", 2**31 - 1),
            ("general.alignment", 1),
            ("general.alignment", 0),
            ("tokenizer.ggml.model", "llama"),
            ("tokenizer.ggml.tokens", ["a", "a"]),
        ],
    )
    def test_numbers_that_llama_cpp_asserts_on_are_refused(self, tmp_path, key, value):
        family = key.split(".")[0]
        architecture = family if family.startswith("qwen") else "llama"
        path = write_model(tmp_path / "x.gguf", architecture, values={key: value})
        [result] = open_all([path])
        assert result.startswith("ModelBroken")

    def test_other_absurd_numbers_are_no_crash(self, tmp_path):
        keys = ["context_length", "embedding_length", "attention.head_count", "attention.head_count_kv"]
        keys += ["feed_forward_length", "rope.dimension_count", "vocab_size", "attention.key_length"]
        paths = []
        for key in (*(f"llama.{key}" for key in keys), "tokenizer.ggml.bos_token_id", "tokenizer.ggml.eos_token_id"):
            for i, value in enumerate((0, 1, 3, 2**31 - 1, 2**32 - 1, [1, 2, 3], "x", 0.5)):
                paths.append(write_model(tmp_path / f"{key}-{i}.gguf", values={key: value}))
        open_all(paths)


@pytest.mark.parametrize("architecture", ["llama", "mamba"])
def test_a_forged_state_with_a_right_digest_is_no_crash(architecture, tmp_path):
    path = write_model(tmp_path / "x.gguf", architecture)
    done = subprocess.run([sys.executable, "-c", FORGE, path, tmp_path / "state"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_importing_the_module_does_not_load_the_library():
    code = "import sys, localreason.runtime.native; assert 'llama_cpp' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_opening_and_failing_print_nothing(tiny_model, tmp_path):
    (tmp_path / "x.gguf").write_bytes(tiny_model.read_bytes()[:-100])
    done = subprocess.run(
        [sys.executable, "-c", OPEN_ALL], input=f"{tiny_model}\n{tmp_path / 'x.gguf'}", capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["F16", "BF16", "Q4_0", "Q5_1", "Q8_0", "Q2_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_rows_are_read_as_gguf_reads_them(name):
    kind = GGMLQuantizationType[name]
    n_values, n_bytes = GGML_QUANT_SIZES[kind]
    rows = np.random.default_rng(0).integers(0, 60, (3, 512 // n_values * n_bytes), np.uint8)  # no NaN among scales
    assert np.array_equal(native.dequantize(rows[::2], kind, 512), gguf.quants.dequantize(rows[::2], kind))


def test_rows_of_a_type_without_a_reader_are_refused():
    with pytest.raises(ModelUnsupported, match="i32"):
        native.dequantize(np.zeros((1, 4), np.uint8), GGMLQuantizationType.I32, 1)


@pytest.mark.parametrize(
    ("n_logical", "environment", "expected"),
    [(4, {}, "1000"), (8, {}, None), (4, {"GOMP_SPINCOUNT": "77"}, "77"), (4, {"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_threads_wait_asleep_where_they_take_every_processor(n_logical, environment, expected):
    """What the library itself says that it took from the environment; 4 cores are played."""
    script = f"""
import psutil
psutil.cpu_count = lambda logical=True: {n_logical} if logical else 4
from localreason.runtime.native import library
library()
"""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**inherited, **environment, "OMP_DISPLAY_ENV": "verbose"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("llama.cpp was built without GNU's OpenMP")
    found = next(line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line)
    assert found == expected if expected else int(found) > 1000


@pytest.mark.parametrize(("n_gpu_layers", "is_kept_away"), [(0, True), (1, False)])
def test_without_layers_on_it_a_gpu_is_not_even_opened(n_gpu_layers, is_kept_away, tiny_model, monkeypatch):
    given = []
    monkeypatch.setattr(native.library(), "llama_model_load_from_file", lambda _, parameters: given.append(parameters))
    with pytest.raises(ModelBroken):
        native.Model(tiny_model, n_gpu_layers)
    [devices] = [parameters.devices for parameters in given]
    assert bool(devices) == is_kept_away
    if devices:
        assert ctypes.cast(devices, ctypes.POINTER(ctypes.c_void_p))[0] is None, "a list of none"


def test_what_went_short_is_quoted_and_not_what_was_logged_before_it(monkeypatch):
    lines = ["init: a fan is loud", "warning: cannot allocate twice", "alloc_buffer: failed to allocate 7 bytes"]
    for found, quoted in ((lines, "failed to allocate 7 bytes"), (lines[:1], "a fan is loud")):
        monkeypatch.setattr(native, "_messages", found)
        assert native.cause() == quoted
