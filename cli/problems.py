"""Problems from an argument, a file or standard input; a bad row is reported and the others go on."""

import codecs
import csv
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from ..runtime.errors import InputError

SUFFIXES = (".jsonl", ".csv", ".txt")
LETTERS = "ABCDEFGHIJ"
"""What the `choices` of a problem are called, in their order."""
_TEXT_KEYS = ("problem", "question", "prompt")


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem; `answer` is the right one where it is known, `line` where it stands."""

    id: str
    text: str
    answer: str | None = None
    line: int = 1


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no problem, and why."""

    line: int
    reason: str


def is_file(argument: str) -> bool:
    """True where the argument means a file: it exists, or is named like one. Anything else is a question. Raises
    InputError for a folder."""
    if argument == "-" or argument.lower().endswith(SUFFIXES):
        return True
    if not argument:  # the path of the folder that one is in
        return False
    try:
        path = Path(argument)
        is_there, is_folder = path.exists(), path.is_dir()
    except (OSError, ValueError):  # too long for a name, or with a NUL: surely a question
        return False
    if is_folder:
        raise InputError(f"{argument} is a folder; name a file of problems, or write a question")
    return is_there  # a pipe, such as <(...), is a file too


def question(text: str) -> Problem:
    """The problem that a question on the command line is."""
    if not text.strip():
        raise InputError("the question is empty; write it in quotes")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError("the question is not valid UTF-8; write it in UTF-8 or give a file") from error
    return Problem("question", text)


def read(argument: str, remedy: str = "check its name") -> tuple[list[Problem], list[BadRow]]:
    """The problems of a file, or of standard input for `-`; `remedy` is told where there is no such file. Raises
    InputError where there is nothing to do."""
    name = "standard input" if argument == "-" else argument
    return parse(_bytes(argument, remedy), name, Path(argument).suffix.lower())


def parse(data: bytes, name: str, kind: str = ".jsonl") -> tuple[list[Problem], list[BadRow]]:
    """The problems in the content of a file of that suffix. Raises InputError where there is nothing to do."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # what PowerShell writes
        try:
            data = data.decode("utf-16").encode()
        except UnicodeError as error:
            raise InputError(f"{name} is broken UTF-16; save it as UTF-8") from error
    if not data.removeprefix(b"\xef\xbb\xbf").strip():
        raise InputError(f"{name} is empty; give one problem a line")
    if kind not in SUFFIXES:
        kind = ".jsonl" if data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{") else ".txt"
    problems: list[Problem] = []
    bad: list[BadRow] = []
    ids: dict[str, int] = {}
    for row in {".jsonl": _from_jsonl, ".csv": _from_csv, ".txt": _from_text}[kind](data):
        if isinstance(row, BadRow):
            bad.append(row)
        elif row.id in ids:
            bad.append(BadRow(row.line, f"the id {row.id!r} stands in line {ids[row.id]} already; give each its own"))
        else:
            ids[row.id] = row.line
            problems.append(row)
    if not problems and not bad:
        raise InputError(f"{name} holds no problems; give one a line")
    return problems, bad


def _bytes(argument: str, remedy: str) -> bytes:
    if argument == "-":
        if sys.stdin is None:
            raise InputError("standard input is closed; give a file")
        return sys.stdin.buffer.read()
    try:
        return Path(argument).read_bytes()
    except FileNotFoundError as error:
        raise InputError(f"there is no file {argument}; {remedy}") from error
    except OSError as error:
        raise InputError(f"{argument} cannot be read: {error.strerror}") from error


class _Number(str):
    """A number as it is written: 0.00001 does not become 1e-05, and no count of digits is too large."""


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no value of JSON; write null")


def _lines(data: bytes) -> Iterator[tuple[int, str] | BadRow]:
    """Lines that are not blank, with their numbers."""
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            yield BadRow(number, f"invalid UTF-8 at byte {error.start + 1}; save the file as UTF-8")
            continue
        if text:
            yield number, text


def _from_jsonl(data: bytes) -> Iterator[Problem | BadRow]:
    for row in _lines(data):
        if isinstance(row, BadRow):
            yield row
            continue
        number, text = row
        try:
            value = json.loads(text, parse_int=_Number, parse_float=_Number, parse_constant=_no_number)
        except json.JSONDecodeError as error:
            yield BadRow(number, f"malformed JSON at column {error.colno}: {error.msg}")
        except ValueError as error:
            yield BadRow(number, f"malformed JSON: {error}")
        except RecursionError:
            yield BadRow(number, "JSON nested too deeply; a problem is a flat object")
        else:
            yield _problem(value, number)


def _from_text(data: bytes) -> Iterator[Problem | BadRow]:
    for row in _lines(data):
        yield row if isinstance(row, BadRow) else _problem({"problem": row[1]}, row[0])


def _from_csv(data: bytes) -> Iterator[Problem | BadRow]:
    # Undecodable bytes become lone surrogates, so that only the rows that hold them are refused.
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
    lines = list(io.StringIO(text, newline=""))
    reader, n_before = csv.reader(lines, strict=True), 0
    header: list[str] | None = None
    while True:
        number = n_before + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if n_before + reader.line_num == number:
                yield BadRow(number, f"malformed CSV: {error}")
            else:  # what was read with it may be rows of their own
                yield BadRow(number, "malformed CSV: a quote that is not closed")
                reader, n_before = csv.reader(lines[number:], strict=True), number
            continue
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = [cell.strip().lower() for cell in cells]
            if not set(header) & set(_TEXT_KEYS):
                raise InputError(f"the CSV's first line names no column {_TEXT_KEYS[0]!r}; it has {', '.join(header)}")
        elif len(cells) != len(header):
            yield BadRow(number, f"{len(cells)} cells where the header has {len(header)}; quote cells that hold commas")
        else:
            yield _problem({key: cell for key, cell in zip(header, cells, strict=True) if cell.strip()}, number)


def _problem(value: Any, line: int) -> Problem | BadRow:
    """A problem from one row's object."""
    if not isinstance(value, dict):
        return BadRow(line, 'not an object; write {"problem": ...}')
    text = next((value[key] for key in _TEXT_KEYS if value.get(key) is not None), None)
    if text is None:
        return BadRow(line, "the key 'problem' is missing or null")
    if not isinstance(text, str) or isinstance(text, _Number) or not text.strip():
        return BadRow(line, f"the problem is {text!r}; give a text that is not empty")
    if "\0" in text:
        return BadRow(line, "the problem holds a NUL character; save the file as a text in UTF-8")
    choices = value.get("choices")
    if isinstance(choices, list) and choices:
        if len(choices) > len(LETTERS) or not all(isinstance(choice, str | bool) for choice in choices):
            return BadRow(line, f"the choices are no list of at most {len(LETTERS)} texts; correct them")
        text = "\n".join((text, "", *(f"{letter}. {c}" for letter, c in zip(LETTERS, choices, strict=False))))
    id_, answer = value.get("id"), value.get("answer")
    if not isinstance(id_, str | None) or (isinstance(id_, _Number) and not id_.lstrip("-").isdecimal()):
        return BadRow(line, f"the id is {id_!r}; give a text or a whole number")
    if not isinstance(answer, str | None):
        return BadRow(line, f"the answer is {answer!r}; give a text or a number")
    gold = None if answer is None else answer.rpartition("####")[2].strip() or None
    name = str(line) if id_ is None else str(id_)
    try:
        f"{text}{name}{gold}".encode()
    except UnicodeEncodeError:
        return BadRow(line, "invalid UTF-8; save the file as UTF-8")
    return Problem(name, text, gold, line)
