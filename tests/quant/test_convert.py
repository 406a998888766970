"""Conversion: exact sizes, types and records; refusals; and that nothing but a whole file ever stays."""

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import psutil
import pytest

from localreason.cli.main import ExitCode, main
from localreason.quant.choose import Machine, describe, rank
from localreason.quant.convert import check_target, convert, plan_conversion
from localreason.quant.gguf import ModelFile
from localreason.quant.imatrix import Entry, Importance, write_importance
from localreason.quant.inspect import inspect
from localreason.quant.request import Request
from localreason.quant.weights import has_imatrix
from localreason.runtime.engine import Span
from localreason.runtime.errors import (
    EngineError,
    InputError,
    LocalReasonError,
    ModelBroken,
    ModelNotFound,
    ModelUnsupported,
    OutputError,
)
from localreason.runtime.fit import Free
from localreason.runtime.llama import EngineOptions, load
from localreason.runtime.parts import read_local
from tests.gguf_models import write_model

SHA256 = "ab" * 32
SPARE = {"blk.0.spare.weight": (8, 256)}
"""A matrix wide enough for types with blocks of 256."""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_CACHE_HOME", "XDG_DATA_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "made"
    made.mkdir()
    return made


def make(source: Path, target: Path, request: Request) -> ModelFile:
    convert(plan_conversion(source, request), target, SHA256)
    return ModelFile(target)


def values_of(file: ModelFile, name: str) -> np.ndarray:
    tensor = next(tensor for tensor in gguf.GGUFReader(file.path).tensors if tensor.name == name)
    return gguf.quants.dequantize(tensor.data, tensor.tensor_type)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16", "Q4_0", "iq4_xs", "f16"])
def test_a_converted_model_has_the_planned_size_and_types_and_runs(tiny_model, folder, scheme):
    plan = plan_conversion(tiny_model, Request(scheme))
    target = folder / "new.gguf"

    convert(plan, target, SHA256)

    assert target.stat().st_size == plan.n_bytes
    made = ModelFile(target)
    assert {name: tensor.type_name for name, tensor in made.tensors.items()} == plan.types
    assert made.header.values["localreason.convert.source"] == tiny_model.name
    assert made.header.values["localreason.convert.source_sha256"] == SHA256
    assert made.header.values["localreason.convert.scheme"] == plan.scheme
    assert list(folder.iterdir()) == [target]
    engine, _ = load(target, EngineOptions(n_context=256, n_sequences=1))
    with engine:
        assert np.isfinite(engine.decode([Span(0, 0, [5, 6, 7])])).all()


def test_the_values_are_those_of_the_source_in_the_new_type(tiny_model, folder):
    made = make(tiny_model, folder / "new.gguf", Request("q8_0"))

    source = ModelFile(tiny_model)
    for name in ("blk.1.ffn_down.weight", "token_embd.weight"):
        wanted = gguf.quants.quantize(values_of(source, name), gguf.GGMLQuantizationType.Q8_0)
        found = next(tensor.data for tensor in gguf.GGUFReader(made.path).tensors if tensor.name == name)
        assert np.array_equal(found, wanted)


def test_single_tensors_the_output_and_the_embedding_get_the_types_asked_for(folder):
    source = write_model(folder / "source.gguf", extra={"output.weight": (265, 64)})
    request = Request("q4_0", (("ffn_down", "q8_0"), (r"blk\.1\.attn_", "Q5_1")), "f16", "q5_0")

    made = make(source, folder / "new.gguf", request)

    assert made.tensors["blk.0.ffn_down.weight"].type_name == "Q8_0"
    assert made.tensors["blk.0.attn_q.weight"].type_name == "Q4_0"
    assert made.tensors["blk.1.attn_q.weight"].type_name == "Q5_1"
    assert made.tensors["output.weight"].type_name == "F16"
    assert made.tensors["token_embd.weight"].type_name == "Q5_0"
    assert made.header.values["localreason.convert.tensors.1"] == r"blk\.1\.attn_=Q5_1"
    assert made.header.values["localreason.convert.output_type"] == "f16"


def test_pure_gives_all_matrices_one_type(tiny_model):
    assert set(plan_conversion(tiny_model, Request("q4_0", is_pure=True)).types.values()) == {"Q4_0", "F32"}
    assert "Q8_0" in plan_conversion(tiny_model, Request("q4_0")).types.values()


