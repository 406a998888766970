"""From a question to prompt tokens: messages, chat template, tokens in which a user's text is only text."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import groupby, pairwise
from typing import Protocol

from .errors import TemplateError
from .formats import FORMATS, ThinkingFormat, detect, find_format, strip_thinking
from .phase import PhaseTracker
from .sequence import Phase
from .template import Message, Part, render
from .tokenizer import Tokenizer

_BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
_DEEPEST_BRANCH = 50
"""Beginnings that are shared within each other, above which texts are tried one by one."""
_SYSTEM = (
    "You are a careful problem solver. First think inside <think> and </think>: work step by step, check your result "
    "once, and correct it if it is wrong. Then answer in one or two sentences with the final answer in \\boxed{}."
)
_EXAMPLES = (
    (
        "A box holds 6 red pens and twice as many blue pens. Nine pens are taken out. How many are left?",
        "<think>\nThere are 6 red pens and 2 * 6 = 12 blue pens, so 6 + 12 = 18 pens.\n\nNine are taken out: "
        "18 - 9 = 9.\n\nWait, does twice as many refer to the red ones? Yes, 12 blue pens, so 18 in all and 9 left.\n"
        "</think>\n\nThere are 18 pens at first and 9 are left: \\boxed{9}",
    ),
    (
        "A train covers 150 km in 2.5 hours. How far does it go in 4 hours at the same speed?",
        "<think>\nThe speed is 150 / 2.5 = 50 km per hour.\n\nIn 4 hours it covers 4 * 50 = 200 km.\n\n"
        "Wait, let me check the division: 2.5 * 60 = 150, so the speed is 60 km per hour, and 4 * 60 = 240 km.\n"
        "</think>\n\nAt 60 km per hour the train goes 240 km: \\boxed{240}",
    ),
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the text behind the last message: where the model's reply begins, perhaps inside a tag."""

    tokens: list[int]
    tail: str


class _Vocabulary(Tokenizer, Protocol):
    prefix: list[int]

    @property
    def control_texts(self) -> Collection[str]: ...


class _Source(Protocol):
    """What a file says about prompts."""

    @property
    def chat_template(self) -> str | None: ...

    @property
    def metadata(self) -> dict[str, str]: ...

    @property
    def template_tokens(self) -> dict[str, str]: ...


class Prompter:
    """Makes the prompts of one model."""

    def __init__(self, source: _Source, tokenizer: _Vocabulary) -> None:
        self._template = source.chat_template
        self._template_tokens = source.template_tokens
        self._detected = detect(self._template, source.metadata)
        self._tokenizer = tokenizer

    def format(self, name: str | None, is_thinking: bool) -> ThinkingFormat:
        """The format of that name, or the detected one; none where thinking is off and nothing marks it."""
        format = find_format(name) if name else self._detected
        return FORMATS["none"] if not is_thinking and format.is_prefilled else format

    def continue_chat(
        self, turns: list[Message], format: ThinkingFormat, is_thinking: bool = True, is_problem: bool = True
    ) -> Prompt:
        """The prompt for the next reply to a conversation; thinking in earlier replies is left out. A boxed answer is
        asked for only where the last turn is a problem."""
        turns = [
            Message(turn.role, strip_thinking(turn.content, format)) if turn.role == "assistant" else turn
            for turn in turns
        ]
        if format.is_prompted:
            examples = [
                Message(role, text)
                for pair in _EXAMPLES
                for role, text in zip(("user", "assistant"), pair, strict=True)
            ]
            has_system = turns[0].role == "system"  # templates take one system turn only
            system = f"{_SYSTEM}\n\n{turns[0].content}" if has_system else _SYSTEM
            turns = [Message("system", system), *examples, *turns[has_system:]]
        elif is_problem and turns[-1].role == "user":
            turns = [*turns[:-1], Message("user", f"{turns[-1].content}\n\n{_BOXED}")]
        parts = self._render(turns, is_thinking)
        tail = parts[-1].text if parts[-1].is_trusted else ""
        if format.is_prefilled and is_thinking and format.opens[0] not in tail:
            parts.append(Part(format.open, True))
            tail += format.open
        elif not is_thinking and PhaseTracker(format, tail).phase is Phase.THINK:
            parts.append(Part(format.close, True))  # the template opens the thinking whatever it is told
            tail += format.close
        return Prompt(encode(parts, self._tokenizer, format), tail)

    def _render(self, turns: list[Message], is_thinking: bool) -> list[Part]:
        try:
            return render(self._template, turns, self._template_tokens, is_thinking)
        except TemplateError:
            if turns[0].role != "system" or not self._template:
                raise
            # Some templates refuse a system turn; its text then leads the first user's, or is the first user's.
            text, rest = turns[0].content, turns[1:]
            if rest and rest[0].role == "user":
                text, rest = f"{text}\n\n{rest[0].content}", rest[1:]
            return render(self._template, [Message("user", text), *rest], self._template_tokens, is_thinking)


@lru_cache(maxsize=8)
def _finder(texts: frozenset[str]) -> re.Pattern[str] | None:
    """Finds any of the texts, the longest of those that begin at a place."""
    return re.compile(_either(sorted(texts))) if texts else None


def _either(texts: list[str], depth: int = 0) -> str:
    """A pattern of any of the texts that looks at one branch only: Gemma has 6000 that begin with `<`, and a message
    full of these would be tried with each."""
    if depth > _DEEPEST_BRANCH or len(texts) < 2:
        return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))
    branches = []
    for first, group in groupby(texts, lambda text: text[:1]):
        rests = list(group)
        if first:
            pairs = zip(rests[0], rests[-1], strict=False)  # they are sorted: all share what these two do
            shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(rests[0]), len(rests[-1])))
            branches.append(f"{re.escape(rests[0][:shared])}(?:{_either([r[shared:] for r in rests], depth + 1)})")
    return "|".join(branches) + ("|" if "" in texts else "")


def encode(parts: list[Part], tokenizer: _Vocabulary, format: ThinkingFormat, behind: str | None = None) -> list[int]:
    """Token ids of a rendered prompt, BOS in front where the model wants one and the template wrote none; or of what
    comes behind a text of the template's.

    A prompt without any special text in its messages is tokenised in one piece, as llama.cpp would. Otherwise each
    message is tokenised as plain text, and special text in it is cut in two, since user-defined tokens such as
    `<think>` are recognised even in plain text.
    """
    marks = tuple(tokenizer.control_texts)
    # SentencePiece puts its space behind a control token too.
    is_first = behind is None or behind.endswith(marks)
    found = _finder(frozenset({*tokenizer.control_texts, *format.opens, *format.closes} - {""}))
    if found is None or not any(found.search(part.text) for part in parts if not part.is_trusted):
        ids = tokenizer.encode("".join(part.text for part in parts), special=True, is_first=is_first)
    else:
        ids = []
        pieces = cache(tokenizer.encode)  # llama.cpp takes 0.05 ms for each, and a message of tags has 100,000
        for part in parts:
            if part.is_trusted:
                ids += tokenizer.encode(part.text, special=True, is_first=is_first)
                is_first = part.text.endswith(marks)
                continue
            cuts = [0, *(match.start() + 1 for match in found.finditer(part.text)), len(part.text)]
            for start, end in pairwise(cuts):
                ids += pieces(part.text[start:end], is_first=is_first)
                is_first = is_first and start == end
    prefix = tokenizer.prefix if behind is None else []
    return ids if not prefix or ids[: len(prefix)] == prefix else [*prefix, *ids]
