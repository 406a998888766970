"""The pictures of a comparison."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...runtime.errors import OutputError
from ..plotting import KINDS, encode, figure
from .compare import Run
from .statistics import at_budgets, pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIZE_INCHES = (8.6, 4.4)
_N_BINS = 24
_LINES = ("-", "--", ":", "-.")
_MARKERS = "osD^"
_ID = re.compile(r"""(\bid="|href="#|url\(#)""")
"""What an id stands behind in a tag of SVG."""


def _accuracy(axes: "Axes", runs: Sequence[Run]) -> None:
    for i, run in enumerate(runs):
        x, y = run.summary.sampled, run.summary.accuracy
        axes.errorbar(
            x.mean,
            100 * y.mean,
            xerr=[[max(0.0, x.mean - x.low)], [max(0.0, x.high - x.mean)]],
            yerr=[[max(0.0, 100 * (y.mean - y.low))], [max(0.0, 100 * (y.high - y.mean))]],
            fmt=_MARKERS[i // 10 % len(_MARKERS)],
            capsize=3,
            color=f"C{i % 10}",
            label=run.name,
        )
        axes.annotate(
            run.name,
            (x.mean, 100 * y.mean),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize="small",
            color=f"C{i % 10}",
        )
    front = [runs[i].summary for i in pareto([(run.summary.sampled.mean, run.summary.accuracy.mean) for run in runs])]
    axes.plot(
        [found.sampled.mean for found in front],
        [100 * found.accuracy.mean for found in front],
        color="0.6",
        linestyle="--",
        marker="o",
        markersize=12,
        fillstyle="none",
        zorder=0,
        label="Pareto front",
    )
    axes.set_xlabel("sampled tokens a problem, all samples")
    axes.set_ylabel("accuracy, %")


def _lengths(axes: "Axes", runs: Sequence[Run]) -> None:
    lengths = [[row.tokens["thinking"] for row in run.rows if row.error is None] for run in runs]
    most = max(max(each, default=0) for each in lengths)
    bins = [most * i / _N_BINS for i in range(_N_BINS + 1)] if most else [0.0, 1.0]
    for i, (run, each) in enumerate(zip(runs, lengths, strict=True)):
        axes.hist(each, bins=bins, histtype="step", linewidth=1.6, label=run.name, **_line(i))
    axes.set_xlabel("thinking tokens of the chosen sample")
    axes.set_ylabel("replies")


def _budgets(axes: "Axes", runs: Sequence[Run]) -> None:
    for i, run in enumerate(runs):
        budgets, share = at_budgets(run.rows)
        axes.plot(budgets, 100 * share, label=run.name, **_line(i))
    axes.set_xlabel("sampled tokens that a problem may take")
    axes.set_ylabel("right within them, %")


def _line(i: int) -> dict[str, Any]:
    """Ten colours, then the same with another line."""
    return {"color": f"C{i % 10}", "linestyle": _LINES[i // 10 % len(_LINES)]}


PLOTS: dict[str, tuple[str, Callable[["Axes", Sequence[Run]], None]]] = {
    "accuracy": ("Accuracy over tokens, 95 % intervals", _accuracy),
    "lengths": ("Length of thinking", _lengths),
    "budget": ("Accuracy over budget", _budgets),
}
"""Name of the file and title of each plot."""


def draw(name: str, runs: Sequence[Run], kind: str) -> bytes:
    """One of `PLOTS` as the content of a "png" or "svg" file. Raises InputError where matplotlib is missing."""
    title, paint = PLOTS[name]
    with figure(name, _SIZE_INCHES, "give --no-plots") as painted:
        axes = painted.add_subplot()
        paint(axes, runs)
        axes.set_title(title)
        axes.grid(alpha=0.25)
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))  # over no interval
        return encode(painted, kind)


def inline_svg(name: str, runs: Sequence[Run]) -> str:
    """A plot as an element of an HTML page: no prologue, no metadata, nothing that is fetched, ids of its own."""
    text = draw(name, runs, "svg").decode("utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r"<[^>]*>", lambda tag: _ID.sub(rf"\1{name}-", tag.group()), text)


def write_plots(folder: Path, runs: Sequence[Run]) -> list[Path]:
    """Every plot as PNG and SVG. Raises OutputError."""
    paths = []
    for name in PLOTS:
        for kind in KINDS:
            path = folder / f"{name}.{kind}"
            data = draw(name, runs, kind)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            except OSError as error:
                raise OutputError(f"{path} cannot be written: {error.strerror}; give another --out") from error
            paths.append(path)
    return paths