def test_a_quantised_source_is_converted_only_on_demand_and_drops_the_old_record(tiny_model, folder):
    first = make(tiny_model, folder / "first.gguf", Request("q8_0", (("ffn_down", "q4_0"),)))
    with pytest.raises(ModelUnsupported, match=r"quantised already .* --allow-requantize"):
        plan_conversion(first.path, Request("q4_0"))

    second = make(first.path, folder / "second.gguf", Request("q4_0", allows_requantize=True))

    assert second.header.values["localreason.convert.source"] == "first.gguf"
    assert second.header.values["localreason.convert.tensors.0"] == ""


def test_the_fewest_bits_on_the_way_from_the_first_source_are_recorded(tiny_model, folder):
    low = make(tiny_model, folder / "low.gguf", Request("q4_0", is_pure=True))
    high = make(low.path, folder / "high.gguf", Request("q8_0", allows_requantize=True))
    again = make(high.path, folder / "again.gguf", Request("q8_0", allows_requantize=True))

    said = [file.header.values["localreason.convert.source_scheme"] for file in (low, high, again)]
    assert said == ["F32", "Q4_0", "Q4_0"]
    assert describe(again.header, "again").n_bits == 4
    assert "made of Q4_0" in rank([describe(high.header, "high")], Machine(Free(1 << 40)), 512)[0].warnings[-1]


def test_what_was_quantised_twice_comes_behind_its_source_even_with_a_matrix(tiny_model, folder):
    once = make(tiny_model, folder / "once.gguf", Request("q4_1", is_pure=True))
    twice = make(once.path, folder / "twice.gguf", Request("q4_0", allows_requantize=True))

    candidates = [replace(describe(twice.header, "twice"), has_imatrix=True), describe(once.header, "once")]
    options = rank(candidates, Machine(Free(1 << 40)), 512)
    assert [option.candidate.name for option in options] == ["once", "twice"]
    assert "Q4_0 of Q4_1 has the losses of both" in options[1].warnings[-1]
    assert "have the losses of both" in " ".join(inspect(read_local(twice.path)).warnings)


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (Request("q9_9"), InputError, "Q4_K_M"),
        (Request("nvfp4"), EngineError, "invalid output file type"),
        (Request("q4_0", output_type="q8_1"), InputError, "no tensor type 'q8_1'"),
        (Request("q4_0", embedding_type="q6_k"), InputError, "rows of 64 and Q6_K takes multiples of 256"),
        (Request("q4_0", (("ffn_dwon", "q8_0"),)), InputError, "fits no tensor"),
        (Request("q4_0", (("ffn_(down", "q8_0"),)), InputError, "a pattern is no regular expression"),
        (Request("q4_0", (("f" * 130, "q8_0"),)), InputError, "longer than 127 bytes"),
        (Request("f16", (("ffn_down", "q8_0"),)), InputError, "quantised schemes only"),
        (Request("q4_0", imatrix=Path("nowhere.gguf")), InputError, "nowhere.gguf cannot be read"),
    ],
)
def test_what_cannot_be_made_is_refused_in_a_sentence(tiny_model, request_, error, words):
    with pytest.raises(error, match=words):
        plan_conversion(tiny_model, request_)


def test_files_that_are_no_whole_model_are_refused(tiny_model, folder):
    (folder / "text.gguf").write_bytes(b"no model at all, only text")
    (folder / "half.gguf").write_bytes(tiny_model.read_bytes()[:-5000])
    write_model(folder / "wide.gguf", values={"general.alignment": 64})
    write_model(folder / "other.gguf", values={"general.architecture": "nonsense"})
    for name, error, words in (
        ("text.gguf", ModelBroken, "not a GGUF"),
        ("half.gguf", ModelBroken, "get it again"),
        ("missing.gguf", ModelNotFound, "no model file"),
        ("wide.gguf", ModelUnsupported, "aligned to 64"),
        ("other.gguf", ModelUnsupported, "architecture"),
    ):
        with pytest.raises(error, match=words):
            plan_conversion(folder / name, Request("q8_0"))


