"""The conversations on disk: one SQLite file, written as replies stream, searched in full text."""

import json
import os
import sqlite3
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from ..runtime.errors import InputError
from .conversation import Conversation, Mark, Message, State, Stats, title_of
from .schema import errors_as_ours, open_database, transaction

_N_EXCERPT = 80
_N_TERMS = 16
_N_TRIGRAM = 3
"""Characters below which the index knows nothing of a word; shorter ones are looked for in the texts themselves."""
_HAS_WORD = """
    c.id IN (SELECT rowid FROM titles WHERE titles MATCH :{0}
             UNION SELECT conversation FROM messages WHERE id IN (SELECT rowid FROM texts WHERE texts MATCH :{0}))
"""
_HAS_LETTERS = r"""
    (c.title LIKE :{0} ESCAPE '\'
     OR EXISTS (SELECT 1 FROM messages m WHERE m.conversation = c.id AND m.content LIKE :{0} ESCAPE '\'))
"""
_SUMMARIES = """
    SELECT c.id, c.title, c.model, c.updated, (SELECT count(*) FROM messages m WHERE m.conversation = c.id)
    FROM conversations c WHERE {} ORDER BY c.updated DESC, c.id DESC LIMIT :n
"""


@dataclass(frozen=True, slots=True)
class Summary:
    """A conversation in a list. `excerpt` is of its latest text, or of where the first word was found; `updated` is in
    seconds since 1970."""

    id: int
    title: str
    model: str
    excerpt: str
    n_messages: int
    updated: float


