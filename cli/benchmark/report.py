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
_SAME = (
    "model",
    "sha256",
    "machine",
    "versions",
    "threads",
    "gpu_layers",
    "cache_type",
    "n_tokens",
    "n_runs",
    "n_prompt",
)
"""What two records must share for a ratio to be of the speed alone."""
PARTS = ("prefill", "decode", "context", "controls", "ring", "ring_prefill")


def numbers(record: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Every figure as (part, what, value)."""
    for name in ("load_seconds", "peak_bytes", "weights_bytes", "cache_bytes"):
        if name in record:
            yield "file", name, float(record[name])
    for part in PARTS:
        for row in record.get(part) or ():
            yield part, _what(row), float(row["tokens_per_second"])


def better(what: str) -> str:
    """Whether "more" or "less" of a figure is better: less seconds and bytes, more tokens a second."""
    return "less" if what.endswith(("_seconds", "_bytes")) else "more"


def ratios(record: dict[str, Any], old: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Each figure that both records have: its part, what it is, then, now, their ratio, and what is better."""
    before = {(part, what): value for part, what, value in numbers(old)}
    for part, what, now in numbers(record):
        if then := before.get((part, what)):
            yield {"part": part, "what": what, "then": then, "now": now, "ratio": now / then, "better": better(what)}


def differences(record: dict[str, Any], old: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is not the same in two records, then and now; None where one does not tell it."""
    pairs = {name: {"then": old.get(name), "now": record.get(name)} for name in _SAME}
    return {name: pair for name, pair in pairs.items() if pair["then"] != pair["now"]}


def _what(row: dict[str, Any]) -> str:
    if "armed" in row:
        return str(row["armed"])
    if "context_tokens" in row:
        return f"behind {row['context_tokens']} tokens"
    if "sequences" in row:
        return f"{row['sequences']} sequence{'s' * (row['sequences'] != 1)}"
    return f"{row['tokens']} tokens"


def as_markdown(record: dict[str, Any], old: dict[str, Any] | None = None) -> str:
    """The record as a page, with the ratios to an older one where it is given."""
    machine = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in record["machine"].items() if value)
    versions = ", ".join(f"{name} {value}" for name, value in record["versions"].items())
    words = {"peak_bytes": "{:.0f} MiB at most", "weights_bytes": "weights {:.0f}", "cache_bytes": "cache {:.0f}"}
    memory = ", ".join(text.format(record[name] / 2**20) for name, text in words.items() if name in record)
    lines = [
        f"# {record['model']}",
        "",
        f"SHA-256 {record['sha256']}; {versions}, Python {record['python']}; {machine}, {record['threads']} threads.",
        f"{record['n_tokens']} tokens, {record['n_runs']} runs. {record['method']}",
        "",
        f"Loaded in {record['load_seconds']:.2f} s; {memory}.",
    ]
    for part, title, ratio in (
        ("prefill", "Prefill", ""),
        ("decode", "Decode, all sequences together", "to the first"),
        ("context", "Decode of one sequence behind a longer context", "to the first"),
        ("controls", "One sequence with controls armed", "to the bare loop"),
        ("ring", "The ring, all sequences together", "to one machine"),
        ("ring_prefill", "Prefill of the ring", "to one machine"),
    ):
        if record.get(part):
            ratio = ratio if "ratio" in record[part][0] else ""  # a ring that no single machine can be held against
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
    for name, pair in differences(record, old).items():
        yield f"Not the same {name}: {_brief(pair['then'])} then, {_brief(pair['now'])} now."
        yield ""
    yield "| part | what | then | now | ratio | better |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in ratios(record, old):
        figures = f"{row['then']:.4g} | {row['now']:.4g} | {row['ratio']:.3f}"
        yield f"| {row['part']} | {row['what']} | {figures} | {row['better']} |"


def _brief(value: Any) -> str:
    if value is None:
        return "unknown"
    return value if isinstance(value, str) else json.dumps(value)


def as_json(record: dict[str, Any], old: dict[str, Any] | None = None) -> str:
    """The record as JSON, with the ratios to an older one where it is given."""
    if old is not None:
        compared = {"not_the_same": differences(record, old), "figures": list(ratios(record, old))}
        record = {**record, "ratios_to_older": compared}
    return json.dumps(record, indent=1) + "\n"


def as_csv(record: dict[str, Any], old: dict[str, Any] | None = None) -> str:
    """One figure a line: part, what, value, the ratio to the older record where there is one, and what is better."""
    found = {(row["part"], row["what"]): row["ratio"] for row in ratios(record, old)} if old is not None else {}
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["part", "what", "value", "ratio_to_older", "better"])
    for part, what, value in numbers(record):
        ratio = found.get((part, what))
        writer.writerow([part, what, f"{value:.6g}", "" if ratio is None else f"{ratio:.4f}", better(what)])
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
