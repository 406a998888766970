"""Conversations as files, and the code out of a message."""

import json

from markdown_it import MarkdownIt

from localreason.tui.conversation import Conversation, Mark, Message, Stats, title_of
from localreason.tui.export import copy_blocks, to_json, to_markdown


def conversation(*messages):
    made = Conversation(1, "", "tiny", created=0.0)
    for message in messages:
        made = made.put(message)
    return made


QUESTION = Message(1, None, "user", "What is 6 * 7?\nPlease.")
REPLY = Message(
    2,
    1,
    "assistant",
    "It is **42**.",
    "Six sevens.\n```py\n6 * 7\n```\n</details>",
    marks=(Mark(3, "think", "forced", "Wait"),),
    stats=Stats(n_thinking=12, thinking_seconds=3.2),
)


def test_markdown_has_the_chosen_branch_and_folds_the_thinking_away():
    other = Message(3, 1, "assistant", "Forty-two.", state="stopped")
    both = conversation(QUESTION, REPLY, other)
    text = to_markdown(both)
    assert "# What is 6 * 7?" in text
    assert "Forty-two." in text
    assert "*stopped before its end*" in text
    assert "**42**" not in text
    text = to_markdown(both.choose(REPLY))
    assert "Forty-two." not in text
    assert "<summary>Thinking, 12 tokens in 3 s</summary>" in text


def test_thinking_cannot_break_out_of_its_place_in_the_markdown():
    tokens = MarkdownIt("commonmark").parse(to_markdown(conversation(QUESTION, REPLY)))
    [fence] = [token for token in tokens if token.type == "fence"]
    assert fence.content == REPLY.thinking + "\n"
    assert tokens[-2].content == "It is **42**."


def test_json_has_all_branches_thinking_and_marks():
    other = Message(3, 1, "assistant", "Zweiundvierzig, 四十二.")
    row = json.loads(to_json(conversation(QUESTION, REPLY, other)))
    assert row["path"] == [1, 3]
    assert [message["content"] for message in row["messages"]] == [m.content for m in (QUESTION, REPLY, other)]
    assert row["messages"][1]["thinking"] == REPLY.thinking
    assert row["messages"][1]["marks"] == [{"position": 3, "phase": "think", "kind": "forced", "text": "Wait"}]
    assert row["messages"][1]["stats"]["n_thinking"] == 12
    assert row["created"].startswith("1970-01-01")


def test_code_blocks_are_found_where_markdown_has_them():
    fenced = "a\n```py\nx = '```'\n```\n- item\n\n  ~~~\n  in a list\n  ~~~\n\n"
    text = f"{fenced}> ```\n> quoted\n> ```\n\n    indented\n\n`inline`"
    assert copy_blocks(text) == ["x = '```'\n", "in a list\n", "quoted\n", "indented\n"]
    assert copy_blocks("```\nstill written") == ["still written"]
    assert copy_blocks("no code") == []


def test_a_branch_is_chosen_and_the_path_below_it_is_kept():
    more = Message(3, 2, "user", "And 8 * 7?")
    edited = Message(4, None, "user", "Hello")
    made = conversation(QUESTION, REPLY, more, edited)
    assert [m.id for m in made.path()] == [4]
    assert [m.id for m in made.choose(QUESTION).path()] == [1, 2, 3]
    assert [m.id for m in made.choose(more).path()] == [1, 2, 3]
    assert made.siblings(edited) == (QUESTION, edited)


def test_the_model_gets_the_branch_without_thinking_and_without_replies_that_never_answered():
    silent = Message(2, 1, "assistant", "", "thought only", state="stopped")
    made = conversation(QUESTION, silent, Message(3, 2, "user", "Shorter."), Message(4, 3, "assistant", "42"))
    assert [(turn.role, turn.content) for turn in made.turns()] == [
        ("user", f"{QUESTION.content}\n\nShorter."),
        ("assistant", "42"),
    ]
    assert [turn.content for turn in made.turns(QUESTION)] == [QUESTION.content]


def test_a_message_is_replaced_in_its_place():
    made = conversation(QUESTION, REPLY, Message(3, 1, "assistant", "")).choose(REPLY)
    made = made.put(Message(3, 1, "assistant", "done"))
    assert made.find(3).content == "done"
    assert made.path()[-1] == REPLY


def test_a_title_is_the_first_line_cut_at_a_word():
    assert title_of("\n\n  Hello   there \nmore") == "Hello there"
    assert title_of("word " * 40) == "word " * 11 + "word…"
    assert len(title_of("ü" * 200)) == 60
    assert title_of(" \n") == ""
