"""Thinking formats: entries that fit together, and earlier replies without their thinking."""

import pytest

from localreason.runtime.errors import InputError
from localreason.runtime.formats import FORMATS, detect, find_format, strip_thinking
from localreason.runtime.phase import PhaseTracker
from localreason.runtime.sequence import Phase


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "none"])
def test_what_the_runtime_writes_is_what_it_recognises(name):
    format = FORMATS[name]
    tracker = PhaseTracker(format, format.open)
    assert tracker.phase is Phase.THINK
    tracker.feed(format.close.encode(), 0)
    assert tracker.phase is Phase.ANSWER
    assert tracker.closed_at == 0


def test_a_name_that_only_begins_like_s1_is_not_s1():
    assert detect("<|im_start|>user", {"general.name": "s1000 chat"}).name == "prompted"


def test_a_prompted_model_without_chatml_gets_hints_as_plain_text():
    assert "<|im_start|>" not in detect("[INST] {{ m }} [/INST]", {}).user_hint
    assert "<|im_start|>" in detect("<|im_start|>user", {}).user_hint


def test_thinking_that_was_never_closed_is_stripped_too():
    assert strip_thinking("<think>\ncut at the lim", FORMATS["think"]) == ""
    assert strip_thinking("<think>a</think>\n\nSo 4. <think>cut", FORMATS["think"]) == "So 4."


def test_an_unknown_format_is_named_with_those_that_exist():
    with pytest.raises(InputError, match=r"'thinkk'.*harmony"):
        find_format("thinkk")
