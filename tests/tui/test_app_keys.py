"""Every key of the chat, pressed while a scripted model talks."""

import pytest

from localreason.tui.conversation import Mark
from localreason.tui.widgets.question import Question
from localreason.tui.widgets.reply import ReplyTurn
from tests.tui.stage import play

FORCED = Mark(4, "think", "forced", "Wait")
SUPPRESSED = Mark(9, "think", "suppressed", "tentative answer '391': certainty 0.97")


def test_enter_sends_and_the_reply_streams_in(tmp_path):
    async def scene(stage):
        await stage.ask()
        assert stage.chat.composer.text == ""
        stage.script.think("17 * 23")
        await stage.settle()
        await stage.until(lambda: "17 * 23" in stage.text)
        await stage.until(lambda: "Thinking" in stage.text)
        await stage.reply("It is **391**.", "")
        await stage.until(lambda: "It is 391." in stage.text)
        assert stage.dialogue.run is None
        stored = stage.history.load(stage.dialogue.conversation.id).path()
        assert [(m.role, m.content, m.state) for m in stored] == [
            ("user", "What is 17 * 23?", "done"),
            ("assistant", "It is **391**.", "done"),
        ]

    play(tmp_path, scene)


def test_the_thinking_folds_when_the_answer_starts_and_space_opens_it_again(tmp_path):
    async def scene(stage):
        await stage.ask()
        stage.script.think("a secret thought")
        await stage.settle()
        await stage.until(lambda: "a secret thought" in stage.text)
        stage.script.answer("Done.")
        await stage.settle()
        await stage.until(lambda: "a secret thought" not in stage.text)
        stage.script.end()
        await stage.settle()
        await stage.until(lambda: "Thought for 1 s · 8 tokens" in stage.text)
        await stage.press("shift+tab", "space")
        await stage.until(lambda: "a secret thought" in stage.text)
        await stage.press("space")
        await stage.until(lambda: "a secret thought" not in stage.text)

    play(tmp_path, scene)


@pytest.mark.parametrize("key", ["escape", "ctrl+c"])
def test_a_running_reply_is_stopped(tmp_path, key):
    async def scene(stage):
        await stage.ask()
        stage.script.think("so")
        await stage.press(key)
        assert stage.script.reply.is_stopped
        assert [s.sequence.cancelled for s in stage.script.reply.samples] == ["stopped"]
        stage.script.end("stopped")
        await stage.settle()
        assert stage.dialogue.path[-1].state == "stopped"

    play(tmp_path, scene)


def test_ctrl_c_copies_a_selection_before_it_stops(tmp_path):
    async def scene(stage):
        await stage.ask()
        stage.chat.composer.text = "copy this"
        stage.chat.composer.select_all()
        await stage.press("ctrl+c")
        assert stage.app.clipboard == "copy this"
        assert not stage.script.reply.is_stopped

    play(tmp_path, scene)


def test_answer_now_closes_the_thinking(tmp_path):
    async def scene(stage):
        await stage.ask()
        stage.script.think("long")
        await stage.settle()
        await stage.until(lambda: "Answer now" in stage.text)
        await stage.press("ctrl+g")
        assert stage.script.reply.samples[0].sequence.is_hurried
        stage.script.answer("Yes.")
        await stage.settle()
        await stage.until(lambda: "Answer now" not in stage.text)

    play(tmp_path, scene)


def test_think_longer_raises_the_budget(tmp_path):
    async def scene(stage):
        await stage.ask()
        stage.script.think("so", n_tokens=4000)
        await stage.settle()
        before = stage.script.reply.samples[0].n_budget
        await stage.press("ctrl+t")
        assert stage.script.reply.samples[0].n_budget > before
        await stage.told("512 tokens more")

    play(tmp_path, scene)


def test_regenerate_puts_another_reply_beside_the_first_with_another_seed(tmp_path):
    async def scene(stage):
        await stage.talk(answer="first")
        await stage.press("ctrl+r")
        await stage.reply("second")
        assert [m.content for m in stage.dialogue.path] == ["What is 17 * 23?", "second"]
        assert [recipe.seed for _, recipe, _ in stage.script.started] == [0, 1]
        await stage.until(lambda: "2/2" in stage.text)
        await stage.press("shift+tab", "left")
        await stage.until(lambda: "first" in stage.text)
        await stage.until(lambda: "1/2" in stage.text)
        await stage.press("right")
        await stage.until(lambda: "second" in stage.text)
        await stage.press("r")
        await stage.reply("third")
        await stage.until(lambda: "3/3" in stage.text)

    play(tmp_path, scene)


