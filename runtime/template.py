"""Chat templates from model files: untrusted code, rendered in Jinja's sandbox under limits of time and size."""

import json
import secrets
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import FrameType
from typing import Any

import jinja2
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import TemplateError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_MOST_SECONDS = 2.0
_MOST_CHARACTERS = 4_000_000


@dataclass(frozen=True, slots=True)
class Message:
    """One turn; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of a rendered prompt: the template's own text, or a message's, in which nothing is special."""

    text: str
    is_trusted: bool


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) < 1000 and abs(right) < 100):
            raise TemplateError(f"the chat template computes {left} ** {right}; give another template")
        sized = left if hasattr(left, "__len__") else right if hasattr(right, "__len__") else None
        if operator == "*" and sized is not None:
            times = right if sized is left else left
            if len(sized) * times > _MOST_CHARACTERS:
                raise TemplateError(f"the chat template repeats a text {times} times; give another template")
        if operator == "%" and isinstance(left, str):
            raise TemplateError("the chat template formats text with %, which is not allowed; give another template")
        return super().call_binop(context, operator, left, right)


def render(
    template: str | None,
    messages: list[Message],
    tokens: Mapping[str, str] | None = None,
    is_thinking: bool = True,
    now: datetime | None = None,
) -> list[Part]:
    """The prompt of a conversation up to where the model goes on.

    `tokens` are the texts of `bos_token` and `eos_token`. Contents are stood in for by random private-use text while
    the template runs and put back afterwards, so that no template and no message can pass the one off as the other.
    Raises TemplateError for a template that is missing, fails, runs longer than two seconds or loses a message.
    """
    if not template:
        raise TemplateError("the model file has no chat template; name one, such as --template chatml")
    nonce = secrets.token_hex(4)
    marks = [f"\ue000{nonce}:{i}\ue001" for i in range(len(messages))]
    stand_ins = [{"role": message.role, "content": mark} for message, mark in zip(messages, marks, strict=True)]
    values = {
        "messages": stand_ins,
        "add_generation_prompt": True,
        "enable_thinking": is_thinking,
        "bos_token": "",
        "eos_token": "",
        **(tokens or {}),
    }
    text = _run(template, values, now or datetime.now())
    parts: list[Part] = []
    for i, message in enumerate(messages):
        before, mark, text = text.partition(marks[i])
        if not mark:
            raise TemplateError(
                f"the chat template drops or reorders message {i + 1} of {len(messages)} ({message.role}); "
                f"give another template"
            )
        parts += [Part(before, True), Part(message.content, False)]
    if "\ue000" + nonce in text:
        raise TemplateError("the chat template writes a message twice; give another template")
    return [part for part in (*parts, Part(text, True)) if part.text]


def _run(template: str, values: dict[str, Any], now: datetime) -> str:
    environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = now.strftime
    deadline = time.monotonic() + _MOST_SECONDS

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if time.monotonic() > deadline:
            raise TemplateError(f"the chat template ran longer than {_MOST_SECONDS:.0f} s; give another template")
        return watch

    # Only a trace function can end a loop that neither calls nor yields anything.
    before = sys.gettrace()
    sys.settrace(watch)
    try:
        pieces, n = [], 0
        for piece in environment.from_string(template).generate(values):
            pieces.append(piece)
            n += len(piece)
            if n > _MOST_CHARACTERS:
                raise TemplateError(f"the chat template writes more than {_MOST_CHARACTERS} characters")
        return "".join(pieces)
    except TemplateError:
        raise
    except (JinjaError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise TemplateError(f"the chat template fails: {error}; give another template") from error
    except MemoryError as error:
        raise TemplateError("the chat template uses too much memory; give another template") from error
    finally:
        sys.settrace(before)


def _raise(message: str) -> None:
    raise jinja2.exceptions.TemplateRuntimeError(message)
