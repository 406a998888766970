"""A benchmark's record as a picture: speed over length, sequences and context, and what each control leaves of it."""

from typing import TYPE_CHECKING, Any

from ..plotting import encode, figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_PANEL_INCHES = (4.2, 3.2)
_CURVES = (
    ("prefill", "tokens", "Prefill", "tokens of the prompt"),
    ("decode", "sequences", "Decode, all sequences together", "sequences at once"),
    ("context", "context_tokens", "Decode of one sequence", "tokens behind which it decodes"),
    ("ring", "sequences", "The ring and one machine", "sequences at once"),
)


def as_picture(record: dict[str, Any], kind: str) -> bytes:
    """The content of a "png" or "svg" file. Raises InputError where matplotlib is missing."""
    curves = [curve for curve in _CURVES if record.get(curve[0])]
    n = len(curves) + ("controls" in record)
    with figure("bench", (_PANEL_INCHES[0] * n, _PANEL_INCHES[1]), "leave the picture out of --out") as painted:
        panels = painted.subplots(1, n, squeeze=False)[0]
        for axes, (part, x, title, label) in zip(panels, curves, strict=False):
            _curve(axes, record[part], x)
            axes.set_title(title, fontsize="medium")
            axes.set_xlabel(label)
            axes.set_ylabel("tokens a second")
        if "controls" in record:
            _controls(panels[-1], record["controls"])
        painted.suptitle(f"{record['model']}, {record['threads']} threads")
        return encode(painted, kind)


def _curve(axes: "Axes", rows: list[dict[str, Any]], x: str) -> None:
    places = [row[x] for row in rows]
    axes.plot(places, [row["tokens_per_second"] for row in rows], marker="o", label="the ring")
    if "whole_tokens_per_second" in rows[0]:
        axes.plot(places, [row["whole_tokens_per_second"] for row in rows], marker="s", label="one machine")
        axes.legend(fontsize="small")
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, list(map(str, places)))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)


def _controls(axes: "Axes", rows: list[dict[str, Any]]) -> None:
    """Medians as bars, the runs as dots: on a shared machine they may lie far apart."""
    names = [row["armed"] for row in rows]
    axes.barh(names, [row["ratio"] for row in rows], color="0.8")
    for name, row in zip(names, rows, strict=True):
        axes.plot(row["ratio_per_run"], [name] * len(row["ratio_per_run"]), "k.", markersize=4)
    axes.invert_yaxis()
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set_title("One sequence with controls armed", fontsize="medium")
    axes.set_xlabel("speed, to the bare loop")
