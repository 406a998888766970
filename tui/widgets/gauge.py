"""A bar of one line: how much of a limit is used."""

from textual.content import Content
from textual.reactive import reactive
from textual.widget import Widget

_FULL, _EMPTY = "━", "─"


class Gauge(Widget):
    """`label ━━━━──── 41 %`; from the share `warn_at` on with an exclamation mark, for want of colour."""

    value: reactive[int] = reactive(0)
    limit: reactive[int] = reactive(0)

    def __init__(self, label: str, warn_at: float = 2.0, is_counting: bool = False, id: str | None = None) -> None:
        super().__init__(id=id)
        self.label = label
        self.warn_at = warn_at
        self.is_counting = is_counting

    @property
    def share(self) -> float:
        return self.value / self.limit if self.limit else 0.0

    @property
    def is_warning(self) -> bool:
        return self.share >= self.warn_at

    def watch_value(self) -> None:
        self.set_class(self.is_warning, "warning")

    def watch_limit(self) -> None:
        self.set_class(self.is_warning, "warning")

    def render(self) -> Content:
        number = (
            f"{_short(self.value)}/{_short(self.limit)}"
            if self.is_counting
            else f"{min(999, round(100 * self.share))} %"
        )
        if not self.limit:
            number = str(self.value) if self.is_counting else "–"
        if self.is_warning:
            number = f"{number} !"
        width = max(3, self.size.width - len(self.label) - len(number) - 2)
        n = min(width, round(width * self.share))
        return Content.assemble(
            (f"{self.label} ", "$foreground 55%"),
            (_FULL * n, "$warning" if self.is_warning else "$primary"),
            (_EMPTY * (width - n), "$foreground 20%"),
            (f" {number}", "$warning" if self.is_warning else "$foreground 55%"),
        )


def _short(n: int) -> str:
    """A count of at most four digits: 9999, then 10k."""
    return str(n) if n < 10_000 else f"{n / 1000:.0f}k"
