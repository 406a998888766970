"""`localreason bench` on a tiny model: the figures that are there, the files, and an older record beside them."""

import csv
import json
import platform
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from localreason.cli.build import Wiring
from localreason.cli.main import ExitCode, main
from localreason.runtime import llama
from localreason.runtime.errors import OutOfMemory
from localreason.runtime.llama import EngineOptions
from localreason.runtime.model import Model

SMALL = ["--tokens", "4", "--runs", "2", "--lengths", "8,24", "--batches", "1,2", "--threads", "1"]


def test_every_part_is_measured_and_written(tiny_model: Path, home: Path, capsys: pytest.CaptureFixture[str]):
    files = ["-o", "b.json", "-o", "b.md", "-o", "b.csv", "-o", "b.svg", "-o", "b.png"]
    assert main(["bench", "-m", str(tiny_model), *SMALL, *files]) == ExitCode.OK
    record = json.loads(Path("b.json").read_text())
    assert [row["tokens"] for row in record["prefill"]] == [8, 24]
    assert [row["sequences"] for row in record["decode"]] == [1, 2]
    assert record["controls"][0] == {**record["controls"][0], "armed": "bare loop", "ratio": 1.0}
    assert {"budget", "hint", "suppress", "search"} <= {row["armed"] for row in record["controls"]}
    assert [row["context_tokens"] for row in record["context"]] == [8, 24]
    assert record["context"][0]["ratio"] == 1
    assert record["load_seconds"] > 0
    assert record["peak_bytes"] > record["weights_bytes"] > 0
    assert record["method"]
    text = Path("b.json").read_text()
    for private in (platform.node(), str(tiny_model.parent), str(home)):
        assert not private or private not in text
    rows = list(csv.reader(Path("b.csv").read_text().splitlines()))
    assert rows[0] == ["part", "what", "value", "ratio_to_older", "better"]
    assert {row[1]: row[4] for row in rows}["load_seconds"] == "less"
    assert (record["n_prompt"], record["cache_type"]) == (8, "f16")
    assert ["decode", "2 sequences"] in [row[:2] for row in rows]
    assert Path("b.md").read_text() == capsys.readouterr().out
    drawn = ElementTree.fromstring(Path("b.svg").read_bytes())
    texts = [text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"Prefill", "Decode of one sequence", "suppress"} <= set(texts)
    assert Path("b.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_written_costs_neither_the_measurement_nor_the_others(
    tiny_model: Path, home: Path, capsys: pytest.CaptureFixture[str]
):
    Path("full.json").symlink_to("/dev/full")
    files = ["-o", "full.json", "-o", "b.md"]
    assert main(["bench", "-m", str(tiny_model), *SMALL, *files]) == ExitCode.OUTPUT
    said = capsys.readouterr()
    assert "full.json cannot be written: No space left" in said.err
    assert Path("b.md").read_text() == said.out != ""


def test_an_older_record_gives_ratios(tiny_model: Path, home: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "-m", str(tiny_model), *SMALL, "-o", "old.json"]) == ExitCode.OK
    old = json.loads(Path("old.json").read_text())
    old["machine"] = {"cpu": "abacus"}
    old |= {"cache_type": "q8_0", "n_runs": 9, "n_prompt": 99}
    del old["gpu_layers"]
    Path("old.json").write_text(json.dumps(old))
    capsys.readouterr()
    assert main(["bench", "-m", str(tiny_model), *SMALL, "--compare", "old.json"]) == ExitCode.OK
    out = capsys.readouterr().out
    assert 'Not the same machine: {"cpu": "abacus"} then' in out
    assert "Not the same cache_type: q8_0 then, f16 now." in out
    assert "Not the same n_runs: 9 then, 2 now." in out
    assert "Not the same n_prompt: 99 then, 8 now." in out
    assert "Not the same gpu_layers: unknown then, " in out
    assert re.search(r"^\| file \| weights_bytes \|.* 1\.000 \| less \|$", out, re.MULTILINE)
    assert re.search(r"^\| decode \| 2 sequences \|.*\| more \|$", out, re.MULTILINE)
    assert main(["bench", "-m", str(tiny_model), *SMALL, "--compare", "old.json", "--json", "-o", "new.json"]) == 0
    new = json.loads(capsys.readouterr().out)
    assert new == json.loads(Path("new.json").read_text())
    assert set(new["ratios_to_older"]["not_the_same"]) == {"machine", "gpu_layers", "cache_type", "n_runs", "n_prompt"}
    figures = {(row["part"], row["what"]): row for row in new["ratios_to_older"]["figures"]}
    assert figures["file", "weights_bytes"]["ratio"] == 1
    assert figures["prefill", "8 tokens"]["better"] == "more"


