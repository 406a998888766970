"""What a user may do at any moment, or write, that must not end the chat or change what was meant."""

import asyncio
import threading
import time

import pytest
from textual import events

from localreason.tui.app import ChatApp
from localreason.tui.history import History
from tests.tui.stage import SAFE, Backend, play


def send(stage, key):
    """A key, without waiting for what comes of it."""
    event = events.Key(key, None)
    event.set_sender(stage.app)
    stage.app._driver.send_message(event)


LONG = "\n\n".join(f"Paragraph {i} with *some* words and `code`." for i in range(100))


@pytest.mark.parametrize("way", ["neighbour", "list"])
def test_another_conversation_in_the_middle_of_a_reply_ends_nothing(tmp_path, way):
    async def scene(stage):
        await stage.talk("older", LONG)
        await stage.press("ctrl+n")
        await stage.ask("newer")
        stage.script.answer("It ")
        await stage.settle()
        if way == "list":
            await stage.press("f4", "down")
        for i in range(60):  # it takes a while to lay the older one out, and words come meanwhile
            stage.script.answer(f"word{i} ")
            if i == 5:
                send(stage, "enter" if way == "list" else "f9")
            await asyncio.sleep(0.02)
        stage.script.end()
        await stage.settle()
        assert stage.dialogue.conversation.title == "older"
        assert [turn.message.content for turn in stage.chat.transcript.turns] == ["older", LONG]
        kept = {one.title: one.id for one in stage.history.summaries(limit=9)}
        last = stage.history.load(kept["newer"]).path()[-1]
        assert last.content.count("word") == 60
        assert last.state == "done"

    play(tmp_path, scene)


def test_a_key_at_the_end_of_a_reply_ends_nothing(tmp_path):
    async def scene(stage):
        await stage.talk("older", "1")
        await stage.press("ctrl+n")
        await stage.ask("newer")
        stage.script.think("hm " * 10)
        await stage.settle()
        stage.script.answer(LONG)
        stage.script.end()
        await asyncio.sleep(0.05)
        send(stage, "f9")
        await stage.until(lambda: [turn.message.content for turn in stage.chat.transcript.turns] == ["older", "1"])
        assert stage.dialogue.run is None

    play(tmp_path, scene)


def test_a_title_in_brackets_is_a_title(tmp_path):
    async def scene(stage):
        await stage.talk("What does [/INST] mean in a[i]?", "It closes.")
        await stage.press("f4", "f8")
        await stage.told("F8 again deletes “What does [/INST] mean in a[i]?”")

    play(tmp_path, scene)


@pytest.mark.parametrize("keys", [("ctrl+s", "ctrl+u"), ("ctrl+o",)], ids=["export", "attach"])
def test_a_path_of_an_unknown_user_is_a_notice(tmp_path, keys):
    async def scene(stage):
        await stage.talk()
        await stage.press(*keys)
        await stage.type("~nosuchuser-x/notes.md")
        await stage.press("enter")
        await stage.told("no folder is known for ~nosuchuser-x")

    play(tmp_path, scene)


def test_looking_at_the_conversations_does_not_end_an_edit(tmp_path):
    async def scene(stage):
        await stage.talk("first question", "1")
        await stage.talk("second question", "2")
        await stage.press("ctrl+b", "up", "up", "up", "e")
        assert stage.chat.edited.content == "first question"
        await stage.press("f4", "escape")
        assert stage.chat.edited.content == "first question"
        await stage.press("enter")
        assert [message.content for message in stage.dialogue.path if message.role == "user"] == ["first question"]

    play(tmp_path, scene)


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_a_paste_has_lines_whatever_the_terminal_ends_them_with(tmp_path, end):
    async def scene(stage):
        await stage.type(end.join(f"line {i}" for i in range(40)))
        assert "40 lines" in stage.chat.composer.text
        await stage.press("enter")
        assert stage.script.started[-1][0][-1].content.splitlines() == [f"line {i}" for i in range(40)]
        assert "\r" not in stage.script.started[-1][0][-1].content

    play(tmp_path, scene)


def test_leaving_does_not_wait_for_a_model_that_is_being_opened(tmp_path):
    begun, going_on = threading.Event(), threading.Event()

    class Slow(Backend):
        def open(self, name, on_event, on_progress):
            begun.set()
            going_on.wait(30)
            return super().open(name, on_event, on_progress)

    async def perform():
        with History(tmp_path / "chats.sqlite3") as history:
            app = ChatApp(Slow(), history, SAFE, "safe", "slow")
            async with app.run_test():
                assert await asyncio.to_thread(begun.wait, 20)
                app.exit()
            assert app.chat.is_opening

    started = time.monotonic()
    try:
        asyncio.run(perform())
        assert time.monotonic() - started < 20
    finally:
        going_on.set()
    opening = [thread for thread in threading.enumerate() if thread.name == "opening"]
    for thread in opening:
        thread.join(10)
        assert not thread.is_alive()
