"""Runs of characters that end llama.cpp's process for some vocabularies are refused, all else is read."""

import pytest

from localreason.runtime.errors import PromptError
from localreason.runtime.llama import load_tokenizer
from tests.gguf_models import write_model


@pytest.mark.parametrize("pre", ["tekken", "gpt-4o", "deepseek-v3", "falcon"])
@pytest.mark.parametrize("character", ["a", "A", "7", "!", " ", "\n", "中", "e\u0301"])
def test_a_run_that_overflows_the_stack_is_refused(tmp_path, pre, character):
    path = write_model(tmp_path / "m.gguf", values={"tokenizer.ggml.pre": pre})
    with load_tokenizer(path) as tokenizer:
        assert tokenizer.encode("a, b" + character * 900)
        with pytest.raises(PromptError, match="in a row cannot be read by this model's tokenizer"):
            tokenizer.encode("a, b" + character * 60_000)


def test_long_texts_of_words_are_read(tmp_path):
    path = write_model(tmp_path / "m.gguf", values={"tokenizer.ggml.pre": "tekken"})
    with load_tokenizer(path) as tokenizer:
        assert tokenizer.encode("中文,没有空格。" * 2000)


def test_vocabularies_whose_words_are_found_without_recursion_take_any_run(tmp_path):
    with load_tokenizer(write_model(tmp_path / "m.gguf")) as tokenizer:
        assert len(tokenizer.encode("a" * 60_000)) == 60_000