def test_a_shape_on_which_llama_cpp_ends_its_process_is_an_error_and_leaves_no_file(folder):
    source = write_model(folder / "source.gguf", extra={"blk.0.spare.weight": (3, 2, 4, 32)})

    with pytest.raises(EngineError, match=r"ended its process .*source\.gguf"):
        make(source, folder / "new.gguf", Request("q8_0"))

    assert list(folder.iterdir()) == [source]


def test_types_that_are_useless_without_an_importance_matrix_need_one_with_an_entry(folder):
    source, matrix = write_model(folder / "source.gguf", extra=SPARE), folder / "matrix.gguf"
    with pytest.raises(InputError, match=r"spare\.weight would become IQ2_XXS.*--imatrix"):
        plan_conversion(source, Request("iq2_xxs"))

    entries = {"blk.0.ffn_up.weight": Entry(np.ones((1, 64), np.float32), np.ones(1, np.float32))}
    write_importance(Importance(entries, 3, 512), matrix)
    with pytest.raises(InputError, match=r"spare\.weight would become IQ2_XXS"):
        plan_conversion(source, Request("iq2_xxs", imatrix=matrix))
    entries["blk.0.spare.weight"] = Entry(np.ones((1, 256), np.float32), np.ones(1, np.float32))
    write_importance(Importance(entries, 3, 512), matrix)

    made = make(source, folder / "new.gguf", Request("iq2_xxs", imatrix=matrix))

    assert made.tensors["blk.0.spare.weight"].type_name == "IQ2_XXS"
    assert made.header.values["quantize.imatrix.file"] == "matrix.gguf"
    assert made.header.values["quantize.imatrix.chunks_count"] == 3


def test_an_importance_matrix_moves_the_error_to_columns_that_matter_less(tiny_model, folder):
    name, weight = "blk.0.ffn_up.weight", np.where(np.arange(64) % 2, 1e4, 1).astype(np.float32)
    write_importance(Importance({name: Entry(weight[None], np.ones(1, np.float32))}, 1, 512), folder / "matrix.gguf")

    plain = make(tiny_model, folder / "plain.gguf", Request("q4_0"))
    guided = make(tiny_model, folder / "guided.gguf", Request("q4_0", imatrix=folder / "matrix.gguf"))

    wanted = values_of(ModelFile(tiny_model), name)
    errors = [np.square(values_of(file, name) - wanted)[:, 1::2].mean() for file in (plain, guided)]
    assert errors[1] < 0.8 * errors[0]


def test_a_file_made_again_without_an_importance_matrix_claims_none(tiny_model, folder):
    ones = Entry(np.ones((1, 64), np.float32), np.ones(1, np.float32))
    write_importance(Importance({"blk.0.ffn_up.weight": ones}, 1, 512), folder / "matrix.gguf")
    first = make(tiny_model, folder / "first.gguf", Request("q8_0", imatrix=folder / "matrix.gguf"))
    assert has_imatrix(first.header.values)

    second = make(first.path, folder / "second.gguf", Request("q4_0", allows_requantize=True))

    assert not has_imatrix(second.header.values)


def test_an_importance_matrix_of_another_model_is_refused(tiny_model, folder):
    for entries, words in (
        ({"blk.9.ffn_up.weight": Entry(np.ones((1, 64), np.float32), np.ones(1, np.float32))}, "no entry"),
        ({"blk.0.ffn_up.weight": Entry(np.ones((1, 32), np.float32), np.ones(1, np.float32))}, "32 values"),
    ):
        write_importance(Importance(entries, 1, 512), folder / "matrix.gguf")
        with pytest.raises(InputError, match=f"{words}.*another model"):
            plan_conversion(tiny_model, Request("q4_0", imatrix=folder / "matrix.gguf"))


