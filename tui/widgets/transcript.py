"""The turns of the conversation, from top to bottom, following the end while it is in sight."""

from textual.containers import VerticalScroll
from textual.widgets import Static

from ..conversation import Conversation
from .question import Question
from .reply import ReplyTurn
from .turn import Turn

_WELCOME = """\
What shall we think about?

Shift+Tab goes to the messages: edit, ask again, copy, look into the thinking.
F2 another model · F3 how it thinks · F4 earlier conversations · F1 all keys"""


class Transcript(VerticalScroll, can_focus=False):
    """Shows one conversation."""

    def on_mount(self) -> None:
        self.anchor()

    async def show(self, conversation: Conversation | None, running: int | None, n_samples: int) -> None:
        """All turns of the chosen branch; `running` is the id of the message in the making, of so many samples."""
        turns: list[Turn | Static] = []
        for message in conversation.path() if conversation is not None else ():
            assert conversation is not None
            versions = conversation.siblings(message)
            version = (1 + next(i for i, one in enumerate(versions) if one.id == message.id), len(versions))
            if message.role == "user":
                turns.append(Question(message, version))
            else:
                is_live = message.id == running
                turns.append(ReplyTurn(message, version, n_samples if is_live else 1, is_live))
        if not turns:
            turns.append(Static(_WELCOME, id="welcome", markup=False))
        with self.app.batch_update():
            await self.remove_children()
            await self.mount_all(turns)
        self.anchor()

    @property
    def turns(self) -> list[Turn]:
        return list(self.query(Turn))

    @property
    def last_reply(self) -> ReplyTurn | None:
        return next((turn for turn in reversed(self.turns) if isinstance(turn, ReplyTurn)), None)
