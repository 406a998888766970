"""What a question and a reply have in common: they can be selected, and know their message and its versions."""

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.containers import Vertical

from ..conversation import Message


class Turn(Vertical, can_focus=True):
    """A turn of the conversation. Its keys are actions of the screen, which has the conversation."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "do('walk(-1)')", "Earlier", show=False),
        Binding("down,j", "do('walk(1)')", "Later", show=False),
        Binding("left,h", "do('version(-1)')", "Version before", key_display="←", show=False),
        Binding("right,l", "do('version(1)')", "Version", key_display="← →"),
        Binding("e", "do('edit')", "Edit"),
        Binding("r", "do('regenerate')", "Again"),
        Binding("c", "do('copy_message')", "Copy"),
        Binding("y", "do('copy_block')", "Code"),
        Binding("space", "do('fold')", "Fold"),
        Binding("m", "do('mark(1)')", "Marks"),
        Binding("M", "do('mark(-1)')", "Mark before", show=False),
        Binding("pageup", "do('scroll(-1)')", "Scroll up", show=False),
        Binding("pagedown", "do('scroll(1)')", "Scroll down", show=False),
        Binding("escape", "do('write')", "Write", key_display="esc"),
        Binding("i,enter", "do('write')", "Write", show=False),
        # Bound once more so that the footer leaves them out here: 80 columns do not hold them all.
        Binding("f2", "do('models')", show=False, priority=True),
        Binding("f3", "do('presets')", show=False, priority=True),
        Binding("f4", "do('conversations')", show=False, priority=True),
    ]

    def __init__(self, message: Message, version: tuple[int, int]) -> None:
        super().__init__()
        self.message = message
        self.version = version
        """Which one this is, from 1, and how many there are."""
        self.next_block = 0
        """Which code block is copied next."""

    @property
    def version_text(self) -> str:
        at, n = self.version
        return f"  ‹ {at}/{n} ›" if n > 1 else ""

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        # Asked of this turn's own screen, also while a dialog lies over it.
        return self.screen.check_action(str(parameters[0]).partition("(")[0], ()) if action == "do" else True

    async def action_do(self, action: str) -> None:
        """An action of the screen with this turn."""
        await self.screen.run_action(action)