def test_targets_that_would_destroy_something_are_refused(folder):
    source = write_model(folder / "source.gguf")
    (folder / "link.gguf").symlink_to(source)
    (folder / "old.gguf").write_bytes(b"precious")
    (folder / "away.gguf").symlink_to(folder / "not mounted" / "away.gguf")
    for name, words in (
        ("away.gguf", "is a link to .*not mounted"),
        ("source.gguf", "source itself"),
        ("link.gguf", "source itself"),
        ("old.gguf", "--force"),
        ("none/new.gguf", "no folder"),
    ):
        with pytest.raises(OutputError, match=words):
            check_target(source, folder / name)
    for name in ("source.gguf", "link.gguf", "../made"):
        with pytest.raises(OutputError):
            check_target(source, folder / name, is_forced=True)

    convert(plan_conversion(source, Request("q8_0")), folder / "old.gguf", SHA256, is_forced=True)

    assert ModelFile(folder / "old.gguf").tensors["blk.0.ffn_up.weight"].type_name == "Q8_0"


def test_too_little_space_is_noticed_before_anything_is_written(tiny_model, folder):
    plan = plan_conversion(tiny_model, Request("q8_0"))

    with pytest.raises(OutputError, match=f"takes {plan.n_bytes} bytes and .* has {plan.n_bytes - 1} free"):
        convert(plan, folder / "new.gguf", SHA256, free_bytes=lambda _: plan.n_bytes - 1)

    assert not list(folder.iterdir())
    convert(plan, folder / "new.gguf", SHA256, free_bytes=lambda _: plan.n_bytes)


def test_a_file_of_another_size_than_planned_does_not_stay(tiny_model, folder):
    plan = plan_conversion(tiny_model, Request("q8_0"))

    with pytest.raises(OutputError, match=f"{plan.n_bytes} bytes were written and {plan.n_bytes + 32} planned"):
        convert(replace(plan, n_bytes=plan.n_bytes + 32), folder / "new.gguf", SHA256)

    assert not list(folder.iterdir())


def test_a_long_name_is_cut_by_bytes_for_the_half_file(tiny_model, folder):
    target = folder / ("ü" * 120 + ".gguf")
    convert(plan_conversion(tiny_model, Request("q8_0")), target, SHA256)
    assert list(folder.iterdir()) == [target]


def test_a_dry_run_says_whether_the_disk_has_room(tiny_model, folder, capsys):
    line = ["quant", "convert", str(tiny_model), str(folder / "new.gguf"), "--scheme", "q8_0", "--dry-run"]
    assert main(line) == ExitCode.OK
    assert re.search(r"the disk has \d+ bytes free, enough", capsys.readouterr().out)


def test_progress_goes_through_all_tensors_and_an_interruption_leaves_no_file(tiny_model, folder):
    plan, told = plan_conversion(tiny_model, Request("q8_0")), []
    children = psutil.Process().children()
    convert(plan, folder / "whole.gguf", SHA256, report=lambda *args: told.append(args))
    total = sum(tensor.n_bytes for tensor in ModelFile(tiny_model).tensors.values())
    assert {name for _, _, name in told} == {*plan.types, ""}
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1] == (total, total, "")

    def interrupt(done: int, total: int, name: str) -> None:
        assert list(folder.glob(".new.gguf.*"))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(plan, folder / "new.gguf", SHA256, report=interrupt)
    assert [path.name for path in folder.iterdir()] == ["whole.gguf"]
    assert psutil.Process().children() == children


