"""A benchmark's record as Markdown and CSV, and against an older one."""

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...runtime.errors import InputError

SCHEMA = 1
"""Of the JSON; a change of meaning gets a new number."""
PARTS = ("prefill", "decode", "controls", "ring")


def numbers(record: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Every figure as (part, what, value); more is better but for those that end in `_seconds` or `_bytes`."""
    for name in ("load_seconds", "peak_bytes", "weights_bytes", "cache_bytes"):
        yield "file", name, float(record[name])
    for part in PARTS:
        for row in record.get(part) or ():
            yield part, _what(row), float(row["tokens_per_second"])


def _what(row: dict[str, Any]) -> str:
    if "armed" in row:
        return str(row["armed"])
    if "sequences" in row:
        return f"{row['sequences']} sequence{'s' * (row['sequences'] != 1)}"
    return f"{row['tokens']} tokens"


def as_markdown(record: dict[str, Any], old: dict[str, Any] | None = None) -> str:
    """The record as a page, with the ratios to an older one where it is given."""
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in record["machine"].items() if value)
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    lines = [
        f"# {record['model']}",
        "",
        f"SHA-256 {record['sha256']}; {versions}, Python {record['python']}; {machine}, {record['threads']} threads.",
        f"{record['n_tokens']} tokens, {record['n_runs']} runs. {record['method']}",
        "",
        f"Loaded in {record['load_seconds']:.2f} s; {record['peak_bytes'] / 2**20:.0f} MiB at most, "
        f"weights {record['weights_bytes'] / 2**20:.0f}, cache {record['cache_bytes'] / 2**20:.0f}.",
    ]
    for part, title, ratio in (
        ("prefill", "Prefill", ""),
        ("decode", "Decode, all sequences together", "to the first"),
        ("controls", "One sequence with controls armed", "to the bare loop"),
        ("ring", "The ring", "to one machine"),
    ):
        if record.get(part):
            lines += ["", f"## {title}", "", *_rows(record[part], ratio)]
    if old is not None:
        lines += ["", "## Against the older record", "", *_compared(record, old)]
    return "\n".join(lines) + "\n"


def _rows(rows: list[dict[str, Any]], ratio: str) -> Iterator[str]:
    yield f"| what | tokens a second |{f' ratio {ratio} |' if ratio else ''}"
    yield f"| --- | --- |{' --- |' if ratio else ''}"
    for row in rows:
        last = f" {row['ratio']:.3f} |" if ratio else ""
        yield f"| {_what(row)} | {row['tokens_per_second']:.1f} |{last}"


def _compared(record: dict[str, Any], old: dict[str, Any]) -> Iterator[str]:
    for name in ("model", "sha256", "machine", "versions", "threads", "n_tokens"):
        if record.get(name) != old.get(name):
            yield f"Not the same {name}: {_brief(old.get(name))} then, {_brief(record.get(name))} now."
            yield ""
    before = {(part, what): value for part, what, value in numbers(old)}
    yield "| part | what | then | now | ratio |"
    yield "| --- | --- | --- | --- | --- |"
    for part, what, value in numbers(record):
        there = before.get((part, what))
        if there:
            yield f"| {part} | {what} | {there:.4g} | {value:.4g} | {value / there:.3f} |"


def _brief(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def as_csv(record: dict[str, Any], old: dict[str, Any] | None = None) -> str:
    """One figure a line: part, what, value, and the ratio to the older record where there is one."""
    before = {(part, what): value for part, what, value in numbers(old)} if old is not None else {}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["part", "what", "value", "ratio_to_older"])
    for part, what, value in numbers(record):
        there = before.get((part, what))
        writer.writerow([part, what, f"{value:.6g}", f"{value / there:.4f}" if there else ""])
    return text.getvalue()


def read_record(path: Path) -> dict[str, Any]:
    """A record that `localreason bench` wrote as JSON. Raises InputError."""
    try:
        record = json.loads(path.read_text("utf-8"))
        if record["schema"] != SCHEMA:
            raise InputError(f"{path} has schema {record['schema']}, this version reads {SCHEMA}; measure anew")
        list(numbers(record))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give a JSON file of `localreason bench`") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is no record of `localreason bench`; give its JSON file") from error
    return record
