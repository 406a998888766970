"""What is kept of conversations, and that nothing which was shown is lost."""

import sqlite3
import stat
import subprocess
import sys
import threading

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localreason.runtime.errors import InputError, OutputError
from localreason.tui.conversation import Mark, Stats
from localreason.tui.history import History

MARKS = (Mark(2, "think", "forced", "Wait"), Mark(5, "answer", "hint", "short"))
STATS = Stats(n_thinking=3, tokens_per_second=12.5, stop="end", model="tiny", preset="safe", seed=4)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "data" / "history.db"


@pytest.fixture
def history(path):
    with History(path) as history:
        yield history


def ask(history, text="How far is the moon?", conversation=None, parent=None):
    """A question and a reply that is still being written: the conversation and both messages."""
    conversation = conversation or history.create("tiny")
    question = history.add(conversation, parent, "user", text)
    conversation = conversation.put(question)
    reply = history.add(conversation, question, "assistant")
    return conversation.put(reply), question, reply


def test_what_is_stored_is_read_again(history, path):
    conversation, question, reply = ask(history)
    assert reply.state == "partial"
    history.finish(reply.id, "384400 km", "far\ud800", MARKS, STATS)
    with History(path) as other:
        loaded = other.load(conversation.id)
    assert loaded.title == "How far is the moon?" == conversation.title
    assert loaded.model == "tiny"
    assert history.create("m\udc80").model == "m?"
    history.set_model(conversation.id, "n\udc80")
    assert history.load(conversation.id).model == "n?"
    assert loaded.path()[0] == question
    assert loaded.path()[1].content == "384400 km"
    assert loaded.path()[1].thinking == "far?"
    assert loaded.path()[1].marks == MARKS
    assert loaded.path()[1].stats == STATS
    assert loaded.path()[1].state == "done"


def test_the_chosen_branch_is_remembered(history):
    conversation, question, first = ask(history)
    second = history.add(conversation, question, "assistant")
    assert history.load(conversation.id).path()[-1].id == second.id
    history.choose(first)
    assert history.load(conversation.id).path()[-1].id == first.id
    edited = history.add(conversation, None, "user", "How far is Mars?")
    loaded = history.load(conversation.id)
    assert [message.id for message in loaded.path()] == [edited.id]
    assert [message.id for message in loaded.choose(loaded.find(question.id)).path()] == [question.id, first.id]
    history.choose(question)
    assert [message.id for message in history.load(conversation.id).path()] == [question.id, first.id]


def test_a_title_is_given_by_the_first_message_only_and_can_be_changed(history):
    conversation, _, reply = ask(history)
    history.add(conversation, reply, "user", "And the sun?")
    assert history.load(conversation.id).title == "How far is the moon?"
    history.rename(conversation.id, "Distances")
    history.set_model(conversation.id, "other")
    [summary] = history.summaries("distan")
    assert (summary.title, summary.model, summary.n_messages) == ("Distances", "other", 3)
    assert not history.summaries("moon?x")


def test_search_finds_every_script_titles_contents_and_short_words(history):
    one, _, reply = ask(history, "Über Flüsse: 月の距離は?")
    history.finish(reply.id, "It is 100% sure_thing, \\alpha", "", (), None)
    two, _, _ = ask(history, "Something else")
    for query in ("flüss", "FLÜSSE", "距離", "月の距離", "100%", "sure_", "\\alp", "is sure", "thing 距離", '"', ""):
        found = [summary.id for summary in history.summaries(query)]
        assert (one.id in found) == (query != '"'), query
        assert (two.id in found) == (not query), query
    history.rename(one.id, "Rivers")
    assert [s.id for s in history.summaries("rivers")] == [one.id]
    [summary] = history.summaries("sure_")
    assert "sure_thing" in summary.excerpt


def test_a_reply_is_found_once_it_has_ended_and_not_after_it_was_deleted(history, path):
    conversation, _, reply = ask(history)
    history.save_partial(reply.id, "perihelion", "", ())
    assert not history.summaries("perihelion")
    history.finish(reply.id, "aphelion", "", (), None, "stopped")
    assert not history.summaries("perihelion")
    assert history.summaries("aphelion")
    history.delete(conversation.id)
    assert not history.summaries("aphelion")
    assert not history.summaries()
    with sqlite3.connect(path) as database:
        for table in ("texts", "titles"):
            database.execute(f"INSERT INTO {table} ({table}, rank) VALUES ('integrity-check', 1)")
        assert database.execute("SELECT count(*) FROM messages").fetchone() == (0,)
    database.close()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(query=st.text(st.characters() | st.sampled_from('"*():^-+~\\%_ \0\ud800'), max_size=30))
