"""The models to choose from, the best for this machine first; also the screen of the first start."""

from typing import ClassVar

from textual.binding import Binding, BindingType

from ..starter import Suggestion
from .chooser import Choice, Chooser

_SIGNS = {"fits": "✓", "short": "~", "large": "✗"}
DEMO = "demo"


class Models(Chooser):
    """Gives the name of a model, or None. What is typed and is in no list is taken as a reference or a path."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("ctrl+d", "demo", "Demo model", priority=True)]

    def __init__(self, suggestions: list[Suggestion], current: str, is_first: bool = False) -> None:
        title = "Choose a model for this machine" if is_first else "Models"
        help = (
            "Enter takes it · Ctrl+D the demo model, which is here · Esc leaves · a path or OWNER/REPO:QUANT works too"
        )
        super().__init__(title, [_choice(one) for one in suggestions], current, help)

    def find(self, query: str) -> list[Choice]:
        found = super().find(query)
        text = query.strip()
        return found or ([Choice(text, text, "take this name, path or reference")] if text else [])

    def action_demo(self) -> None:
        self.dismiss(DEMO)


def _choice(one: Suggestion) -> Choice:
    offer = one.offer
    place = "is here" if offer.is_here else "to fetch"
    detail = f"{_SIGNS[one.verdict]} {offer.n_bytes / 1e9:.2f} GB · {place}"
    return Choice(offer.name, offer.name, detail, "\n".join(filter(None, (one.reason, offer.summary))))
