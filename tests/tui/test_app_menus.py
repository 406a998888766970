"""The keys that lead to lists: conversations, models, presets, help, files."""

import json
from pathlib import Path

from localreason.tui.app import DARK, LIGHT
from localreason.tui.conversation import Mark
from localreason.tui.widgets.chooser import Chooser
from localreason.tui.widgets.keys import Keys
from tests.tui.stage import play

FORCED = Mark(4, "think", "forced", "Wait")
SUPPRESSED = Mark(9, "think", "suppressed", "tentative answer '391': certainty 0.97")


def test_new_next_and_previous_conversation(tmp_path):
    async def scene(stage):
        await stage.talk("first talk", "1")
        await stage.press("ctrl+n")
        assert stage.dialogue.conversation is None
        await stage.talk("second talk", "2")
        await stage.press("f9")
        assert stage.dialogue.conversation.title == "first talk"
        await stage.press("ctrl+pagedown")
        await stage.told("no older")
        await stage.press("f8")
        assert stage.dialogue.conversation.title == "second talk"
        await stage.press("ctrl+pageup")
        await stage.told("no newer")

    play(tmp_path, scene)


def test_conversations_are_searched_opened_renamed_deleted(tmp_path):
    async def scene(stage):
        await stage.talk("about whales", "big")
        await stage.press("ctrl+n")
        await stage.talk("about mice", "small")
        await stage.press("f4")
        await stage.type("whale")
        await stage.until(lambda: len(stage.app.screen.shown) == 1)
        assert [choice.title for choice in stage.app.screen.shown] == ["about whales"]
        await stage.press("enter")
        assert stage.dialogue.conversation.title == "about whales"
        await stage.press("f4", "f2")
        await stage.type(" too")
        await stage.press("enter")
        await stage.press("escape")
        assert stage.dialogue.conversation.title == "about whales too"
        await stage.until(lambda: "about whales too" in stage.text)
        await stage.press("f4", "f8")
        await stage.told("F8 again")
        await stage.press("f8", "escape")
        assert [one.title for one in stage.history.summaries()] == ["about mice"]
        assert stage.dialogue.conversation is None

    play(tmp_path, scene)


def test_the_list_counts_messages(tmp_path):
    async def scene(stage):
        stage.history.add(stage.history.create("tiny"), None, "user", "alone")
        await stage.press("f4")
        await stage.until(lambda: "1 message · tiny" in stage.text)

    play(tmp_path, scene)


def test_conversations_are_exported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    async def scene(stage):
        await stage.talk("export me", "gladly")
        await stage.press("ctrl+s", "ctrl+u")
        await stage.type("a.md")
        await stage.press("enter")
        assert "gladly" in Path("a.md").read_text()
        await stage.press("f4", "f6", "ctrl+u")
        await stage.type("a.json")
        await stage.press("enter")
        assert json.loads(Path("a.json").read_text())["title"] == "export me"
        await stage.press("f5", "ctrl+u")
        await stage.type("a.md")
        await stage.press("enter")
        await stage.told("is there already")

    play(tmp_path, scene)


def test_presets_and_controls_are_explained_and_set(tmp_path):
    async def scene(stage):
        await stage.press("f3")
        await stage.until(lambda: "a hard cap only" in stage.text)
        assert (
            "CGRS" in next(choice for choice in stage.app.screen.shown if choice.id == "control:suppress").explanation
        )
        await stage.type("fast")
        await stage.press("enter")
        assert stage.dialogue.preset == "fast"
        assert stage.dialogue.recipe.get("suppress") is not None
        await stage.press("f3")
        await stage.type("budget")
        await stage.press("enter")
        await stage.type(":max=64")
        await stage.press("enter")
        assert stage.dialogue.recipe.max_thinking == 64
        await stage.ask()
        assert stage.script.started[-1][1].max_thinking == 64
        await stage.press("f3")
        await stage.type("budget")
        await stage.press("enter", "ctrl+u")
        await stage.type("budget:ignore=1")
        await stage.press("enter")
        await stage.told("lengthens the thinking")
        assert stage.dialogue.recipe.max_thinking == 64

    play(tmp_path, scene)


def test_another_model_is_opened_and_a_missing_one_told_of(tmp_path):
    async def scene(stage):
        await stage.talk()
        await stage.press("f2")
        await stage.type("1.7b")
        await stage.press("enter")
        await stage.until(lambda: stage.history.load(stage.dialogue.conversation.id).model == "qwen3-1.7b")
        assert stage.backend.opened == ["scripted", "qwen3-1.7b"]
        await stage.press("f2")
        await stage.type("missing")
        await stage.press("enter")
        await stage.told("there is no model 'missing'")
        await stage.ask("still there?")
        assert stage.chat.composer.text == "still there?", "what was written is not lost"

    play(tmp_path, scene)


def test_the_first_start_leads_to_a_model_and_the_demo_is_one_key_away(tmp_path):
    async def scene(stage):
        await stage.until(lambda: "Choose a model for this machine" in stage.text)
        await stage.until(lambda: "to fetch" in stage.text)
        await stage.press("ctrl+d")
        await stage.until(lambda: stage.dialogue.streamer is not None)
        assert stage.backend.opened == ["demo"]
        await stage.talk()
        await stage.until(lambda: "It is 391." in stage.text)

    play(tmp_path, scene, model=None)


def test_help_shows_all_keys_and_the_palette_runs_them_by_name(tmp_path):
    async def scene(stage):
        await stage.press("f1")
        assert isinstance(stage.app.screen, Keys)
        await stage.press("escape", "ctrl+p")
        await stage.type("light")
        await stage.press("enter")
        await stage.until(lambda: stage.app.theme == LIGHT.name)
        await stage.press("ctrl+l")
        assert stage.app.theme == DARK.name
        await stage.press("ctrl+p")
        await stage.type("older")
        await stage.press("enter")
        await stage.told("no older")

    play(tmp_path, scene, size=(120, 60))


def test_a_file_is_attached_as_text(tmp_path):
    (tmp_path / "notes.txt").write_text("line 1\nline 2\n")
    (tmp_path / "image.bin").write_bytes(b"\xff\xfe\x00")

    async def scene(stage):
        await stage.press("ctrl+o")
        await stage.type(str(tmp_path / "notes.txt"))
        await stage.press("enter")
        assert "[file notes.txt: 7 lines, 34 characters]" in stage.chat.composer.text
        await stage.ask(" what is it?")
        assert "```\nline 1\nline 2\n```" in stage.dialogue.path[0].content
        await stage.press("escape")
        stage.script.end("stopped")
        await stage.press("ctrl+o")
        await stage.type(str(tmp_path / "image.bin"))
        await stage.press("enter")
        await stage.told("is not UTF-8 text")
        await stage.press("ctrl+o")
        await stage.type("/nowhere")
        await stage.press("enter")
        await stage.told("/nowhere cannot be read")

    play(tmp_path, scene)


def test_lists_are_left_with_escape(tmp_path):
    async def scene(stage):
        for key in ("f2", "f3", "f4", "f1", "ctrl+o"):
            await stage.press(key)
            assert stage.app.screen is not stage.chat, key
            await stage.press("down", "up", "pagedown", "pageup") if isinstance(stage.app.screen, Chooser) else None
            await stage.press("escape")
            assert stage.app.screen is stage.chat, key

    play(tmp_path, scene)