class History:
    """A file of conversations; a context manager, for one thread. Calls are short. Several chats may have one file
    open. Raises InputError where a file cannot be read, OutputError where it cannot be written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = open_database(path)
        self._owner = _owner(os.getpid())
        self._recover()

    def __enter__(self) -> "History":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; closing twice does nothing."""
        self._database.close()

    # --- conversations ------------------------------------------------------------------------------------------

    def summaries(self, query: str = "", limit: int = 100) -> list[Summary]:
        """Conversations, the latest first; with a query those that have each of its words, or parts of words, in
        their title or in a message."""
        words = query.replace("\0", " ").encode("utf-8", "replace").decode().split()[:_N_TERMS]
        tests, values = ["1"], dict[str, Any](n=limit)
        for i, word in enumerate(words):
            is_indexed = len(word) >= _N_TRIGRAM
            tests.append((_HAS_WORD if is_indexed else _HAS_LETTERS).format(f"w{i}"))
            values[f"w{i}"] = _quoted(word) if is_indexed else _pattern(word)
        rows = self._run(_SUMMARIES.format(" AND ".join(tests)), values).fetchall()
        return [
            Summary(id, title, model, self._excerpt(id, words[0] if words else ""), n_messages, updated)
            for id, title, model, updated, n_messages in rows
        ]

    def at_once(self) -> AbstractContextManager[None]:
        """All of what is stored within, or nothing."""
        return transaction(self.path, self._database)

    def create(self, model: str, title: str = "") -> Conversation:
        """A new conversation; without a title its first message gives one."""
        now = time.time()
        title, model = _clean(title), _clean(model)
        cursor = self._run(
            "INSERT INTO conversations (title, model, created, updated) VALUES (?, ?, ?, ?)",
            (title, model, now, now),
        )
        assert cursor.lastrowid is not None
        return Conversation(cursor.lastrowid, title, model, created=now)

    def load(self, id: int) -> Conversation:
        """A conversation with all its messages. Raises InputError where there is none of that id."""
        row = self._run("SELECT title, model, created FROM conversations WHERE id = ?", (id,)).fetchone()
        if row is None:
            raise InputError(f"there is no conversation {id} in {self.path}; choose one of the list")
        title, model, created = row
        messages, chosen = [], dict[int | None, int]()
        for values in self._run(
            "SELECT id, parent, role, content, thinking, state, marks, stats, created, is_chosen "
            "FROM messages WHERE conversation = ? ORDER BY id",
            (id,),
        ):
            messages.append(_message(values))
            if values[9]:
                chosen[values[1]] = values[0]
        return Conversation(id, title, model, tuple(messages), chosen, created)

    def rename(self, id: int, title: str) -> None:
        """Give a conversation another title."""
        self._run("UPDATE conversations SET title = ? WHERE id = ?", (_clean(title), id))

    def set_model(self, id: int, model: str) -> None:
        """Note the model that a conversation goes on with."""
        self._run("UPDATE conversations SET model = ? WHERE id = ?", (_clean(model), id))

    def delete(self, id: int) -> None:
        """Remove a conversation with all its messages."""
        self._run("DELETE FROM conversations WHERE id = ?", (id,))

    # --- messages -----------------------------------------------------------------------------------------------

    def add(self, conversation: Conversation, parent: Message | None, role: str, content: str = "") -> Message:
        """Store a new message and choose it; an assistant's is "partial" until `finish`. The conversation in hand
        gets it by `put`. Raises InputError where the conversation was deleted meanwhile."""
        content, state = _clean(content), "partial" if role == "assistant" else "done"
        now = time.time()
        with transaction(self.path, self._database):
            title = title_of(content) if role == "user" else ""
            self._run(
                "UPDATE conversations SET updated = ?, title = CASE title WHEN '' THEN ? ELSE title END WHERE id = ?",
                (now, title, conversation.id),
            )
            self._unchoose(conversation.id, parent.id if parent else None)
            values = (conversation.id, parent.id if parent else None, role, content, state, self._owner, now)
            try:
                cursor = self._run(
                    "INSERT INTO messages (conversation, parent, role, content, state, owner, created, is_chosen) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, 1)",
                    values,
                )
            except sqlite3.IntegrityError as error:
                raise InputError(
                    f"the conversation {conversation.title!r} was deleted in another chat; start a new one"
                ) from error
        assert cursor.lastrowid is not None
        return Message(cursor.lastrowid, parent.id if parent else None, role, content, "", state, created=now)

    def choose(self, message: Message) -> None:
        """Remember that the path leads through this message and not through its siblings."""
        with transaction(self.path, self._database):
            row = self._run("SELECT conversation FROM messages WHERE id = ?", (message.id,)).fetchone()
            if row is not None:
                self._unchoose(row[0], message.parent)
                self._run("UPDATE messages SET is_chosen = 1 WHERE id = ?", (message.id,))

    def save_partial(
        self, message_id: int, content: str, thinking: str, marks: Iterable[Mark], stats: Stats | None = None
    ) -> None:
        """Store what a reply has so far; meant to be called about twice a second."""
        self._run(
            "UPDATE messages SET content = ?, thinking = ?, marks = ?, stats = ? WHERE id = ?",
            (_clean(content), _clean(thinking), _dump(marks), _dump_stats(stats), message_id),
        )

    def finish(
        self,
        message_id: int,
        content: str,
        thinking: str,
        marks: Iterable[Mark],
        stats: Stats | None,
        state: State = "done",
    ) -> None:
        """Store a reply that has ended; it can be found from now on."""
        with transaction(self.path, self._database):
            self._run(
                "UPDATE messages SET content = ?, thinking = ?, marks = ?, stats = ?, state = ? WHERE id = ?",
                (_clean(content), _clean(thinking), _dump(marks), _dump_stats(stats), state, message_id),
            )
            self._run(
                "UPDATE conversations SET updated = ? WHERE id = (SELECT conversation FROM messages WHERE id = ?)",
                (time.time(), message_id),
            )

    # --- within -------------------------------------------------------------------------------------------------

    def _run(self, statement: str, values: Any = ()) -> sqlite3.Cursor:
        with errors_as_ours(self.path):
            return self._database.execute(statement, values)

    def _unchoose(self, conversation: int, parent: int | None) -> None:
        self._run(
            "UPDATE messages SET is_chosen = 0 WHERE conversation = ? AND parent IS ? AND is_chosen",
            (conversation, parent),
        )

    def _excerpt(self, id: int, word: str) -> str:
        """A line of the newest text with the word, or of the newest text."""
        found = self._run(
            "SELECT content FROM messages WHERE conversation = ? AND content LIKE ? ESCAPE '\\' "
            "ORDER BY id DESC LIMIT 1",
            (id, _pattern(word)),
        ).fetchone()
        text = " ".join(found[0].split()) if found else ""
        at = max(0, text.casefold().find(word.casefold()) - _N_EXCERPT // 4)
        return ("…" if at else "") + text[at : at + _N_EXCERPT] + ("…" if len(text) > at + _N_EXCERPT else "")

    def _recover(self) -> None:
        """What a chat left half written that is gone by now is stopped; a chat that still runs goes on writing."""
        owners = [row[0] for row in self._run("SELECT DISTINCT owner FROM messages WHERE state = 'partial'")]
        for owner in owners:
            if not _is_alive(owner):
                self._run("UPDATE messages SET state = 'stopped' WHERE state = 'partial' AND owner = ?", (owner,))


def _message(values: tuple[Any, ...]) -> Message:
    id, parent, role, content, thinking, state, marks, stats, created, _ = values
    return Message(
        id,
        parent,
        role,
        content,
        thinking,
        state,
        tuple(Mark(**mark) for mark in json.loads(marks)),
        Stats(**json.loads(stats)) if stats else None,
        created,
    )


def _dump(marks: Iterable[Mark]) -> str:
    return json.dumps([{**asdict(mark), "text": _clean(mark.text)} for mark in marks])


def _dump_stats(stats: Stats | None) -> str | None:
    return json.dumps(asdict(stats)) if stats else None


def _clean(text: str) -> str:
    """The text as UTF-8 can hold it: halves of surrogate pairs become "?"."""
    return text.encode("utf-8", "replace").decode()


def _quoted(word: str) -> str:
    """A word as a string of FTS5's query language, in which nothing else has a meaning."""
    return '"' + word.replace('"', '""') + '"'


def _pattern(word: str) -> str:
    for special in "\\%_":
        word = word.replace(special, "\\" + special)
    return f"%{word}%"


def _owner(pid: int) -> str:
    """A process by its number and start: numbers are given again."""
    return f"{pid}:{psutil.Process(pid).create_time():.0f}"


def _is_alive(owner: str) -> bool:
    with suppress(ValueError, psutil.Error, OverflowError):
        return _owner(int(owner.partition(":")[0])) == owner
    return False
