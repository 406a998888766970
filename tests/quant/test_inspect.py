"""What is told of model files: whole, split, truncated, too large to load."""

import json
import os
import re
from pathlib import Path

import gguf
import numpy as np
import pytest

from localreason.cli.main import ExitCode, main
from localreason.quant.backend import effective
from localreason.quant.choose import describe
from localreason.quant.inspect import Report, inspect
from localreason.runtime.devices import Backend, backends, cpu_features
from localreason.runtime.engine import Span
from localreason.runtime.errors import ModelBroken, ModelNotFound, ModelUnsupported
from localreason.runtime.header import read_table
from localreason.runtime.llama import EngineOptions, load
from localreason.runtime.parts import join, part_names, read_local
from localreason.runtime.room import cell_bytes
from localreason.runtime.schemes import FTYPES, SCHEMES
from tests import gguf_models
from tests.gguf_models import write_large, write_model, write_split

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("home")


def report(path: Path, cache_type: str = "f16") -> Report:
    return inspect(read_local(path), cache_type)


def warned(found: Report, words: str) -> bool:
    return any(re.search(words, warning) for warning in found.warnings)


def test_sums_by_type_and_part_are_those_of_the_tensors(home: Path):
    path = write_model(home / "tiny.gguf", "qwen3")
    found, header = report(path), read_table(path)
    n = sum(int(np.prod(entry.shape)) for entry in header.tensors)
    assert (found.architecture, found.n_parameters, found.weights_bytes) == ("qwen3", n, 4 * n)
    assert (found.n_layers, found.n_context, found.n_vocab, found.n_bytes) == (2, 512, 265, path.stat().st_size)
    (one,) = found.types
    assert (one.name, one.n_tensors, one.n_bytes, one.share, one.bits) == ("F32", len(header.tensors), 4 * n, 1, 32)
    assert sum(part.n_bytes for part in found.parts) == 4 * n
    assert {part.name: part.n_bytes for part in found.parts}["embedding"] == 265 * 64 * 4
    assert found.is_output_tied
    assert found.cache_bytes == {kind: 1000 * cell_bytes(header.values, kind) for kind in ("f16", "q8_0", "q4_0")}
    assert found.has_template
    assert found.thinking_format == "prompted"
    assert found.warnings == ()


def test_a_file_larger_than_the_memory_is_inspected(home: Path):
    found = report(write_large(home / "large.gguf", "Q4_K", n_layers=80, n_embd=65536, file_type=FTYPES["Q4_K_M"]))
    assert found.weights_bytes > 700e9
    assert found.precision.scheme == "Q4_K_M"
    assert found.bits_per_weight == 4.5
    assert {part.name: part.n_tensors for part in found.parts} == {"embedding": 1, "layers": 80, "output": 1}
    assert not found.is_output_tied
    assert found.effective == {"CPU": {"Q4_K": "W4A8"}}
    # A good file of a large model: only that nothing is said of an importance matrix.
    assert len(found.warnings) == 1
    assert warned(found, "without an importance matrix")


def test_an_importance_matrix_is_shown_and_ends_its_warning(home: Path):
    found = report(write_large(home / "m.gguf", "IQ4_XS", 120, **{"quantize__imatrix__file": "traces.dat"}))
    assert found.imatrix == {"file": "traces.dat"}
    assert not warned(found, "importance")
    assert not warned(report(write_large(home / "n.gguf", "MXFP4", 120)), "importance")  # trained so


def test_what_a_file_was_made_of_is_shown(home: Path, capfd: pytest.CaptureFixture[str]):
    made = {"localreason__convert__source": "big.gguf", "localreason__convert__tensors.0": ""}
    path = write_large(home / "m.gguf", "Q8_0", 120, **made)
    assert report(path).made_from == {"source": "big.gguf"}
    assert main(["quant", "inspect", str(path)]) == ExitCode.OK
    assert re.search("made from +source big.gguf\n", capfd.readouterr().out)


def test_a_name_that_does_not_fit_the_weights_is_told(home: Path):
    found = report(write_large(home / "m.gguf", "Q5_0", file_type=FTYPES["Q4_K_M"]))
    assert found.precision.scheme == "Q5_0"
    assert warned(found, r"types are mixed: .*Q5_0 100%, although the file says Q4_K_M")


