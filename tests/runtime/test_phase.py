"""The phase machine: tags over token borders, at the prompt's end, repeated, taken back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localreason.runtime.formats import FORMATS, detect, strip_thinking
from localreason.runtime.phase import PhaseTracker
from localreason.runtime.sequence import Phase


def read(format, tail, pieces):
    tracker = PhaseTracker(FORMATS[format], tail)
    parts = [part for i, piece in enumerate(pieces) for part in tracker.feed(piece, i)] + tracker.flush()
    return tracker, *(
        "".join(text for text, phase in parts if phase is wanted) for wanted in (Phase.THINK, Phase.ANSWER)
    )


REPLIES = {
    "think": "<think>\nab < c </thin é 🎉\n</think>\n\nso <b>7</b>",
    "harmony": "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>7",
    "bracket": "[THINK]a[b][/THIN x[/THINK]7",
    "gemma4": "<|channel>thought\nhm<channel|>7",
    "s1": "<|im_start|>think\nhm\n<|im_start|>answer\n7",
}


@pytest.mark.parametrize("name", REPLIES)
@given(data=st.data())
def test_any_split_into_tokens_shows_the_same_text(name, data):
    whole = REPLIES[name].encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, len(whole) - 1))))
    pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    _, thinking, answer = read(name, "", pieces)
    assert (thinking, answer) == read(name, "", [whole])[1:]
    assert "7" in answer
    assert not any(tag in thinking + answer for tag in FORMATS[name].opens + FORMATS[name].closes)


def test_a_prefilled_tag_opens_and_a_prefilled_block_is_over():
    assert PhaseTracker(FORMATS["think"], "<|im_start|>assistant\n<think>\n").phase is Phase.THINK
    closed = PhaseTracker(FORMATS["think"], "<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert closed.phase is Phase.ANSWER
    assert closed.closed_at is None
    assert closed.feed(b"7", 0) == [("7", Phase.ANSWER)]


def test_the_place_of_a_closing_tag_is_its_first_token_and_the_text_before_it_is_kept():
    tracker = PhaseTracker(FORMATS["think"], "<think>")
    assert tracker.feed(b"done. <", 5) == [("done. ", Phase.THINK)]
    assert tracker.feed(b"/thi", 6) == []
    assert tracker.feed(b"nk>7", 7) == [("7", Phase.ANSWER)]
    assert (tracker.closed_at, tracker.closed_kept) == (5, "done. ")
    tracker.reopen()
    assert tracker.phase is Phase.THINK
    assert tracker.feed(b" more", 6) == [(" more", Phase.THINK)]


def test_a_repeated_closing_tag_is_swallowed_only_before_the_answer_has_begun():
    _, _, answer = read("think", "<think>", [b"a</think>\n", b"</think>\n", b"7 </think>"])
    assert answer.strip() == "7 </think>"


def test_a_second_block_is_thinking_again():
    tracker, thinking, answer = read("think", "", [b"<think>a</think>b<think>c</think>d"])
    assert (tracker.n_blocks, thinking, answer) == (2, "ac", "bd")


def test_text_that_may_become_a_tag_is_shown_when_the_reply_ends():
    assert read("think", "<think>", [b"a</thin"])[1] == "a</thin"


def test_what_may_be_the_beginning_of_a_tag_is_told():
    tracker = PhaseTracker(FORMATS["think"], "<think>")
    for piece, is_in_tag in ((b"a ", False), (b"<", True), (b"/th", True), (b"e ", False), (b"</think>", False)):
        tracker.feed(piece, 0)
        assert tracker.is_in_tag == is_in_tag, piece


def test_a_tag_that_could_have_grown_counts_at_the_end_of_the_prompt_and_of_the_reply():
    assert PhaseTracker(FORMATS["gemma4"], "<|turn>model\n<|channel>thought").phase is Phase.THINK
    tracker, _, answer = read("gemma4", "", [b"<|channel>thought"])
    assert (tracker.phase, answer) == (Phase.THINK, "")


def test_half_a_character_behind_a_tag_that_is_taken_back_is_taken_back_with_it():
    tracker = PhaseTracker(FORMATS["think"], "<think>")
    tracker.feed(b"a</think>\xc3", 1)
    tracker.reopen()
    assert tracker.is_whole_text
    assert tracker.feed(b"b", 1) == [("b", Phase.THINK)]


@pytest.mark.parametrize(
    ("before", "piece", "rest"),
    [
        ("so 4.</think", b'>{"', ">"),
        ("so 4.</th", b"ink>{", "ink>"),
        ("so 4.", b" done</think> {", " done</think>"),
        ("so 4.</think", b">", ""),
        ("so 4.</think", b">\n\n", ""),
        ("so 4.", b">{", ""),
        ("so 4.</think>", b">{", ""),
    ],
)
def test_a_piece_that_ends_the_thinking_and_begins_the_answer_is_known_before_it_is_taken(before, piece, rest):
    tracker = PhaseTracker(FORMATS["think"], "<think>\n")
    tracker.feed(before.encode(), 0)
    assert tracker.rest_of_tag(piece) == rest


def test_incomplete_characters_are_waited_for_and_then_replaced():
    tracker = PhaseTracker(FORMATS["none"])
    assert tracker.feed("é".encode()[:1], 0) == []
    assert not tracker.is_whole_text
    assert tracker.feed("é".encode()[1:], 1) == [("é", Phase.ANSWER)]
    tracker.feed(b"\xc3", 2)
    assert tracker.flush() == [("�", Phase.ANSWER)]


@pytest.mark.parametrize(
    ("template", "name", "format"),
    [
        ("<|im_start|>{{ m }}<think>\n", "Qwen3 1.7B", "think"),
        ("<｜User｜>{{ m }}<｜Assistant｜><think>\n", "DeepSeek R1 Distill", "deepseek"),
        ("<|start|>assistant<|channel|>analysis<|message|>", "gpt-oss", "harmony"),
        ("[SYSTEM_PROMPT] [THINK] [INST]", "Ministral", "bracket"),
        ("<|turn>model\n<|channel>thought", "gemma 4", "gemma4"),
        ("<|im_start|>user", "s1.1-32B", "s1"),
        ("<|im_start|>user", "Qwen2.5 Coder", "prompted"),
        (None, "x", "prompted"),
    ],
)
def test_formats_are_recognised(template, name, format):
    assert detect(template, {"general.name": name}).name == format


def test_old_thinking_is_stripped_from_history():
    assert strip_thinking("<think>\nlong\n</think>\n\n42", FORMATS["think"]) == "42"
    assert strip_thinking("42", FORMATS["think"]) == "42"
