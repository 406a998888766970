"""Texts that a model is measured or calibrated on: its own replies with their thinking, or any text."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ..runtime.errors import InputError
from ..runtime.formats import FORMATS
from ..runtime.llama import LlamaTokenizer
from ..runtime.phase import PhaseTracker
from ..runtime.prompt import Prompter, encode
from ..runtime.sequence import Phase
from ..runtime.template import Message, Part

_PIECE_CHARACTERS = 1 << 16


@dataclass(frozen=True, slots=True)
class Trace:
    """One reply with its thinking. `problem` is empty where it is not known; `is_thinking` and `format` are what its
    recipe said of the prompt."""

    problem: str
    thinking: str
    text: str
    is_thinking: bool = True
    format: str | None = None


def read_traces(data: str, name: str) -> list[Trace]:
    """The replies in a results file of `localreason solve` or `eval`, those that failed apart. Raises InputError."""
    found = []
    for number, line in enumerate(data.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if "header" in row:  # of an evaluation
                continue
            parts = [row.get("problem") or "", row["thinking"], row["text"]]
            recipe = row.get("recipe") or {}
            is_thinking, format = recipe.get("is_thinking", True) is not False, recipe.get("format")
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{name} line {number} is not a result with `thinking` and `text`; "
                f"give a file that `localreason solve -o` wrote"
            ) from error
        if not all(isinstance(part, str) for part in parts):
            raise InputError(f"{name} line {number} has a `thinking` or `text` that is no text; correct it")
        if parts[1] or parts[2]:
            found.append(Trace(parts[0], parts[1], parts[2], is_thinking, format if format in tuple(FORMATS) else None))
    if not found:
        raise InputError(f"{name} holds no reply with a text; give results of problems that were solved")
    return found


def read_text(path: Path) -> str:
    """A text that is not empty. Raises InputError."""
    try:
        text = path.read_text("utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"there is no file {path}; give a text in UTF-8") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; give a text in UTF-8") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 at byte {error.start + 1}; save it as UTF-8") from error
    if not text.strip():
        raise InputError(f"{path} is empty; give a text of some hundred words or more")
    return text


def read_documents(path: Path) -> list[Trace] | list[str]:
    """The replies of a results file (`.jsonl`), or a text in pieces for the tokenizer. Raises InputError."""
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        return read_traces(text, str(path))
    return [text[i : i + _PIECE_CHARACTERS] for i in range(0, len(text), _PIECE_CHARACTERS)]


def trace_encoder(tokenizer: LlamaTokenizer) -> Callable[[Trace], list[int]]:
    """A function that gives what the model saw and wrote: prompt where it is known, thinking between its marks,
    answer; without what every prompt begins with. The examples that lead a model to think stand before the first reply
    only: before each one they would be most of what is looked at."""
    prompter, n_prefix = Prompter(tokenizer, tokenizer), len(tokenizer.prefix)
    has_led = False

    def encode_trace(trace: Trace) -> list[int]:
        nonlocal has_led
        format = prompter.format(trace.format, trace.is_thinking)
        prompt, tail = list(tokenizer.prefix), ""
        if trace.problem:
            shown = replace(format, is_prompted=format.is_prompted and not has_led)
            turns = [Message("user", trace.problem)]
            made = prompter.continue_chat(turns, shown, trace.is_thinking, is_problem=not format.is_prompted)
            prompt, tail, has_led = made.tokens, made.tail, has_led or format.is_prompted
        is_open = PhaseTracker(format, tail).phase is Phase.THINK
        parts = [Part(trace.text, False)]
        if trace.thinking or is_open:
            parts = [Part(trace.thinking, False), Part(format.close, True), *parts]
            if not is_open:
                parts.insert(0, Part(format.open, True))
        reply = encode([part for part in parts if part.text], tokenizer, format, tail if trace.problem else None)
        return prompt[n_prefix:] + (reply if trace.problem else reply[n_prefix:])

    return encode_trace
