"""The file behind the history: its tables and their versions, how it is opened safely, and SQLite's errors as ours."""

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from ..runtime.errors import InputError, LocalReasonError, OutputError

_APPLICATION_ID = 0x4C52_4348
""""LRCH": tells our file from any other program's."""
_BUSY_SECONDS = 5.0
_MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE conversations (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            title TEXT NOT NULL,
            model TEXT NOT NULL,
            created REAL NOT NULL,
            updated REAL NOT NULL
        )""",
        """CREATE TABLE messages (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
            parent INTEGER REFERENCES messages (id) ON DELETE CASCADE,
            role TEXT NOT NULL,
            content TEXT NOT NULL DEFAULT '',
            thinking TEXT NOT NULL DEFAULT '',
            state TEXT NOT NULL,
            marks TEXT NOT NULL DEFAULT '[]',
            stats TEXT,
            created REAL NOT NULL,
            is_chosen INTEGER NOT NULL DEFAULT 0,
            owner TEXT NOT NULL
        )""",
        "CREATE INDEX messages_of ON messages (conversation, parent)",
        "CREATE INDEX children_of ON messages (parent)",
        # Three letters in a row rather than words: languages without spaces can be searched too.
        "CREATE VIRTUAL TABLE titles "
        "USING fts5(title, content='conversations', content_rowid='id', tokenize='trigram')",
        "CREATE VIRTUAL TABLE texts USING fts5(content, content='messages', content_rowid='id', tokenize='trigram')",
        """CREATE TRIGGER title_in AFTER INSERT ON conversations BEGIN
            INSERT INTO titles (rowid, title) VALUES (new.id, new.title);
        END""",
        """CREATE TRIGGER title_changed AFTER UPDATE OF title ON conversations BEGIN
            INSERT INTO titles (titles, rowid, title) VALUES ('delete', old.id, old.title);
            INSERT INTO titles (rowid, title) VALUES (new.id, new.title);
        END""",
        """CREATE TRIGGER title_out AFTER DELETE ON conversations BEGIN
            INSERT INTO titles (titles, rowid, title) VALUES ('delete', old.id, old.title);
        END""",
        # What is still being written changes twice a second, so it is indexed once it has ended.
        """CREATE TRIGGER text_in AFTER INSERT ON messages WHEN new.state != 'partial' BEGIN
            INSERT INTO texts (rowid, content) VALUES (new.id, new.content);
        END""",
        """CREATE TRIGGER text_leaves BEFORE UPDATE OF content, state ON messages WHEN old.state != 'partial' BEGIN
            INSERT INTO texts (texts, rowid, content) VALUES ('delete', old.id, old.content);
        END""",
        """CREATE TRIGGER text_comes AFTER UPDATE OF content, state ON messages WHEN new.state != 'partial' BEGIN
            INSERT INTO texts (rowid, content) VALUES (new.id, new.content);
        END""",
        """CREATE TRIGGER text_out AFTER DELETE ON messages WHEN old.state != 'partial' BEGIN
            INSERT INTO texts (texts, rowid, content) VALUES ('delete', old.id, old.content);
        END""",
    ),
    (),  # the stats of a message may name a problem, which programs of the first version could not read
)
"""What leads from one version of the file to the next; `user_version` says how many were applied."""


def open_database(path: Path) -> sqlite3.Connection:
    """The file, made where there is none and brought up to date. Raises InputError for a file that is broken, newer or
    another program's, which is left as it is, and OutputError where it cannot be written."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))  # nobody else's to read
    except OSError as error:
        raise OutputError(f"the history {path} cannot be made: {error.strerror}; give another --history") from error
    with errors_as_ours(path):
        database = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
        try:
            _check(path, database)
            with contextlib.suppress(sqlite3.OperationalError):  # another chat switches it at this moment
                database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute("PRAGMA foreign_keys = ON")
            _migrate(path, database)
        except BaseException:
            database.close()
            raise
    return database


@contextlib.contextmanager
def transaction(path: Path, database: sqlite3.Connection) -> Iterator[None]:
    """All of what is written within, or nothing; one within another is a part of it."""
    if database.in_transaction:
        yield
        return
    with errors_as_ours(path):
        database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            database.execute("ROLLBACK")
            raise
        database.execute("COMMIT")


@contextlib.contextmanager
def errors_as_ours(path: Path) -> Iterator[None]:
    """SQLite's errors as InputError and OutputError; contradictions within the data pass as they are."""
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
        raise
    except sqlite3.DatabaseError as error:
        raise _as_ours(path, error) from error


def _as_ours(path: Path, error: sqlite3.DatabaseError) -> LocalReasonError:
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # extended codes begin with the primary one
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return OutputError(
            f"the history {path} was in use by another program for {_BUSY_SECONDS:.0f} s; close that and try again"
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return InputError(
            f"the history {path} is damaged or no history ({error}); it was left as it is: move it elsewhere and a new "
            f"one is made, or repair it with sqlite3's .recover"
        )
    if "fts5" in str(error) or "trigram" in str(error):
        return InputError(
            f"SQLite {sqlite3.sqlite_version} of this Python has no full-text search for the history {path}; "
            f"take a Python whose SQLite is 3.34 or newer"
        )
    return OutputError(f"the history {path} cannot be used: {error}; look at its rights and the free space, or move it")


def _check(path: Path, database: sqlite3.Connection) -> None:
    """Look before anything is written."""
    database.execute("BEGIN")  # one state for all three, for another chat may be making the file at this moment
    is_empty = database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] == 0
    version, application = (database.execute(f"PRAGMA {n}").fetchone()[0] for n in ("user_version", "application_id"))
    database.execute("ROLLBACK")
    if application != _APPLICATION_ID and not (is_empty and version == 0 and application == 0):
        raise InputError(f"{path} is a database of another program; it was left as it is: give another path")
    if version > len(_MIGRATIONS):
        raise InputError(
            f"the history {path} is of version {version} and this localreason knows up to {len(_MIGRATIONS)}; it was "
            f"left as it is: update localreason, or give another path"
        )


def _migrate(path: Path, database: sqlite3.Connection) -> None:
    if _version(database) == len(_MIGRATIONS):
        return
    with transaction(path, database):
        for statements in _MIGRATIONS[_version(database) :]:  # another chat may have been quicker
            for statement in statements:
                database.execute(statement)
        database.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        database.execute(f"PRAGMA user_version = {len(_MIGRATIONS)}")


def _version(database: sqlite3.Connection) -> int:
    return database.execute("PRAGMA user_version").fetchone()[0]