KILLED = """
import os, signal, sys, psutil
from pathlib import Path
from localreason.quant.choose import Machine, describe, rank
from localreason.quant.convert import convert, plan_conversion
from localreason.quant.request import Request

def die(done, total, name):
    print(psutil.Process().children()[0].pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

convert(plan_conversion(Path(sys.argv[1]), Request("q8_0")), Path(sys.argv[2]), "ab" * 32, report=die)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows kills otherwise")
def test_a_killed_conversion_takes_its_process_and_its_half_file_along(tiny_model, folder):
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tiny_model), str(folder / "new.gguf")], capture_output=True, text=True
    )

    assert run.returncode == -signal.SIGKILL
    if psutil.pid_exists(int(run.stdout)):
        psutil.Process(int(run.stdout)).wait(timeout=20)
    assert not list(folder.iterdir())


def test_half_files_of_dead_processes_are_removed_and_no_others(tiny_model, folder):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    tag = "0123abcd.localreason-part"
    for name in (f".x.gguf.{dead.pid}.{tag}", f".y.gguf.{os.getpid()}.{tag}", f".z.gguf.{dead.pid}.part"):
        (folder / name).write_bytes(b"half")

    make(tiny_model, folder / "new.gguf", Request("q8_0"))

    assert sorted(path.name for path in folder.iterdir()) == [
        f".y.gguf.{os.getpid()}.{tag}",
        f".z.gguf.{dead.pid}.part",
        "new.gguf",
    ]


def test_the_command_converts_and_describes(tiny_model, folder, capsys):
    target = folder / "new.gguf"
    line = ["quant", "convert", str(tiny_model), str(target), "--scheme", "w8a8", "--tensor", "ffn_up=q4_0", "--json"]

    assert main([*line, "--dry-run"]) == ExitCode.OK
    planned = json.loads(capsys.readouterr().out)
    assert planned.pop("free_bytes") > planned["bytes"]
    assert not target.exists()
    assert main(line) == ExitCode.OK
    row = json.loads(capsys.readouterr().out)

    assert row.pop("seconds") > 0
    assert row == planned
    assert row["bytes"] == target.stat().st_size
    assert row["tensors"] == {"Q8_0": 13, "F32": 5, "Q4_0": 2}
    made = ModelFile(target)
    assert len(str(made.header.values["localreason.convert.source_sha256"])) == 64
    assert main(line) == ExitCode.OUTPUT
    assert "--force" in capsys.readouterr().err
    assert main([*line, "--force"]) == ExitCode.OK


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--scheme", "q9"], ExitCode.INPUT),
        (["--scheme", "q8_0", "--tensor", "ffn_up"], ExitCode.INPUT),
        (["--scheme", "q8_0", "--threads", "0"], ExitCode.USAGE),
        ([], ExitCode.USAGE),
    ],
)
def test_the_command_tells_mistakes_apart(tiny_model, folder, capsys, options, code):
    assert main(["quant", "convert", str(tiny_model), str(folder / "new.gguf"), *options]) == code
    assert "Traceback" not in capsys.readouterr().err
    assert not list(folder.iterdir())


def test_what_llama_cpp_makes_otherwise_than_asked_is_told(folder, capsys):
    source = write_model(folder / "source.gguf", extra=SPARE)
    plan = plan_conversion(source, Request("w4a16"))
    assert plan.types["blk.0.spare.weight"] == "Q4_K"
    assert len(plan.warnings) == 1
    assert (
        "15 of 16 matrices are Q5_0 or Q8_0 instead of Q4_K: rows of 64 and 96 are no multiple of 256"
        in (plan.warnings[0])
    )
    assert main(["quant", "convert", str(source), str(folder / "n.gguf"), "--scheme", "w4a16"]) == ExitCode.OK
    assert "no multiple of 256" in capsys.readouterr().err
    assert plan_conversion(source, Request("q8_0", (("spare", "q4_k"),))).warnings == ()


def test_a_type_of_single_tensors_that_they_would_not_get_is_refused(folder):
    source = write_model(folder / "source.gguf", extra=SPARE)
    with pytest.raises(InputError, match=r"ffn=q4_K cannot be kept: \S+ would become Q5_0, since its rows of \d+ are"):
        plan_conversion(source, Request("q8_0", (("ffn", "q4_K"),)))
    with pytest.raises(InputError, match=r"attn_norm=q5_0 cannot be kept: llama\.cpp leaves"):
        plan_conversion(source, Request("q8_0", (("attn_norm", "q5_0"),)))


def test_a_pattern_that_comes_too_late_is_told(tiny_model):
    [warning] = plan_conversion(tiny_model, Request("q8_0", (("ffn", "q5_0"), ("ffn_up", "q4_0")))).warnings
    assert warning.startswith("--tensor ffn_up=q4_0 has no effect: an earlier --tensor fits all 2 matrices")
    narrow_first = Request("q8_0", (("ffn_up", "q5_0"), ("ffn", "q4_0")), "f16")
    assert plan_conversion(tiny_model, narrow_first).warnings == ()


def test_every_refusal_is_a_sentence_with_a_remedy(tiny_model, folder):
    (folder / "junk.dat").write_bytes(b"\x00\x01")
    for request in (Request("q4"), Request("q4_0", imatrix=folder / "junk.dat"), Request("q4_0", output_type="x")):
        with pytest.raises(LocalReasonError) as caught:
            plan_conversion(tiny_model, request)
        assert "\n" not in str(caught.value)