def test_an_earlier_message_is_edited_into_a_branch(tmp_path):
    async def scene(stage):
        await stage.talk("one", "1")
        await stage.talk("two", "2")
        await stage.press("ctrl+b", "up", "up", "up", "e")
        assert stage.chat.composer.text == "one"
        stage.chat.composer.insert(" and a half")
        await stage.press("enter")
        await stage.reply("1.5")
        assert [m.content for m in stage.dialogue.path] == ["one and a half", "1.5"]
        assert [turn.content for turn in stage.script.started[-1][0]] == ["one and a half"]
        await stage.press("ctrl+b", "up", "left")
        assert [m.content for m in stage.dialogue.path] == ["one", "1", "two", "2"]

    play(tmp_path, scene)


def test_escape_leaves_an_edit(tmp_path):
    async def scene(stage):
        await stage.talk("one", "1")
        await stage.press("ctrl+b", "up", "e", "escape")
        assert stage.chat.composer.text == ""
        await stage.talk("two", "2")
        assert [m.content for m in stage.dialogue.path] == ["one", "1", "two", "2"]

    play(tmp_path, scene)


def test_copy_of_replies_messages_and_code_blocks(tmp_path):
    async def scene(stage):
        answer = "Two:\n```py\nprint(1)\n```\n\n```sh\nls\n```\n"
        await stage.talk("code?", answer)
        await stage.press("f5")
        assert stage.app.clipboard == answer
        await stage.press("shift+tab", "y")
        assert stage.app.clipboard == "print(1)\n"
        await stage.press("y")
        assert stage.app.clipboard == "ls\n"
        await stage.press("up", "c")
        assert stage.app.clipboard == "code?"

    play(tmp_path, scene)


def test_marks_are_visited_and_explained(tmp_path):
    async def scene(stage):
        await stage.ask()
        stage.script.think("So. Wait, so it is.", marks=(FORCED, SUPPRESSED))
        await stage.settle()
        await stage.until(lambda: "▸Wait" in stage.text)
        await stage.reply("391", "")
        await stage.press("shift+tab", "m")
        await stage.until(lambda: "forced: a control wrote this, the model did not: Wait" in stage.text)
        await stage.press("m")
        await stage.until(lambda: "certainty 0.97" in stage.text)
        await stage.press("M")
        await stage.until(lambda: "1 of 2" in stage.text)

    play(tmp_path, scene, size=(120, 30))


def test_messages_are_walked_and_left_with_the_keyboard(tmp_path):
    async def scene(stage):
        await stage.talk()
        await stage.press("shift+tab")
        assert isinstance(stage.app.focused, ReplyTurn)
        await stage.press("up")
        assert isinstance(stage.app.focused, Question)
        await stage.press("down", "down")
        assert stage.app.focused is stage.chat.composer
        await stage.press("ctrl+b", "escape")
        assert stage.app.focused is stage.chat.composer
        await stage.press("ctrl+b", "pageup", "pagedown")

    play(tmp_path, scene)


def test_ctrl_q_leaves_and_a_reply_in_the_making_is_kept(tmp_path):
    async def leave(stage):
        await stage.ask("a long story?")
        stage.script.think("Once ")
        stage.script.answer("upon")
        await stage.settle()
        await stage.pilot.press("ctrl+q")

    async def again(stage):
        await stage.press("f4", "enter")
        await stage.until(lambda: stage.dialogue.path)
        reply = stage.dialogue.path[-1]
        assert (reply.content, reply.thinking, reply.state) == ("upon", "Once ", "stopped")
        await stage.until(lambda: "upon" in stage.text)

    play(tmp_path, leave)
    play(tmp_path, again)


def test_new_and_keys_are_in_the_footer_of_80_columns_whatever_has_the_focus(tmp_path):
    code = "```python\nprint(1)\n```"

    async def scene(stage):
        async def check(*keys):
            await stage.press(*keys)
            await stage.until(lambda: stage.text.splitlines()[-1].rstrip().endswith("^n New f1 Keys"))

        await stage.ask(code)
        stage.script.think("so", marks=(FORCED,))
        await check()
        await check("shift+tab")
        await check("up")
        await stage.reply(code)
        await check("escape", "ctrl+r")
        stage.script.think("so", marks=(FORCED,))
        await stage.reply(code, "")
        await check("shift+tab")
        await check("up")
        await check("e", "shift+tab")
        await stage.press("f3")
        assert stage.app.screen is not stage.chat

    play(tmp_path, scene)