def test_no_query_is_too_strange(history, query):
    history.summaries(query)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=st.lists(st.text(st.characters(exclude_categories=["Cs", "Cc", "Z"]), min_size=1, max_size=8), min_size=1))
def test_any_words_of_a_message_are_found_again(history, words):
    conversation, _, _ = ask(history, " ".join(words))
    assert conversation.id in [summary.id for summary in history.summaries(" ".join(words), limit=10_000)]


def test_the_latest_conversation_comes_first_up_to_the_limit(history):
    ids = [ask(history, f"question {i}")[0].id for i in range(5)]
    history.add(history.load(ids[1]), None, "user", "again")
    assert [summary.id for summary in history.summaries(limit=3)] == [ids[1], ids[4], ids[3]]


CRASH = """
import os, sys
from pathlib import Path
from localreason.tui.conversation import Mark
from localreason.tui.history import History
history = History(Path(sys.argv[1]))
conversation = history.create("tiny")
question = history.add(conversation, None, "user", "Hello?")
reply = history.add(conversation, question, "assistant")
history.save_partial(reply.id, "Hel", "greet", [Mark(0, "think", "forced", "Wait")])
os.kill(os.getpid(), 9)
"""


def test_a_crash_loses_nothing_that_was_saved(path):
    done = subprocess.run([sys.executable, "-c", CRASH, str(path)], timeout=60)
    assert done.returncode == -9
    with History(path) as history:
        [summary] = history.summaries()
        message = history.load(summary.id).path()[-1]
    assert (message.content, message.thinking, message.state) == ("Hel", "greet", "stopped")
    assert message.marks == (Mark(0, "think", "forced", "Wait"),)


def test_two_chats_share_a_file_and_neither_ends_the_others_reply(history, path):
    conversation, _, reply = ask(history)
    with History(path) as other:
        assert other.load(conversation.id).path()[-1].state == "partial"
        second, _, _ = ask(other, "From the other one")
    history.finish(reply.id, "done", "", (), None)
    assert {summary.id for summary in history.summaries()} == {conversation.id, second.id}


def test_many_writers_at_once_lose_nothing(path):
    def write(name):
        with History(path) as history:
            for i in range(10):
                _, _, reply = ask(history, f"{name} {i}")
                history.save_partial(reply.id, "text", "", ())
        done.append(name)

    done = []
    threads = [threading.Thread(target=write, args=(name,)) for name in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(done) == 3
    with History(path) as history:
        assert len(history.summaries()) == 30


def test_a_chat_that_is_kept_waiting_too_long_says_so(history, path):
    history._database.execute("PRAGMA busy_timeout = 1")
    blocker = sqlite3.connect(path, isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    with pytest.raises(OutputError, match="in use by another program"):
        history.create("tiny")
    blocker.close()
    history.create("tiny")


def test_a_conversation_that_was_deleted_elsewhere_is_told_of(history, path):
    conversation, _, reply = ask(history)
    with History(path) as other:
        other.delete(conversation.id)
    history.save_partial(reply.id, "text", "", ())
    history.finish(reply.id, "text", "", (), None)
    with pytest.raises(InputError, match="deleted in another chat"):
        history.add(conversation, reply, "user", "And?")
    with pytest.raises(InputError, match="there is no conversation"):
        history.load(conversation.id)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: b"this is no database at all" * 400,
        lambda data: data[:100] + b"\xff" * 5000 + data[5100:],
        lambda data: data[: len(data) // 3],
    ],
    ids=["text", "damaged", "cut"],
)
def test_a_broken_file_is_refused_and_left_alone(path, spoil):
    with History(path) as history:
        ask(history)
    path.write_bytes(spoil(path.read_bytes()))
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"history.*move it elsewhere") as caught:
        History(path)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


def test_a_newer_file_and_another_programs_are_refused_and_left_alone(path, tmp_path):
    with History(path) as history:
        history._database.execute("PRAGMA user_version = 99")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"version 99 .* update localreason"):
        History(path)
    assert path.read_bytes() == before
    foreign = tmp_path / "foreign.db"
    database = sqlite3.connect(foreign)
    database.execute("CREATE TABLE mine (x)")
    database.commit()
    database.close()
    before = foreign.read_bytes()
    with pytest.raises(InputError, match="another program"):
        History(foreign)
    assert foreign.read_bytes() == before


def test_a_place_that_cannot_be_written_is_told_of(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be made"):
        History(tmp_path / "file" / "history.db")
    with pytest.raises(OutputError, match="cannot be used"):
        History(tmp_path)


def test_nobody_else_can_read_it(history, path):
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_closing_twice_does_nothing(path):
    history = History(path)
    history.close()
    history.close()