def test_a_ring_is_measured_against_this_machine(tiny_model: Path, home: Path, capsys: pytest.CaptureFixture[str]):
    wired = Wiring(open_model=lambda path, options, config: Model.open(path, options))
    assert main(["bench", "-m", str(tiny_model), *SMALL, "--cluster", "--json"], wired) == ExitCode.OK
    record = json.loads(capsys.readouterr().out)
    assert [row["sequences"] for row in record["ring"]] == [1, 2]
    assert [row["tokens"] for row in record["ring_prefill"]] == [8, 24]
    assert all(row["ratio"] > 0 for part in ("ring", "ring_prefill") for row in record[part])


def test_a_ring_is_measured_alone_where_this_machine_cannot_hold_the_model(
    tiny_model: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    def load(path: Path, options: EngineOptions):
        raise OutOfMemory("the model takes 90 GiB and 4 are free")

    monkeypatch.setattr(llama, "load", load)
    wired = Wiring(open_model=lambda path, options, config: Model.open(path, options))
    command = ["bench", "-m", str(tiny_model), *SMALL]
    assert main(command, wired) == ExitCode.FAILED
    assert "takes 90 GiB" in capsys.readouterr().err
    files = ["-o", "b.json", "-o", "b.md", "-o", "b.csv", "-o", "b.svg"]
    assert main([*command, "--cluster", *files], wired) == ExitCode.OK
    assert "4 are free; the ring is measured alone" in capsys.readouterr().err
    record = json.loads(Path("b.json").read_text())
    assert [row["sequences"] for row in record["ring"]] == [1, 2]
    assert record.keys().isdisjoint({"decode", "prefill", "weights_bytes"})
    assert re.search(r"## The ring.*\n\n\| what \| tokens a second \|\n", Path("b.md").read_text())
    capsys.readouterr()
    assert main([*command, "--cluster", "--compare", "b.json"], wired) == ExitCode.OK
    assert "| ring | 1 sequence |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "code", "reason"),
    [
        (("--lengths", "9,x"), ExitCode.USAGE, "give whole numbers"),
        (("--batches", "2,1"), ExitCode.USAGE, "give ascending numbers from 1 to 64"),
        (("--lengths", "100000"), ExitCode.INPUT, "give smaller --lengths"),
        (("-o", "b.txt"), ExitCode.OUTPUT, "b.txt cannot be written"),
        (("-o", "no/b.json"), ExitCode.OUTPUT, "no/b.json cannot be written"),
        (("--compare", "none.json"), ExitCode.INPUT, "none.json cannot be read"),
        (("--compare", "notes.json"), ExitCode.INPUT, "is no record of `localreason bench`"),
    ],
)
def test_mistakes_are_sentences(
    tiny_model: Path,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    args: tuple[str, ...],
    code: ExitCode,
    reason: str,
):
    (home / "notes.json").write_text("[1]")
    assert main(["bench", "-m", str(tiny_model), *SMALL, *args]) == code
    err = capsys.readouterr().err
    assert reason in err
    assert "bug" not in err
