"""The machines of a ring in one strip: layers, link time, load, lost and recovered."""

from dataclasses import dataclass
from typing import Literal

from textual.content import Content
from textual.widgets import Static

State = Literal["there", "lost", "recovered"]
_SIGNS: dict[str, tuple[str, str]] = {
    "there": ("●", "$success"),
    "lost": ("✗ lost", "$error"),
    "recovered": ("◐ back", "$warning"),
}


@dataclass(frozen=True, slots=True)
class NodeState:
    """One machine as the strip shows it. `layers` are its windows, [first, end) each; `link_seconds` is one way to it,
    None for this machine; `load` is the share of time in which it computes, None while unknown."""

    name: str
    layers: tuple[tuple[int, int], ...] = ()
    link_seconds: float | None = None
    load: float | None = None
    state: State = "there"


class NodeStrip(Static):
    """Hidden while there is no ring."""

    nodes: tuple[NodeState, ...] = ()
    is_placing = False

    def show(self, nodes: tuple[NodeState, ...], is_placing: bool = False) -> None:
        """Show these machines, in the order of their windows, and whether their layers are placed anew."""
        if (nodes, is_placing) != (self.nodes, self.is_placing):
            self.nodes, self.is_placing = nodes, is_placing
            news = [Content.styled("placing the layers anew", "$warning")] if is_placing else []
            self.update(Content("   ").join([*news, *map(describe, nodes)]))
        self.display = bool(nodes)

    def on_mount(self) -> None:
        self.display = bool(self.nodes)


def describe(node: NodeState) -> Content:
    """`● attic 0-13 1.2 ms 80 %`."""
    sign, colour = _SIGNS[node.state]
    layers = " ".join(f"{first}-{end - 1}" for first, end in node.layers)
    link = f"{1000 * node.link_seconds:.1f} ms" if node.link_seconds is not None else ""
    load = f"{round(100 * node.load)} %" if node.load is not None else ""
    details = " ".join(filter(None, (layers, link, load)))
    return Content.assemble((sign, colour), f" {node.name} ", (details, "$foreground 55%"))
