"""Bad input: one sentence, the right exit code, and the other rows go on."""

import os
from pathlib import Path

import pytest

from localreason.cli.main import ExitCode, main
from localreason.cli.problems import Problem, is_file, read
from localreason.runtime.errors import InputError
from tests.cli.fake import wiring


def write(name: str, data: bytes) -> str:
    Path(name).write_bytes(data)
    return name


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"problem": "x"', "malformed JSON at column"),
        (b'{"id": "a"}', "'problem' is missing"),
        (b'["x"]', "not an object"),
        (b'{"problem": "\xff"}', "invalid UTF-8 at byte 14"),
        (b'{"problem": " "}', "not empty"),
        (b'{"problem": 5}', "not empty"),
        (b'{"problem": "x", "id": []}', "the id is []"),
        (b'{"problem": "x", "answer": {}}', "the answer is {}"),
        (b'{"problem": "x", "id": "1"}', "stands in line 1 already"),
        (b'{"problem": "\\ud800"}', "invalid UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"problem": "x", "answer": NaN}', "NaN is no value of JSON; write null"),
        (b'{"problem": "x", "id": 1.5}', "give a text or a whole number"),
    ],
)
def test_a_bad_row_is_named_by_line_and_the_others_go_on(line: bytes, reason: str):
    problems, bad = read(write("p.jsonl", b'{"problem": "one"}\n' + line + b'\n{"question": "three"}'))
    assert [problem.text for problem in problems] == ["one", "three"]
    assert bad[0].line == 2
    assert reason in bad[0].reason


def test_marks_line_ends_and_gold_tails_are_read():
    name = write(
        "p.jsonl", b'\xef\xbb\xbf{"problem": "a\\u00e9", "answer": "so 6 * 7\\n#### 42"}\r\n\r\n{"prompt": "b"}\r\n'
    )
    assert read(name) == ([Problem("1", "aé", "42", 1), Problem("3", "b", None, 3)], [])


@pytest.mark.parametrize("number", ["0.00001", "1e22", "-7", "9" * 5000])
def test_a_number_is_read_as_it_is_written(number: str):
    row = f'{{"problem": "x", "id": 12, "answer": {number}}}'.encode()
    assert read(write("p.jsonl", row))[0] == [Problem("12", "x", number, 1)]


def test_plain_text_is_one_problem_a_line():
    assert read(write("p.txt", b"one\n\ntwo"))[0] == [Problem("1", "one", None, 1), Problem("3", "two", None, 3)]


def test_csv_knows_quotes_and_refuses_rows_of_another_width():
    name = write("p.csv", b'id,problem,answer\r\na,"one, or\ntwo",3\r\nb,x\r\nc,\xff,1\r\nd,four,4\r\n')
    problems, bad = read(name)
    assert [(problem.id, problem.text, problem.answer) for problem in problems] == [
        ("a", "one, or\ntwo", "3"),
        ("d", "four", "4"),
    ]
    assert [row.line for row in bad] == [4, 5]


def test_a_quote_that_is_not_closed_costs_its_own_row_only():
    text = 'problem,answer\none,1\n"two,2\nthree,3\n"fo,ur",4\nfive,5\n"six,6\n'
    problems, bad = read(write("p.csv", text.encode()))
    assert [(row.id, row.text, row.answer) for row in problems] == [
        ("2", "one", "1"),
        ("4", "three", "3"),
        ("5", "fo,ur", "4"),
        ("6", "five", "5"),
    ]
    assert [row.line for row in bad] == [3, 7]
    assert "a quote that is not closed" in bad[0].reason


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_what_powershell_writes_is_read(encoding: str):
    data = "\ufeffproblem,answer\r\nWie groß?,3\r\n".encode(encoding)
    assert read(write("p.csv", data))[0] == [Problem("2", "Wie groß?", "3", 2)]
    with pytest.raises(InputError, match="broken UTF-16"):
        read(write("p.csv", data + b"x"))