def test_weights_made_of_fewer_bits_are_told_and_counted_as_those(home: Path):
    made = {"localreason__convert__source_scheme": "Q4_1"}
    path = write_large(home / "m.gguf", "Q8_0", 120, file_type=FTYPES["Q8_0"], **made)
    found = report(path)
    assert (found.precision.scheme, found.precision.weight_bits) == ("Q8_0", 4)
    assert warned(found, "Q8_0 weights were made of Q4_1 and are no better")
    known = describe(read_table(path), "m")
    assert (known.scheme, known.n_bits, known.source_scheme) == ("Q8_0", 4, "Q4_1")
    better = write_large(home / "n.gguf", "Q8_0", 120, **{"localreason__convert__source_scheme": "F16"})
    assert report(better).warnings == ()


def test_one_file_has_one_scheme_for_inspect_and_for_choose(home: Path):
    path = write_large(home / "m.gguf", "Q4_K", 120, file_type=FTYPES["Q4_K_M"])
    assert describe(read_table(path), "m").scheme == report(path).precision.scheme == "Q4_K_M"


def test_advice_about_precision_is_that_of_size_and_cache(home: Path):
    path = write_large(home / "m.gguf", "Q3_K", file_type=FTYPES["Q3_K_M"])
    assert warned(report(path), "below 4 reasoning breaks")
    assert not warned(report(path), "q4_0")
    assert warned(report(path, "q4_0"), "q4_0 cache is near lossless from 14B")
    assert warned(report(write_large(home / "n.gguf", "Q4_0")), "below 4B")


def test_what_the_cluster_and_caches_cannot_do_is_told(home: Path):
    assert warned(report(write_model(home / "m.gguf", "mamba")), "'mamba' is not known .* --cluster")
    odd = write_model(home / "odd.gguf", values={"llama.attention.key_length": 40})
    found = report(odd, "q8_0")
    assert found.cache_bytes["q8_0"] is None
    assert found.cache_bytes["f16"]
    assert warned(found, "do not fill the blocks of a q8_0 cache")


def test_a_truncated_file_is_read_and_told(home: Path):
    path = write_model(home / "m.gguf")
    os.truncate(path, path.stat().st_size - 1000)
    found = report(path)
    assert found.warnings[0].startswith(f"{path} is truncated: the tensor 'blk.1.ffn_down.weight' ends at")
    os.truncate(path, 2000)
    with pytest.raises(ModelBroken, match="truncated or damaged"):
        report(path)


def test_numbers_that_llama_cpp_would_end_on_are_told(home: Path):
    found = report(write_model(home / "m.gguf", values={"llama.attention.layer_norm_rms_epsilon": -1.0}))
    assert "layer_norm_rms_epsilon is -1.0" in found.warnings[0]


def test_a_type_that_is_not_known_is_refused(home: Path):
    path = write_model(home / "m.gguf")
    pieces = read_local(path)
    entry = pieces[0].header.tensors[0]
    pieces[0].header.tensors[0] = type(entry)(entry.name, entry.shape, 99, entry.offset)
    with pytest.raises(ModelUnsupported, match="of type 99"):
        inspect(pieces)


def test_a_split_model_is_one_by_any_of_its_parts(home: Path):
    whole, parts = report(write_model(home / "whole.gguf")), write_split(home)
    assert len(parts) == 3
    for part in parts:
        found = report(part)
        assert found.n_files == 3
        assert found.n_bytes == sum(path.stat().st_size for path in parts)
        assert (found.n_parameters, found.types, found.parts) == (whole.n_parameters, whole.types, whole.parts)
        assert found.warnings == ()


def test_a_split_model_is_loaded_and_chosen_by_any_of_its_parts(home: Path, capfd: pytest.CaptureFixture[str]):
    parts = write_split(home)
    rows = []
    for part in parts:
        engine, _ = load(part, EngineOptions(n_context=256, n_sequences=1))
        with engine:
            rows.append(engine.decode([Span(0, 0, [5, 6, 7])]).copy())
    assert all(np.array_equal(rows[0], row) for row in rows)
    assert main(["quant", "choose", str(parts[1]), "--context", "256"]) == ExitCode.OK
    assert "Take tiny-00002-of-00003.gguf with 256 tokens" in capfd.readouterr().out
    assert main(["models", "show", str(parts[1]), "--json"]) == ExitCode.OK
    n_tensors = sum(type_sum.n_tensors for type_sum in report(parts[0]).types)
    assert json.loads(capfd.readouterr().out)["tensors"] == n_tensors > len(parts)


