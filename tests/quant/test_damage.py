"""Files that are no models, or no longer: each command says so in an error of ours, and nothing is left behind."""

import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localreason.cli.main import ExitCode, main
from localreason.quant.convert import convert, plan_conversion
from localreason.quant.gguf import ModelFile
from localreason.quant.imatrix import Entry, Importance, read_importance, write_importance
from localreason.quant.inspect import inspect
from localreason.quant.request import Request
from localreason.quant.source import read_remote
from localreason.runtime.errors import InputError, LocalReasonError, ModelError, OutputError
from localreason.runtime.parts import read_local
from tests.gguf_models import write_model

numpy = pytest.importorskip("numpy")
REUSED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def read_far(path: Path) -> object:
    data = path.read_bytes()
    return inspect([read_remote(path.name, len(data), lambda start, n: data[start : start + n])])


READERS: dict[str, Callable[[Path], object]] = {
    "inspect": lambda path: inspect(read_local(path)),
    "remote": read_far,
    "tensors": ModelFile,
    "convert": lambda path: plan_conversion(path, Request("q8_0")),
}


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    return tmp_path / "damaged.gguf"


def header_end(path: Path) -> int:
    return ModelFile(path).header.data_offset


@pytest.mark.parametrize("reader", READERS)
@REUSED
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_file_that_ends_anywhere_is_an_error_or_told(tiny_model: Path, damaged: Path, reader: str, share: float):
    data = Path(tiny_model).read_bytes()
    n = int(share * len(data))
    # Most bytes are weights; most that can go wrong is before them.
    n = n if n % 4 else int(share * header_end(Path(tiny_model)))
    damaged.write_bytes(data[:n])
    try:
        found = READERS[reader](damaged)
    except ModelError:
        return
    assert reader in ("inspect", "remote"), "only what does not need the weights may go on without them"
    assert any("is truncated" in warning for warning in getattr(found, "warnings", ()))


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("position", "value"),
    [
        (8, 1 << 62),  # tensors
        (8, 1 << 15),
        (16, 1 << 62),  # values
        (24, 1 << 63),  # bytes of the first key
        (24, 1 << 31),
    ],
)
def test_absurd_counts_are_refused_before_they_are_believed(
    tiny_model: Path, damaged: Path, reader: str, position: int, value: int
):
    data = bytearray(Path(tiny_model).read_bytes())
    data[position : position + 8] = struct.pack("<Q", value)
    damaged.write_bytes(data)
    with pytest.raises(ModelError, match="damaged"):
        READERS[reader](damaged)


def entry_place(data: bytes, name: bytes) -> int:
    """Where the number of dimensions of a tensor stands."""
    return data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)


@pytest.mark.parametrize("reader", ["inspect", "tensors", "convert"])
@pytest.mark.parametrize("value", [1 << 20, 1 << 40, (1 << 63) - 32, (1 << 64) - 32])
def test_a_tensor_outside_the_file_is_an_error_or_told(tiny_model: Path, damaged: Path, reader: str, value: int):
    data = bytearray(Path(tiny_model).read_bytes())
    place = entry_place(data, b"output_norm.weight")
    (n_dimensions,) = struct.unpack_from("<I", data, place)
    struct.pack_into("<Q", data, place + 4 + 8 * n_dimensions + 4, value)
    damaged.write_bytes(data)
    if reader == "inspect":
        assert any("truncated" in warning for warning in inspect(read_local(damaged)).warnings)
        return
    with pytest.raises(ModelError):
        READERS[reader](damaged)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("size", [0, 1 << 33, (1 << 63) - 1, (1 << 64) - 1])
def test_an_absurd_shape_is_an_error_or_told(tiny_model: Path, damaged: Path, reader: str, size: int):
    data = bytearray(Path(tiny_model).read_bytes())
    struct.pack_into("<Q", data, entry_place(data, b"token_embd.weight") + 4 + 8, size)
    damaged.write_bytes(data)
    try:
        found = READERS[reader](damaged)
    except LocalReasonError:
        return
    assert reader in ("inspect", "remote")
    assert getattr(found, "warnings", ())