def test_text_of_another_encoding_without_its_mark_is_refused():
    problems, bad = read(write("p.txt", "one\ntwo\n".encode("utf-16-le")))
    assert not problems
    assert "NUL character" in bad[0].reason


def test_a_csv_without_the_column_is_refused():
    with pytest.raises(InputError, match="names no column 'problem'"):
        read(write("p.csv", b"a,b\n1,2\n"))


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_empty_input_is_refused(data: bytes):
    with pytest.raises(InputError, match="is empty"):
        read(write("p.jsonl", data))


def test_what_is_a_file_and_what_a_question():
    write("notes", b"x")
    assert is_file("notes")
    assert is_file("missing.jsonl")
    assert is_file("-")
    assert not is_file("What is 1 + 1?")
    assert not is_file("x" * 100_000)
    assert not is_file("a\0b")
    os.mkfifo("pipe")  # as <(...) gives one
    assert is_file("pipe")
    Path("folder").mkdir()
    with pytest.raises(InputError, match="folder is a folder; name a file of problems"):
        is_file("folder")


def test_all_rows_bad_is_a_failure_of_the_input(model: str, capfd: pytest.CaptureFixture[str]):
    assert main(["solve", write("p.jsonl", b"{"), "--model", model], wiring()) == ExitCode.INPUT
    assert "p.jsonl line 1: malformed JSON" in capfd.readouterr().err


def test_some_rows_bad_is_told_by_the_exit_code(model: str):
    assert main(["solve", write("p.jsonl", b'{\n{"problem": "x"}'), "--model", model], wiring()) == ExitCode.SOME_FAILED


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["x", "-c", "bogus"], ExitCode.USAGE, "there is no control 'bogus'"),
        (["x", "-c", "budget:bogus=1"], ExitCode.USAGE, "no parameter 'bogus'"),
        (["x", "-c", "budget:max=-1"], ExitCode.USAGE, "max is -1"),
        (["x", "-c", "budget:ignore=1", "-c", "hint"], ExitCode.USAGE, "insist"),
        (["x", "--preset", "bogus"], ExitCode.USAGE, "no preset 'bogus'"),
        (["x", "--temperature", "-1"], ExitCode.USAGE, "--temperature"),
        (["x", "--temperature", "nan"], ExitCode.USAGE, "--temperature"),
        (["x", "--cache-type", "q9"], ExitCode.USAGE, "choose one of"),
        (["x", "--bogus"], ExitCode.USAGE, "--bogus"),
        (["x", "--seed", "x"], ExitCode.USAGE, "--seed"),
        (["x", "--format", "bogus"], ExitCode.INPUT, "no thinking format 'bogus'"),
        (["x", "-c", "search:n=64,rule=majority", "-o", "x.jsonl", "--parallel", "64"], ExitCode.OK, ""),
        (["x", "--model", "missing.gguf"], ExitCode.MODEL, "there is no model 'missing.gguf'"),
        (["missing.jsonl"], ExitCode.INPUT, "there is no file missing.jsonl"),
        (["too long"], ExitCode.INPUT, "9000 tokens"),
        ([""], ExitCode.INPUT, "empty"),
        (["a bug"], ExitCode.FAILED, "LOCALREASON_DEBUG=1"),
    ],
)
def test_a_mistake_is_one_sentence_and_a_code(
    args: list[str], code: ExitCode, words: str, model: str, capfd: pytest.CaptureFixture[str]
):
    if "--model" not in args:
        args = [*args, "--model", model]
    assert main(["solve", *args], wiring()) == code
    err = capfd.readouterr().err
    assert words in err
    assert "Traceback" not in err


def test_a_bug_shows_its_traceback_on_request(
    model: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("LOCALREASON_DEBUG", "1")
    assert main(["solve", "a bug", "--model", model], wiring()) == ExitCode.FAILED
    assert "Traceback" in capfd.readouterr().err