def test_a_header_that_counts_other_tensors_than_its_parts_hold_is_told(home: Path):
    pieces = read_local(write_split(home)[0])
    pieces[0].header.values["split.tensors.count"] += 1
    with pytest.raises(ModelBroken, match=r"says that the parts hold \d+ tensors and they hold \d+"):
        join(pieces)


def test_parts_that_are_missing_renamed_or_swapped_are_told(home: Path):
    first, second, third = write_split(home)
    swapped = second.read_bytes()
    second.unlink()
    with pytest.raises(ModelNotFound, match=r"one of 3 parts and \S+tiny-00002-of-00003.gguf is missing"):
        report(first)
    second.write_bytes(third.read_bytes())
    with pytest.raises(ModelBroken, match="part 2 of 3, counted from 0, and it stands for part 1"):
        report(first)
    second.write_bytes(swapped)
    lone = first.rename(home / "lone.gguf")
    with pytest.raises(ModelBroken, match="one of 3 parts and 1 were found"):
        report(lone)
    assert part_names("m.gguf") == ["m.gguf"]


def test_bits_of_activations_depend_on_what_computes():
    gpu, metal, vulkan = (Backend(name, name.rstrip("0")) for name in ("CUDA0", "Metal", "Vulkan0"))
    assert effective(SCHEMES["Q8_0"], Backend("CPU", "CPU")) == "W8A8"
    assert effective(SCHEMES["Q4_K"], gpu) == "W4A8"
    assert effective(SCHEMES["Q4_K"], metal) == "W4A16"
    assert effective(SCHEMES["Q4_K"], vulkan) == "W4A8 or W4A16"
    assert effective(SCHEMES["F16"], gpu) == effective(SCHEMES["BF16"], Backend("CPU", "CPU")) == "W16A16"
    assert backends()[-1].driver == "CPU"
    assert "CPU" not in cpu_features()
    assert cpu_features()


def test_the_command_tells_a_person_all_of_it(home: Path, capfd: pytest.CaptureFixture[str]):
    path = write_model(home / "m.gguf", values={"general.name": "evil\x1b[31m\nname"})
    assert main(["quant", "inspect", str(path)]) == ExitCode.OK
    out = capfd.readouterr().out
    for words in ("llama, 2 layers", "32.00 bits per weight", "F32", "embedding", "per 1,000 tokens", "W32A32"):
        assert words in out
    assert "\x1b" not in out
    assert main(["quant", "inspect", str(path), "--json", "--cache-type", "q4_0"]) == ExitCode.OK
    row = json.loads(capfd.readouterr().out)
    assert any("q4_0 cache" in warning for warning in row["warnings"])


@pytest.mark.parametrize(
    "args",
    [
        ("inspect", "v.gguf"),
        ("convert", "v.gguf", "w.gguf", "--scheme", "q4_0"),
        ("choose", "v.gguf"),
        ("measure", "v.gguf", "v.gguf", "--text", "text.txt"),
        ("imatrix", "v.gguf", "-o", "i.gguf", "--from", "text.txt"),
    ],
)
def test_a_vocabulary_without_tensors_is_refused_as_that(
    args: tuple[str, ...], home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(home)
    (home / "text.txt").write_text("some words " * 200)
    writer = gguf.GGUFWriter(home / "v.gguf", "llama")
    gguf_models._add_vocabulary(writer)
    gguf_models._add_shape(writer, "llama", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    assert main(["quant", *args]) == ExitCode.MODEL
    assert "v.gguf holds no tensors" in capfd.readouterr().err


def test_what_is_neither_file_nor_folder_is_not_called_a_folder(home: Path, capfd: pytest.CaptureFixture[str]):
    assert main(["quant", "inspect", os.devnull]) == ExitCode.MODEL
    assert "is no regular file" in capfd.readouterr().err
    assert main(["quant", "inspect", str(home)]) == ExitCode.MODEL
    assert "is a folder" in capfd.readouterr().err


@pytest.mark.parametrize("data", [b"", b"GGUF", b"no model at all, but long enough to have a header"])
def test_a_file_that_is_no_model_is_a_model_error(data: bytes, home: Path, capfd: pytest.CaptureFixture[str]):
    (home / "bad.gguf").write_bytes(data)
    assert main(["quant", "inspect", str(home / "bad.gguf")]) == ExitCode.MODEL
    assert main(["quant", "inspect", str(home / "missing.gguf")]) == ExitCode.MODEL
    assert "Traceback" not in capfd.readouterr().err