@REUSED
@given(place=st.integers(0, 1 << 16), value=st.integers(0, 255))
def test_one_wrong_byte_in_the_header_is_no_crash(tiny_model: Path, damaged: Path, place: int, value: int):
    data = bytearray(Path(tiny_model).read_bytes())
    data[place % header_end(Path(tiny_model))] = value
    damaged.write_bytes(data)
    for name in ("inspect", "tensors"):
        try:
            READERS[name](damaged)
        except LocalReasonError:
            continue


@REUSED
@given(share=st.floats(0, 1, exclude_max=True))
def test_an_importance_matrix_that_ends_anywhere_is_an_error(tmp_path: Path, share: float):
    path = tmp_path / "m.gguf"
    entry = Entry(numpy.ones((1, 64), numpy.float32), numpy.ones(1, numpy.float32))
    write_importance(Importance({"blk.0.ffn_up.weight": entry}, 1, 512, "text", 512), path)
    n_padding = 32 - 4  # behind the last number
    path.write_bytes(path.read_bytes()[: int(share * (path.stat().st_size - n_padding))])
    with pytest.raises(InputError):
        read_importance(path)


@pytest.mark.parametrize("command", ["inspect", "convert", "measure", "imatrix"])
@pytest.mark.parametrize(
    ("content", "words"), [(b"", "not a GGUF"), (b"<!doctype html>", "not a GGUF"), (b"GGUF\0\0\0\1", "damaged")]
)
def test_every_command_refuses_what_is_no_model(
    tiny_model: Path, damaged: Path, capfd: pytest.CaptureFixture[str], command: str, content: bytes, words: str
):
    damaged.write_bytes(content)
    assert run(command, damaged, tiny_model) == ExitCode.MODEL
    told = capfd.readouterr().err
    assert words in told
    assert "Traceback" not in told
    assert sorted(path.name for path in damaged.parent.iterdir()) == ["damaged.gguf", "text.txt"]


@pytest.mark.parametrize("command", ["inspect", "convert", "measure", "imatrix"])
def test_every_command_refuses_one_part_of_a_model(
    tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
):
    part = write_model(tmp_path / "m-00001-of-00002.gguf", values={"split.count": 2, "split.no": 0})
    assert run(command, part, tiny_model) == ExitCode.MODEL
    told = capfd.readouterr().err
    assert "is missing" in told


def test_a_model_in_parts_is_not_converted(tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    part = write_model(tmp_path / "m.gguf", n_part_tensors=8)
    assert run("convert", part, tiny_model) == ExitCode.MODEL
    assert "is one of several parts; join them" in capfd.readouterr().err


def test_a_whole_file_may_be_named_like_a_part(tmp_path: Path):
    assert len(read_local(write_model(tmp_path / "m-00001-of-00002.gguf"))) == 1


def run(command: str, path: Path, model: Path) -> ExitCode:
    text = path.with_name("text.txt")
    text.write_text("All happy families are alike. " * 90)
    new = path.with_name("new")
    arguments = {
        "inspect": [path],
        "convert": [path, new, "--scheme", "q8_0"],
        "measure": [model, path, "--text", text],
        "imatrix": [path, "-o", new, "--from", text],
    }
    return ExitCode(main(["quant", command, *map(str, arguments[command])]))


def test_an_unknown_scheme_is_refused_with_those_that_exist(tiny_model: Path):
    for scheme in ("q4", "w3a3", "", "Q4_K_M; rm"):
        with pytest.raises(InputError, match="Q4_K_M"):
            plan_conversion(Path(tiny_model), Request(scheme))


@pytest.fixture
def small_disk():
    """A limit on the size of files stands in for a full disk: it, too, is only met in the middle of a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda n_bytes: resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_is_an_error_and_leaves_no_half_file(tiny_model: Path, tmp_path: Path, small_disk):
    plan = plan_conversion(Path(tiny_model), Request("q8_0"))
    target = tmp_path / "new.gguf"
    small_disk(plan.n_bytes // 2)
    with pytest.raises(OutputError, match="full"):
        convert(plan, target, "0" * 64)
    assert list(tmp_path.iterdir()) == []


def test_a_result_that_cannot_be_written_is_an_error(tiny_model: Path, tmp_path: Path, capfd):
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 90)
    model, out = str(tiny_model), "/dev/full"
    code = main(["quant", "measure", model, model, "--text", str(text), "--context", "64", "--out", out])
    assert code == ExitCode.OUTPUT
    assert "No space left" in capfd.readouterr().err
