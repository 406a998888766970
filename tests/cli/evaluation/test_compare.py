"""`localreason eval compare`: what is refused, and a report in which all text is text."""

import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from localreason.cli.main import ExitCode, main
from localreason.cli.row import to_line
from localreason.quant.traces import read_traces
from tests.cli.evaluation.samples import MODEL, row, write

EVIL = "<script>alert(1)</script> & \"'$\\frac{"


def compare(*args: str) -> int:
    return main(["eval", "compare", *args])


def sample(home: Path, name: str = "safe", n_right: int = 3, **changes: object) -> str:
    return write(home / f"{name}.jsonl", [row(f"p{i}", i < n_right, 10 + i) for i in range(6)], **changes)


def test_two_configurations_stand_side_by_side(home: Path, capsys: pytest.CaptureFixture[str]):
    assert compare(sample(home), sample(home, "fast", 5)) == ExitCode.OK
    out = capsys.readouterr().out
    assert re.search(r"accuracy +50\.0% \[.*\] +83\.3% \[", out)
    assert re.search(r"difference +\+33\.3 \[", out)
    assert compare(sample(home), "--markdown") == ExitCode.OK
    assert capsys.readouterr().out.startswith("| configuration | n | accuracy |")
    assert compare(sample(home), "again=safe.jsonl", "--json") == ExitCode.OK
    found = json.loads(capsys.readouterr().out)
    assert (found["baseline"], [run["name"] for run in found["runs"]]) == ("safe", ["safe", "again"])
    assert found["runs"][1]["to_baseline"]["p"] == 1


def test_different_models_are_refused_unless_asked_for(home: Path, capsys: pytest.CaptureFixture[str]):
    large = {"name": "large", "sha256": "f" * 64}
    files = sample(home), write(home / "other.jsonl", [row("p0", model=large)], model=large)
    assert compare(*files) == ExitCode.INPUT
    assert "safe and other are of different model files, tiny and large; give" in capsys.readouterr().err
    assert compare(*files, "--across-models") == ExitCode.OK
    assert "note: safe and other are of different model files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"problem_hash": "2" * 64}, "different texts for problem 'p0'"),
        ({"gold": "8"}, "different right answers for problem 'p0', '7' and '8'"),
        ({"id": "q"}, "no problem was run under both"),
    ],
)
def test_results_of_other_problems_are_refused(
    home: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], reason: str
):
    other = write(home / "other.jsonl", [row(**{"id": "p0", **changes})])
    assert compare(sample(home), other) == ExitCode.INPUT
    assert reason in capsys.readouterr().err


def test_rows_that_tell_no_right_answer_are_compared(home: Path):
    assert compare(sample(home), write(home / "other.jsonl", [row("p0", gold=None)])) == ExitCode.OK


@pytest.mark.parametrize("args", [(), ("--across-models",)])
def test_rows_of_two_models_in_one_file_are_refused(
    home: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...]
):
    large = {"name": "large", "sha256": "f" * 64}
    assert compare(write(home / "mixed.jsonl", [row("p0"), row("p1", model=large)]), *args) == ExitCode.INPUT
    assert "mixed.jsonl holds rows of tiny and large; a file" in capsys.readouterr().err


@pytest.mark.parametrize("path", ["./safe.jsonl", ".//safe.jsonl", "safe.jsonl"])
def test_a_name_holds_however_its_file_is_written(home: Path, capsys: pytest.CaptureFixture[str], path: str):
    sample(home)
    assert compare(f"mine={path}", "--markdown") == ExitCode.OK
    assert "| mine | 6 |" in capsys.readouterr().out


def test_other_seeds_and_versions_are_noted(home: Path, capsys: pytest.CaptureFixture[str]):
    other = write(home / "other.jsonl", [row("p0", seed=1), row("p1", None, error="too long")], versions={"x": "1"})
    assert compare(sample(home), other) == ExitCode.OK
    out = capsys.readouterr().out
    assert "other: other seeds than safe" in out
    assert "other: run with other versions" in out
    assert "other: 1 rows could not be run" in out
    assert "other: compared with safe on the 1 problems that both ran" in out


@pytest.mark.parametrize(
    ("args", "reason"),
    [
        (("none.jsonl",), "there is no results file none.jsonl"),
        (("safe.jsonl", "safe.jsonl"), "two results are named 'safe'"),
        (("notes.txt",), "notes.txt line 1 is not a result of ours"),
        (("empty.jsonl",), "holds no rows yet"),
        (("safe.jsonl", "exact.jsonl"), "was graded by math and exact by exact"),
        ((".",), "cannot be read"),
    ],
)
def test_mistakes_are_sentences(home: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], reason: str):
    sample(home)
    sample(home, "exact", grader="exact")
    write(home / "empty.jsonl", [])
    (home / "notes.txt").write_text("my notes\n")
    assert compare(*args) == ExitCode.INPUT
    err = capsys.readouterr().err
    assert reason in err
    assert "bug" not in err


