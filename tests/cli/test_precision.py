"""`solve` warns in one line of precision that is known to hurt, and of nothing else."""

import subprocess

import pytest

from tests.cluster.processes import RUN
from tests.gguf_models import write_model


@pytest.mark.parametrize(
    ("template", "flags", "is_warned"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", [], True),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ["--think"], False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ["--no-think"], False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", ["--format", "think"], False),
        ("{% for m in messages %}{{ m.content }}{% endfor %}<think>", [], False),
    ],
)
def test_a_model_that_is_led_to_think_unasked_is_told_of(tmp_path, template, flags, is_warned):
    made = {"llama.context_length": 4096, "tokenizer.chat_template": template}
    model = write_model(tmp_path / "tiny.gguf", values=made)
    command = [*RUN, "solve", "What is 2 + 3?", "--model", str(model), "--max-tokens", "4", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert ("--no-think asks plainly" in done.stderr) == is_warned


@pytest.mark.parametrize(("cache_type", "is_warned"), [("f16", False), ("q4_0", True)])
def test_a_four_bit_cache_on_a_small_model_is_warned_of(tmp_path, cache_type, is_warned):
    model = write_model(tmp_path / "tiny.gguf", values={"llama.context_length": 4096})
    command = [*RUN, "solve", "What is 2 + 3?", "--model", str(model), "--max-tokens", "4", "--cache-type", cache_type]
    command.append("--think")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("localreason:")]
    assert len(lines) == is_warned
    assert all("cache" in line for line in lines)
    assert "localreason:" not in subprocess.run([*command, "-q"], capture_output=True, text=True, timeout=60).stderr


def test_all_that_is_known_against_a_choice_is_in_the_line(tmp_path):
    made = {"llama.context_length": 4096, "localreason.convert.source_scheme": "Q4_0"}
    model = write_model(tmp_path / "tiny.gguf", values=made)
    command = [*RUN, "solve", "What is 2 + 3?", "--model", str(model), "--max-tokens", "4", "--cache-type", "q4_0"]
    done = subprocess.run([*command, "-p", "fast"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.startswith("localreason:")]
    for words in ("weights in 4 bits", "a q4_0 cache", "the certainty that suppress goes by was tuned at 16 bits"):
        assert words in line
