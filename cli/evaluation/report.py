"""The comparison as one HTML page that needs nothing else. All text of models and files is escaped."""

import html
import json
from collections.abc import Sequence

from .compare import COLUMNS, Run, table
from .plots import PLOTS, inline_svg

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:75rem;padding:0 1rem;color:#1c1c1c;background:#fff}
table{border-collapse:collapse;font-size:13px;margin:1rem 0}
th,td{border-bottom:1px solid #ddd;padding:.3rem .55rem;text-align:left;vertical-align:top}
td{font-variant-numeric:tabular-nums}
.wide{overflow-x:auto}
svg{max-width:100%;height:auto}
pre{white-space:pre-wrap;background:#f6f6f6;padding:.6rem;font-size:12px}
.right{color:#14701f}.wrong{color:#a31515}
"""
_LEGEND = (
    "Intervals are of 95 %: Wilson's for the accuracy of problems that were run once, else by a bootstrap over "
    "problems. The difference is to the first configuration, in points, on the same problems; p is of McNemar's exact "
    "test, with several repeats of a sign test over problems. A difference without width means that all problems went "
    "alike, not that nothing is left to chance. Of several samples of a problem, thinking, cut and unclosed are of the "
    "chosen one; tokens that were sampled, injected or probed are of all."
)
_MOST_TEXT = 300
_MOST_PROBLEMS = 200


def page(runs: Sequence[Run], notes: Sequence[str], has_plots: bool = True) -> str:
    """The whole page. Raises InputError where plots are wanted and matplotlib is missing."""
    task = runs[0].header.get("task") or {}
    title = f"{task.get('name', 'results')}: {', '.join(run.name for run in runs)}"
    parts = [f"<h1>{_text(title)}</h1>", _about(runs)]
    parts += [f"<p>{_text(note)}.</p>" for note in notes]
    parts.append(_table(COLUMNS, table(runs)))
    parts.append(f"<p>{_LEGEND}</p>")
    if has_plots:
        parts += [f"<figure>{inline_svg(name, runs)}</figure>" for name in PLOTS]
    parts.append(_disagreements(runs))
    for run in runs:
        recipe = json.dumps(run.header["recipe"], indent=1, ensure_ascii=False)
        parts.append(f"<details><summary>Recipe of {_text(run.name)}</summary><pre>{_text(recipe)}</pre></details>")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{_text(title)}</title><style>{_STYLE}</style>"
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _about(runs: Sequence[Run]) -> str:
    """Model, task and versions."""
    lines = []
    for label, key in (("Model", "model"), ("Task", "task"), ("Graded by", "grader"), ("Versions", "versions")):
        found = {json.dumps(run.header[key], sort_keys=True): run.header[key] for run in runs if key in run.header}
        for value in found.values():
            shown = value if isinstance(value, str) else ", ".join(f"{name} {item}" for name, item in value.items())
            lines.append(f"<li>{label}: {_text(shown)}</li>")
    return f"<ul>{''.join(lines)}</ul>"


def _disagreements(runs: Sequence[Run]) -> str:
    """The problems that some configurations got right and others wrong, with what they answered."""
    found: dict[tuple[str, int], dict[str, tuple[str, bool]]] = {}
    texts: dict[tuple[str, int], tuple[str, str]] = {}
    for run in runs:
        for row in run.rows:
            if row.correct is not None:
                found.setdefault(row.key, {})[run.name] = (row.answer or "no answer", row.correct)
                texts[row.key] = (row.problem, row.gold or "")
    uneven = [key for key, answers in found.items() if len({right for _, right in answers.values()}) > 1]
    if not uneven:
        return "<p>All configurations got the same problems right.</p>"
    columns = ["id", "problem", "gold", *(run.name for run in runs)]
    lines = []
    for key in uneven[:_MOST_PROBLEMS]:
        cells = [f"{key[0]}{f' #{key[1]}' if key[1] else ''}", *texts[key]]
        marked = []
        for run in runs:
            answer, right = found[key].get(run.name, ("", None))
            kind = "" if right is None else " class=right" if right else " class=wrong"
            marked.append(f"<td{kind}>{_text(answer[:_MOST_TEXT])}</td>")
        lines.append(f"<tr>{''.join(f'<td>{_text(cell[:_MOST_TEXT])}</td>' for cell in cells)}{''.join(marked)}</tr>")
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    n_left = len(uneven) - len(lines)
    more = f"<p>{n_left} more are not shown.</p>" if n_left else ""
    return f"<h2>Where they disagree</h2><div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>{more}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(column)}</th>" for column in columns)
    lines = ["".join(f"<td>{_text(cell)}</td>" for cell in row) for row in rows]
    return f"<div class=wide><table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table></div>"


def _text(value: object) -> str:
    return html.escape(str(value))