class Page(HTMLParser):
    """The tags of a page, and every address in it."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]


def test_the_report_needs_nothing_else_and_shows_text_as_text(home: Path):
    rows = [row("p0", True), row("p1", False, answer=EVIL, problem=EVIL, gold=EVIL)]
    first = write(home / "safe.jsonl", rows, model={**MODEL, "name": EVIL}, task={"name": EVIL})
    second = write(home / "b.jsonl", [row("p0", True), row("p1", True, problem=EVIL, gold=EVIL)])
    assert compare(f"{EVIL.replace('/', ' ')}={first}", f"$x$={second}", "-o", "report") == ExitCode.OK
    text = Path("report/report.html").read_text()
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert {"svg", "table", "h1"} <= page.tags
    assert len(set(page.ids)) == len(page.ids)
    assert {address.removeprefix("#") for address in page.addresses} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(page.ids)
    assert not re.search(r"url\((?!#)", text)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    names = {path.name for path in Path("report").iterdir()}
    plots = {f"{name}.{kind}" for name in ("accuracy", "lengths", "budget") for kind in ("png", "svg")}
    assert names == plots | {"report.html", "report.md", "report.json"}
    assert Path("report/accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert "$x$" in Path("report/accuracy.svg").read_text()


def test_a_name_is_one_printable_line_wherever_it_is_shown(home: Path, capsys: pytest.CaptureFixture[str]):
    name = "a\x01\x1b[31m\n<script>\ufffe|思考"
    first = sample(home, configuration=name, model={**MODEL, "name": "<b>\n\nx"})
    large = {"name": "large", "sha256": "f" * 64}
    other = write(home / "other.jsonl", [row("p0", model=large)], model=large)
    assert compare(first, other, "-o", "report", "--across-models") == ExitCode.OK
    assert re.search(r"^configuration +a <script> \|思考 +other$", capsys.readouterr().out, re.MULTILINE)
    lines = Path("report/report.md").read_text().splitlines()
    assert lines[2].startswith("| a &lt;script&gt; \\|思考 | 6 |")
    assert not any("<" in line for line in lines)
    assert "a <script> |思考" in ET.parse("report/accuracy.svg").getroot().itertext()


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": "abc"},
        {"tokens": {}},
        {"tokens": {**row().tokens, "thinking": None}},
        {"tokens": {**row().tokens, "thinking": 10**400}},
        {"counters": None},
        {"counters": {"search": {"sampled_tokens": "many"}}},
        {"correct": "no"},
        {"wall_seconds": float("nan")},
        {"wall_seconds": 1e308},
        {"recipe": {"x": float("inf")}},
        {"model": {"name": "x"}},
        {"answer": "\ud800"},
        {"repeat": True},
        {"trace": [[0, "token", "x", "think", "guessed"]]},
        {"trace": [[0, "token"]]},
    ],
)
def test_a_row_that_is_none_of_ours_is_refused_with_its_line(
    home: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object]
):
    path = sample(home)
    with Path(path).open("a") as file:
        file.write(json.dumps({**json.loads(to_line(row("p1"))), **changes}) + "\n")
    assert compare(path, "--json") == ExitCode.INPUT
    assert f"{path} line 8 is not a result of ours" in capsys.readouterr().err


@pytest.mark.parametrize(
    "header", [[], {}, {"model": {}, "recipe": {}}, {"model": MODEL, "recipe": {}, "task": "sums"}]
)
def test_a_header_that_is_none_of_ours_is_refused(home: Path, capsys: pytest.CaptureFixture[str], header: object):
    (home / "r.jsonl").write_text(json.dumps({"schema": 1, "header": header}) + "\n" + to_line(row()))
    assert compare("r.jsonl") == ExitCode.INPUT
    assert "r.jsonl line 1 is not a result of ours" in capsys.readouterr().err


@pytest.mark.parametrize(("n", "is_told"), [(30, True), (239, True), (240, False)])
def test_few_rows_are_told_with_what_they_cannot_tell(
    home: Path, capsys: pytest.CaptureFixture[str], n: int, is_told: bool
):
    write(home / "r.jsonl", [row(f"p{i}") for i in range(n)])
    assert compare("r.jsonl") == ExitCode.OK
    out = capsys.readouterr().out
    assert ("the standard error of an accuracy" in out) == is_told
    assert n != 30 or "with 30 rows the standard error of an accuracy near 50 % is 9 points" in out


def test_rows_of_before_lack_what_came_later(home: Path, capsys: pytest.CaptureFixture[str]):
    later = ("problem", "gold", "repeat", "is_unclosed", "wall_seconds", "peak_bytes", "trace")
    old = {name: value for name, value in json.loads(to_line(row())).items() if name not in later}
    (home / "r.jsonl").write_text(json.dumps(old) + "\n")
    assert compare("r.jsonl", "--markdown") == ExitCode.OK
    head, _, cells = ([cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()[:3])
    told = dict(zip(head, cells, strict=True))
    assert [told[name] for name in ("s each", "tokens/s", "peak MiB")] == ["", "", ""], "no row tells them"


def test_without_plots_matplotlib_is_not_needed(home: Path):
    assert compare(sample(home), "-o", "report", "--no-plots") == ExitCode.OK
    assert "<svg" not in Path("report/report.html").read_text()


def test_a_report_that_cannot_be_written_is_an_output_error(home: Path):
    assert compare(sample(home), "-o", "safe.jsonl/report", "--no-plots") == ExitCode.OUTPUT


def test_replies_of_an_evaluation_are_traces_to_measure_files_on(home: Path):
    [trace] = read_traces(Path(write(home / "safe.jsonl", [row()])).read_text(), "safe.jsonl")
    assert (trace.problem, trace.thinking, trace.text) == ("the problem p0", "so", "7")


def test_twelve_configurations_look_different_from_each_other(home: Path):
    assert compare(*(sample(home, f"c{i}", i % 7) for i in range(12)), "-o", "report") == ExitCode.OK
    curves = re.findall(
        r'<path d="[^"]*" clip-path="[^"]*" style="fill: none; (?:stroke-dasharray: ([\d.,]+); stroke-dashoffset: 0; )?'
        r"stroke: (#\w+)",
        Path("report/budget.svg").read_text(),
    )
    colours = [curve for curve in curves if curve[1] != "#b0b0b0"]
    assert len(colours) >= 12
    assert len(set(colours)) == 12
