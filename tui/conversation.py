"""A conversation as a tree of messages: an edited or regenerated one stands beside the old one; a path is chosen."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ..runtime import template

State = Literal["partial", "done", "stopped"]
"""Of a message: still being written, ended by itself, or ended by somebody or something else."""
MarkKind = Literal["forced", "hint", "suppressed", "probe", "note"]

_N_TITLE = 60


@dataclass(frozen=True, slots=True)
class Mark:
    """A place of a reply where a control acted. `position` counts characters of the thinking (`phase` "think") or of
    the answer ("answer"); `text` is what was forced or hinted, in hidden characters too, or what a control says."""

    position: int
    phase: str
    kind: MarkKind
    text: str


@dataclass(frozen=True, slots=True)
class Stats:
    """How a reply came about. Tokens of the sample that won, but `n_sampled`, which is of all samples."""

    n_prompt: int = 0
    n_thinking: int = 0
    n_answer: int = 0
    n_forced: int = 0
    n_hint: int = 0
    n_probe: int = 0
    n_sampled: int = 0
    first_seconds: float = 0.0
    """From the request to the first token."""
    thinking_seconds: float = 0.0
    total_seconds: float = 0.0
    tokens_per_second: float = 0.0
    """Of all samples together, since the first token."""
    stop: str = ""
    """`end`, `length`, `context`, `stopped`, `error`, or `interrupted`: it was never ended."""
    model: str = ""
    preset: str = ""
    seed: int = 0
    problem: str = ""
    """What an `error` was, one sentence for the user."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `parent` is None for a first one; `created` is in seconds since 1970."""

    id: int
    parent: int | None
    role: str
    content: str
    thinking: str = ""
    state: State = "done"
    marks: tuple[Mark, ...] = ()
    stats: Stats | None = None
    created: float = 0.0


@dataclass(frozen=True, slots=True)
class Conversation:
    """A tree of messages, oldest first, and which child of each is the one that is read; `chosen` maps the id of a
    parent (None above the first ones) to the id of that child. Changes give a new conversation."""

    id: int
    title: str
    model: str
    messages: tuple[Message, ...] = ()
    chosen: Mapping[int | None, int] = field(default_factory=dict)
    created: float = 0.0

    def find(self, id: int) -> Message | None:
        """The message of that id."""
        return next((message for message in self.messages if message.id == id), None)

    def path(self) -> tuple[Message, ...]:
        """The chosen branch, from the first message to the last."""
        by_id = {message.id: message for message in self.messages}
        path: list[Message] = []
        while (id := self.chosen.get(path[-1].id if path else None)) in by_id:
            assert id is not None
            path.append(by_id[id])
        return tuple(path)

    def siblings(self, message: Message) -> tuple[Message, ...]:
        """The versions of a message, itself among them, oldest first."""
        return tuple(other for other in self.messages if other.parent == message.parent)

    def choose(self, message: Message) -> "Conversation":
        """The conversation with the path led through a message; below it the path is what it was."""
        chosen, at = dict(self.chosen), self.find(message.id)
        while at is not None:
            chosen[at.parent] = at.id
            at = None if at.parent is None else self.find(at.parent)
        return replace(self, chosen=chosen)

    def put(self, message: Message) -> "Conversation":
        """The conversation with a message added, chosen and titled by it if it has no title; or in the place of the
        one of the same id, the path as it was."""
        if self.find(message.id) is not None:
            return replace(self, messages=tuple(message if one.id == message.id else one for one in self.messages))
        title = self.title or (title_of(message.content) if message.role == "user" else "")
        return replace(self, title=title, messages=(*self.messages, message)).choose(message)

    def turns(self, until: Message | None = None) -> list[template.Message]:
        """The chosen branch, or that which leads to `until`, for the model, thinking left out.

        A reply without an answer is left out too, and the user's turns around it become one: templates want the roles
        to alternate.
        """
        path = self.path() if until is None else self.choose(until)._path_to(until)
        turns: list[template.Message] = []
        for message in path:
            if message.role == "assistant" and not message.content.strip():
                continue
            if turns and turns[-1].role == message.role:
                turns[-1] = template.Message(message.role, f"{turns[-1].content}\n\n{message.content}")
            else:
                turns.append(template.Message(message.role, message.content))
        return turns

    def _path_to(self, message: Message) -> tuple[Message, ...]:
        path = self.path()
        return path[: 1 + next(i for i, one in enumerate(path) if one.id == message.id)]


def title_of(content: str) -> str:
    """The title that a first message gives: its first line with text, cut at a word."""
    line = next((" ".join(line.split()) for line in content.splitlines() if line.strip()), "")
    if len(line) <= _N_TITLE:
        return line
    head = line[:_N_TITLE].rpartition(" ")[0] or line[: _N_TITLE - 1]
    return f"{head.rstrip(',.;: ')}…"
