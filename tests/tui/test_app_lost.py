"""Nothing that was written is lost: by the user, by the model, by a history that cannot be written for a moment."""

import asyncio
import os
import signal

import pytest
from textual.widgets import Input

from localreason.cli.say import tell
from localreason.runtime.errors import OutputError
from localreason.tui.history import History
from tests.tui.stage import play
from tests.tui.test_app_robust import send


def locked(*arguments):
    raise OutputError("the history was in use by another program; close that")


def test_a_reply_that_cannot_be_stored_at_its_end_is_stored_later(tmp_path, monkeypatch):
    async def scene(stage):
        await stage.ask("What?")
        stage.script.answer("It is 391.")
        await stage.settle()
        with monkeypatch.context() as patched:
            patched.setattr(History, "finish", locked)
            stage.script.end()
            await stage.told("in use by another program")
        assert stage.dialogue.path[-1].content == "It is 391."
        await stage.until(lambda: stage.history.load(stage.dialogue.conversation.id).path()[-1].state == "done")
        assert stage.history.load(stage.dialogue.conversation.id).path()[-1].content == "It is 391."
        assert len(stage.app._notifications) <= 1, "told once"

    play(tmp_path, scene)


@pytest.mark.parametrize(
    ("method", "keys"),
    [("rename", ["f4", "f2", "x", "enter"]), ("delete", ["f4", "f8", "f8"]), ("summaries", ["f4", "a"])],
)
def test_a_list_of_conversations_that_cannot_be_used_is_a_notice(tmp_path, monkeypatch, method, keys):
    async def scene(stage):
        await stage.talk()
        await stage.press(*keys[:-1])
        monkeypatch.setattr(History, method, locked)
        await stage.press(keys[-1])
        await stage.told("in use by another program")

    play(tmp_path, scene)


@pytest.mark.parametrize("keys", [("f9", "ctrl+r"), ("ctrl+n", "ctrl+r")])
def test_another_reply_asked_for_while_the_conversation_changes_ends_nothing(tmp_path, keys):
    async def scene(stage):
        await stage.talk("older", "1")
        await stage.press("ctrl+n")
        await stage.talk("newer", "2")
        for key in keys:
            send(stage, key)
        await stage.settle()
        await asyncio.sleep(0.05)
        await stage.settle()
        assert stage.dialogue.run is None
        assert stage.app._exception is None

    play(tmp_path, scene)


def test_keys_behind_enter_are_the_next_message(tmp_path):
    async def scene(stage):
        for key in ("a", "b", "enter", "c", "d"):
            send(stage, key)
        await stage.settle()
        assert stage.script.started[-1][0][-1].content == "ab"
        assert stage.chat.composer.text == "cd"
        send(stage, "enter")  # it is refused while the reply runs
        send(stage, "e")
        await stage.settle()
        assert stage.chat.composer.text == "cde"

    play(tmp_path, scene)


def test_an_edit_gives_the_draft_back(tmp_path):
    async def scene(stage):
        await stage.talk("question", "1")
        await stage.type("draft")
        await stage.press("ctrl+b", "up", "up", "e")
        assert stage.chat.composer.text == "question"
        await stage.press("escape")
        assert stage.chat.composer.text == "draft"
        await stage.press("ctrl+b", "up", "up", "e", "s", "enter")
        assert stage.script.started[-1][0][-1].content == "questions"
        assert stage.chat.composer.text == "draft"

    play(tmp_path, scene)


def test_a_draft_behind_an_earlier_input_is_there_in_another_conversation(tmp_path):
    async def scene(stage):
        await stage.talk("older", "1")
        await stage.press("ctrl+n")
        await stage.talk("newer", "2")
        await stage.type("draft")
        await stage.press("up", "f9")
        assert stage.dialogue.conversation.title == "older"
        assert stage.chat.composer.text == "draft"

    play(tmp_path, scene)


@pytest.mark.parametrize("keys", [("ctrl+w",), ("left", "left", "x")])
def test_half_of_a_folded_text_is_not_sent(tmp_path, keys):
    async def scene(stage):
        await stage.type("row\n" * 40)
        await stage.press(*keys, "enter")
        await stage.told("Half of a folded text")
        assert stage.script.started == []
        stage.chat.composer.text = ""
        await stage.press("x", "enter")
        assert stage.script.started[-1][0][-1].content == "x"

    play(tmp_path, scene)


def test_two_files_that_look_alike_are_two(tmp_path):
    async def scene(stage):
        for folder, text in (("one", "a\n"), ("two", "b\n")):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "notes.txt").write_text(text)
            await stage.press("ctrl+o")
            await stage.type(str(tmp_path / folder / "notes.txt"))
            await stage.press("enter")
        await stage.press("enter")
        sent = stage.script.started[-1][0][-1].content
        assert sent.index("a\n") < sent.index("b\n")

    play(tmp_path, scene)


def test_what_would_steer_the_terminal_stays_folded_and_is_sent_as_it_is(tmp_path):
    async def scene(stage):
        await stage.type("\x1b]0;owned\x1b\\ red")
        await stage.press("enter")
        assert stage.script.started[-1][0][-1].content == "\x1b]0;owned\x1b\\ red"
        await stage.reply()
        await stage.press("up")
        assert "\x1b" not in stage.text
        assert stage.chat.composer.expanded() == "\x1b]0;owned\x1b\\ red"

    play(tmp_path, scene)


