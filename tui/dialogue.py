"""The state of the chat without its screen: which conversation is open, what runs, what is stored when."""

import contextlib
from dataclasses import dataclass, replace

from ..runtime.controls import Parameters
from ..runtime.errors import LocalReasonError
from ..runtime.recipe import Recipe
from ..runtime.template import Message as Turn
from .conversation import Conversation, Message, State
from .delta import Ended, Failed
from .history import History, Summary
from .reply import Reply
from .stream import Streamer


@dataclass(slots=True)
class Run:
    """A reply in the making and the message that it becomes, which is in `conversation` wherever the reader is."""

    reply: Reply
    message: Message
    conversation: Conversation


class Dialogue:
    """Every change goes to the history at once, or with the next one. Nothing here is called by the decode thread."""

    def __init__(self, history: History, recipe: Recipe, preset: str) -> None:
        self.history = history
        self.recipe = recipe
        self.preset = preset
        self.controls: tuple[str, ...] = ()
        """What was set on top of the preset, each as on the command line."""
        self.streamer: Streamer | None = None
        self.model = ""
        self.conversation: Conversation | None = None
        self.run: Run | None = None
        self._unstored: list[Message] = []
        """Replies that ended and could not be stored yet."""

    def take(self, model: str, streamer: Streamer) -> None:
        """Go on with this model."""
        self.model, self.streamer = model, streamer
        streamer.is_watching_entropy = True
        if self.conversation is not None and self.conversation.model != model:
            self.conversation = replace(self.conversation, model=model)
            self.history.set_model(self.conversation.id, model)

    def control(self, preset: str, texts: tuple[str, ...], controls: tuple[Parameters, ...]) -> None:
        """Think like this from the next reply on."""
        self.preset, self.controls = preset, texts
        self.recipe = replace(self.recipe, controls=controls)

    @property
    def path(self) -> tuple[Message, ...]:
        """The messages in sight."""
        return self.conversation.path() if self.conversation is not None else ()

    @property
    def is_run_in_sight(self) -> bool:
        return (
            self.run is not None and self.conversation is not None and self.run.conversation.id == self.conversation.id
        )

    def turns(self, text: str = "", edited: Message | None = None) -> list[Turn]:
        """What the model is asked with this text at the end, or in the place of an edited message; without a text,
        the conversation as it stands."""
        conversation = self.conversation or Conversation(0, "", self.model)
        if not text:
            return conversation.turns()
        path = conversation.path()
        parent = self._parent(edited) if edited is not None else path[-1] if path else None
        return conversation.put(Message(0, parent.id if parent else None, "user", text)).turns()

    def turns_before(self, reply: Message) -> list[Turn]:
        """What the model is asked for another version of this reply."""
        assert self.conversation is not None
        return self.conversation.turns(self._parent(reply))

    def send(self, text: str) -> Run:
        """Store a message of the user at the end and start the reply. There is a model and nothing runs."""
        path = self.conversation.path() if self.conversation is not None else []
        return self._say(path[-1] if path else None, text)

    def edit(self, message: Message, text: str) -> Run:
        """Put another version beside a user's message and reply to it."""
        return self._say(self._parent(message), text)

    def regenerate(self, message: Message) -> Run:
        """Put another reply beside this one, with another seed."""
        assert self.conversation is not None
        asked = self._parent(message)
        assert asked is not None
        reply = self.history.add(self.conversation, asked, "assistant")
        return self._start(self.conversation, asked, reply, len(self.conversation.siblings(message)))

    def _say(self, parent: Message | None, text: str) -> Run:
        with self.history.at_once():  # what cannot be stored is put back, and would stand there twice
            conversation = self.conversation or self.history.create(self.model)
            asked = self.history.add(conversation, parent, "user", text)
            conversation = conversation.put(asked)
            reply = self.history.add(conversation, asked, "assistant")
        return self._start(conversation, asked, reply, 0)

    def _start(self, conversation: Conversation, asked: Message, message: Message, version: int) -> Run:
        assert self.streamer is not None
        assert self.run is None
        self.conversation = conversation.put(message)
        recipe = replace(self.recipe, seed=self.recipe.seed + version)
        reply = self.streamer.start(conversation.turns(asked), recipe, self.preset)
        self.run = Run(reply, message, self.conversation)
        return self.run

    def _parent(self, message: Message) -> Message | None:
        assert self.conversation is not None
        return None if message.parent is None else self.conversation.find(message.parent)

    def save(self) -> None:
        """Store what the running reply has so far, and what could not be stored when it ended."""
        with contextlib.suppress(LocalReasonError):  # it was told once
            self.store()
        if self.run is not None and (sample := self.run.reply.best) is not None:
            stats = self.run.reply.sum_up(self.model)
            self.history.save_partial(self.run.message.id, sample.answer, sample.thinking, list(sample.marks), stats)

    def finish(self, event: Ended | Failed | None) -> Message | None:
        """The reply as it ended, for `store`; None where the chat ends before it. Returns None if none was due."""
        run = self.run
        if run is None or (event is not None and event.reply is not run.reply):
            return None
        self.run = None
        stats = event.stats if isinstance(event, Ended) else run.reply.stats
        stats = stats or replace(run.reply.sum_up(self.model), stop="stopped")
        state: State = "done" if stats.stop == "end" else "stopped"
        sample = run.reply.winner or run.reply.best
        answer, thinking, marks = (sample.answer, sample.thinking, tuple(sample.marks)) if sample else ("", "", ())
        message = replace(
            run.message, content=answer, thinking=thinking, marks=marks, stats=stats, state=state
        )  # the list of marks still grows where a decode has not noticed that it is stopped
        if self.conversation is not None and self.conversation.id == run.conversation.id:
            self.conversation = self.conversation.put(message)
        self._unstored.append(message)
        return message

    def store(self) -> None:
        """Store the replies that have ended. Raises OutputError; then they are kept for the next time."""
        while self._unstored:
            one = self._unstored[0]
            self.history.finish(one.id, one.content, one.thinking, one.marks, one.stats, one.state)
            del self._unstored[0]

    def step_version(self, message: Message, step: int) -> bool:
        """Lead the path through the version before or after this one; False where there is none."""
        assert self.conversation is not None
        versions = self.conversation.siblings(message)
        at = next(i for i, other in enumerate(versions) if other.id == message.id) + step
        if not 0 <= at < len(versions):
            return False
        self.conversation = self.conversation.choose(versions[at])
        self.history.choose(versions[at])
        return True

    def open(self, id: int) -> None:
        """Read a conversation. Raises InputError."""
        self.conversation = self.history.load(id)

    def begin(self) -> None:
        """A new conversation, stored with its first message."""
        self.conversation = None

    def neighbour(self, step: int) -> Summary | None:
        """The conversation after (1) or before (-1) this one in the list, the latest first; None at its ends."""
        known = self.history.summaries(limit=1000)
        if self.conversation is None:
            return known[0] if known and step > 0 else None
        at = next((i for i, one in enumerate(known) if one.id == self.conversation.id), -1) + step
        return known[at] if 0 <= at < len(known) else None