def test_entities_are_no_way_round_that(tmp_path):
    async def scene(stage):
        await stage.talk("q", "start &#8238;abc&#27;[31m &rlm; x &lt; y")
        assert not {"\u202e", "\u200f", "\x1b"} & set(stage.text)
        assert "x < y" in stage.text

    play(tmp_path, scene)


def test_a_reply_that_is_come_back_to_is_shown_once(tmp_path):
    async def scene(stage):
        await stage.talk("older", "1")
        await stage.press("ctrl+n")
        await stage.ask("newer")
        stage.script.answer("FIRSTPART ")
        await stage.settle()
        stage.chat.save()
        await stage.press("f9", "f8")
        stage.script.answer("and the rest.")
        await stage.settle()
        await stage.until(lambda: "and the rest." in stage.text)
        assert stage.text.count("FIRSTPART") == 1
        stage.script.end()
        await stage.settle()
        assert stage.text.count("FIRSTPART") == 1

    play(tmp_path, scene)


def test_a_running_reply_is_copied_as_far_as_it_is(tmp_path):
    async def scene(stage):
        await stage.ask("q")
        await stage.press("f5")
        await stage.told("nothing to copy yet")
        stage.script.answer("So far")
        await stage.settle()
        await stage.press("f5")
        assert stage.app.clipboard == "So far"

    play(tmp_path, scene)


def test_a_model_whose_name_cannot_be_noted_is_opened_all_the_same(tmp_path, monkeypatch):
    async def scene(stage):
        await stage.talk()
        monkeypatch.setattr(History, "set_model", locked)
        stage.chat.open_model("demo")
        await stage.told("in use by another program")
        assert stage.dialogue.model == "demo"

    play(tmp_path, scene)


def test_what_the_program_tells_while_the_chat_runs_is_shown(tmp_path):
    async def scene(stage):
        await stage.talk()
        await asyncio.to_thread(tell, "no node [can] be used")
        await stage.told("no node [can] be used")

    play(tmp_path, scene)


def test_a_signal_to_end_leaves_the_terminal_in_order(tmp_path):
    async def scene(stage):
        await stage.ask()
        stage.script.answer("So far")
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL, "the tests would end with it"
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(20):
            while not stage.app._exit:
                await asyncio.sleep(0)

    play(tmp_path, scene)


def test_the_help_over_the_palette_and_the_palette_over_the_help(tmp_path):
    async def scene(stage):
        await stage.press("ctrl+p", "f1", "ctrl+p", "f1")
        assert stage.app._exception is None

    play(tmp_path, scene)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")

    async def scene(stage):
        await stage.press("ctrl+o")
        await stage.type(str(tmp_path / "pipe"))
        await stage.press("enter")
        await stage.told("is no regular file")

    play(tmp_path, scene)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_is_a_notice(tmp_path, name):
    async def scene(stage):
        await stage.press("ctrl+o")
        stage.app.screen.query_one(Input).value = name
        await stage.press("enter")
        await stage.told("cannot be read")

    play(tmp_path, scene)


def test_a_folded_part_that_was_deleted_as_a_whole_is_no_half(tmp_path):
    async def scene(stage):
        composer = stage.chat.composer
        composer.fold("file", "a.txt", "one\ntwo")
        await stage.press("backspace")
        composer.fold("file", "a.txt", "one\ntwo\nthree")
        await stage.press("enter")
        assert stage.script.started[-1][0][-1].content == "one\ntwo\nthree"
        stage.script.answer("3")
        stage.script.end()
        await stage.settle()
        composer.fold("paste", "1", "x" * 3000)
        composer.move_cursor((0, 4))
        composer.delete((0, 0), (0, 4))
        await stage.press("enter")
        await stage.told("Half of a folded text")

    play(tmp_path, scene)


def test_a_question_whose_reply_cannot_be_stored_is_put_back_once(tmp_path, monkeypatch):
    add = History.add

    def fail(history, conversation, parent, role, content=""):
        return add(history, conversation, parent, role, content) if role == "user" else locked()

    async def scene(stage):
        await stage.type("What?")
        with monkeypatch.context() as patched:
            patched.setattr(History, "add", fail)
            await stage.press("enter")
            await stage.told("in use by another program")
        assert stage.chat.composer.text == "What?"
        assert stage.history.summaries() == []
        await stage.press("enter")
        assert [message.content for message in stage.dialogue.path] == ["What?", ""]
        assert len(stage.history.summaries()) == 1

    play(tmp_path, scene)


def test_an_edit_that_begins_at_an_earlier_input_keeps_itself_and_the_draft(tmp_path):
    async def scene(stage):
        await stage.talk("question", "1")
        await stage.type("draft")
        await stage.press("up")
        assert stage.chat.composer.text == "question"
        await stage.press("ctrl+b", "up", "up", "e", "s")
        assert stage.chat.composer.text == "questions"
        await stage.chat.show_conversation()  # as with another version of a reply
        assert stage.chat.composer.text == "questions"
        await stage.press("enter")
        assert stage.script.started[-1][0][-1].content == "questions"
        assert stage.chat.composer.text == "draft"

    play(tmp_path, scene)
