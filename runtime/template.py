"""Chat templates from model files: untrusted code, rendered in Jinja's sandbox under limits of time and size.

A deadline ends what runs in Python. What Jinja does in one native call cannot be interrupted, so whatever could make
such a call long or large is bounded beforehand: operators, string methods, filters, and what is turned into text.
"""

import json
import re
import secrets
import sys
import time
from collections.abc import ItemsView, Iterable, KeysView, Mapping, ValuesView
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache, wraps
from types import FrameType
from typing import Any, NoReturn

import jinja2
import markupsafe
from jinja2 import filters, nodes, runtime
from jinja2.compiler import CodeGenerator, operators
from jinja2.exceptions import TemplateError as JinjaError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from .errors import TemplateError

_MOST_SECONDS = 2.0
_MOST_CHARACTERS = 1_000_000
"""Of a template, and of any text that it makes; messages do not count, marks stand in for them."""
_MOST_BITS = 20_000
_METHODS = frozenset(
    """
    capitalize count endswith find index isalnum isalpha isdecimal isdigit islower isnumeric isspace istitle
    isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip
    split splitlines startswith strip swapcase title upper
    """.split()  # noqa: SIM905 - thirty lines more as a list
)
"""Methods of strings that a template may call; `format`, `ljust` and the like make text of any length."""
_FILTERS = frozenset(
    """
    abs attr capitalize count d default dictsort first float groupby int items last length list lower map max
    min reject rejectattr reverse safe select selectattr sort title trim truncate unique upper
    """.split()  # noqa: SIM905 - thirty lines more as a list
)
"""Jinja's own filters that need no bound; the others are replaced or refused."""


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


def _refuse(what: str) -> NoReturn:
    raise TemplateError(f"the chat template {what}; take another model")


def _bound(value: Any) -> Any:
    """The value, if its text is not too long: lists that hold each other several times grow without bound."""
    n, rest = 0, [value]
    while rest:
        item = rest.pop()
        if isinstance(item, str):
            n += len(item)
        elif isinstance(item, Namespace):
            _refuse("writes a namespace as text")
        elif isinstance(item, (Mapping, KeysView, ValuesView, ItemsView, list, tuple, set)):
            n += len(item)
            if n <= _MOST_CHARACTERS:
                rest += [*item.keys(), *item.values()] if isinstance(item, Mapping) else list(item)
        n += 1
        if n > _MOST_CHARACTERS:
            _refuse(f"makes a text of more than {_MOST_CHARACTERS} characters")
    return value


def _concat(pieces: Iterable[str]) -> str:
    return "".join(_bound(list(pieces)))


def _replace(text: Any, old: str, new: str, count: int | None = None) -> str:
    text, new = str(_bound(text)), str(_bound(new))
    if len(text) + text.count(old) * len(new) > _MOST_CHARACTERS:
        _refuse(f"makes a text of more than {_MOST_CHARACTERS} characters")
    return text.replace(old, new, -1 if count is None else count)


@jinja2.pass_eval_context
def _join(context: Any, values: Iterable[Any], separator: str = "", attribute: Any = None) -> str:
    values = list(values)
    _bound(values)
    if len(values) * len(separator) > _MOST_CHARACTERS:
        _refuse(f"makes a text of more than {_MOST_CHARACTERS} characters")
    return filters.sync_do_join(context, values, separator, attribute)


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    if (width if isinstance(width, int) else len(width)) > 64:
        _refuse(f"indents by {width}")
    return filters.do_indent(text, width, first, blank)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Hugging Face has it: no escapes for HTML, which Jinja's own filter makes."""
    if indent is not None and indent > 64:
        _refuse(f"indents by {indent}")
    return json.dumps(
        _bound(value), ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@jinja2.pass_environment
def _sum(environment: Any, values: Iterable[Any], attribute: Any = None, start: Any = 0) -> Any:
    if not isinstance(start, (int, float)):
        _refuse("sums up what are no numbers")
    return filters.sync_do_sum(environment, values, attribute, start)


def _bounded(function: Any) -> Any:
    """A filter or a test that is given nothing that would take it long to compare or to hash."""

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        _bound_all(arguments)
        return function(*arguments, **named)

    return call


def _bound_all(arguments: Iterable[Any]) -> None:
    for value in arguments:
        if not isinstance(value, (Namespace, runtime.Context)):
            _bound(value)


def _refused_filter(name: str) -> Any:
    def refused(*arguments: Any, **named: Any) -> NoReturn:
        _refuse(f"uses the filter {name}, which is not allowed")

    return refused


def _raise(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateRuntimeError(message)


class _Generator(CodeGenerator):
    """Bounds what is compared or hashed: that is one native call, however deep the lists are."""

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        self.write("(")
        self._write_bounded(node.expr, frame)
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Any) -> None:
        self.write(f" {operators[node.op]} ")
        self._write_bounded(node.expr, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self.write("{")
        for item in node.items:
            self._write_bounded(item.key, frame)
            self.write(": ")
            self.visit(item.value, frame)
            self.write(", ")
        self.write("}")

    def _write_bounded(self, node: nodes.Node, frame: Any) -> None:
        self.write("environment.bound(")
        self.visit(node, frame)
        self.write(")")


class _Generation(Extension):
    """Hugging Face's `{% generation %}`, which marks what a model wrote, for training, and changes nothing."""

    tags: set[str] = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%", "//", "/"})
    code_generator_class = _Generator
    bound = staticmethod(_bound)
    concat = staticmethod(_concat)  # pyright: ignore[reportAssignmentType]

    def __init__(self) -> None:
        extensions = ["jinja2.ext.loopcontrols", _Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, finalize=_bound)
        self.filters = {
            name: _bounded(filter) if name in _FILTERS else _refused_filter(name)
            for name, filter in self.filters.items()
        }
        self.tests = {name: _bounded(test) for name, test in self.tests.items()}
        self.filters |= {
            "tojson": _tojson,
            "join": _join,
            "replace": _replace,
            "indent": _indent,
            "sum": _bounded(_sum),
        }
        self.filters |= {"string": lambda value: str(_bound(value))}
        self.filters |= dict.fromkeys(("e", "escape", "forceescape"), lambda value: markupsafe.escape(_bound(value)))
        del self.globals["lipsum"]
        self.globals["raise_exception"] = _raise

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) < 1000 and abs(right) < 100):
            _refuse(f"computes {left} ** {right}")
        if operator == "%" and isinstance(left, str):
            _refuse("formats text with %, which is not allowed")
        sizes = [len(item) for item in (left, right) if hasattr(item, "__len__")]
        if operator == "+" and sum(sizes) > _MOST_CHARACTERS:
            _refuse(f"makes a text of more than {_MOST_CHARACTERS} characters")
        n_bits = sum(item.bit_length() for item in (left, right) if isinstance(item, int))
        if operator != "+" and n_bits > _MOST_BITS:
            _refuse(f"computes with more than {_MOST_BITS} bits")
        if operator == "*" and len(sizes) == 2:
            _refuse("multiplies two texts or lists")
        if operator == "*" and sizes and sizes[0] * (right if hasattr(left, "__len__") else left) > _MOST_CHARACTERS:
            _refuse("repeats a text too often")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> None:
        """Nothing: a format decides by itself how long its text becomes, so `is_safe_attribute` refuses it."""
        return

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, str):
            return attr in _METHODS
        return not isinstance(obj, (int, float)) and super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, _bound(argument))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        given = {key: value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")}  # Jinja's own
        if isinstance(owner, str) and name == "replace":
            return _replace(owner, *args, **given)
        if isinstance(owner, str) and name == "join":
            return _join(context.eval_ctx, *args, separator=owner, **given)
        owners = [owner] if isinstance(owner, (list, tuple, Mapping)) else []
        _bound_all([*owners, *args, *given.values()])
        return super().call(context, obj, *args, **kwargs)


_ENVIRONMENT = _Environment()
_JOINING = (runtime.str_join.__code__, runtime.markup_join.__code__, markupsafe.soft_str.__code__)
"""Functions behind `~` and most string filters, which no hook of Jinja's lets us bound."""


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
        raise TemplateError("the model file has no chat template; take an instruct model")
    nonce = secrets.token_hex(4)
    stand_ins = [{"role": message.role, "content": f"\ue000{nonce}:{i}\ue001"} for i, message in enumerate(messages)]
    values = {
        "messages": stand_ins,
        "add_generation_prompt": True,
        "enable_thinking": is_thinking,
        "thinking": is_thinking,
        "bos_token": "",
        "eos_token": "",
        **(tokens or {}),
        "strftime_now": (now or datetime.now()).strftime,
    }
    pieces = re.split(f"\ue000{nonce}:(\\d+)\ue001", _run(template, values))
    # Some templates move a message, such as the system's to the last user's turn: any order will do.
    written = [int(i) for i in pieces[1::2]]
    for i, message in enumerate(messages):
        if written.count(i) != 1:
            done = "writes twice" if i in written else "drops"
            _refuse(f"{done} message {i + 1} of {len(messages)} ({message.role})")
    if any(nonce in text or "\ue000" in text for text in pieces[::2]):
        _refuse("cuts a message into pieces")
    parts = [Part(messages[int(text)].content, False) if i % 2 else Part(text, True) for i, text in enumerate(pieces)]
    return [part for part in parts if part.text]


@lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    if len(template) > _MOST_CHARACTERS:
        _refuse(f"has {len(template)} characters, above {_MOST_CHARACTERS}")
    return _ENVIRONMENT.from_string(template)


def _run(template: str, values: dict[str, Any]) -> str:
    deadline = 0.0

    def watch(frame: FrameType, event: str, argument: Any) -> Any:
        if event == "call" and frame.f_code in _JOINING:
            _bound(list(frame.f_locals.values()))
        if time.monotonic() > deadline:
            _refuse(f"ran longer than {_MOST_SECONDS:.0f} s")
        return watch

    before = sys.gettrace()
    try:
        compiled = _compile(template)
        deadline = time.monotonic() + _MOST_SECONDS
        # Only a trace function can end a loop that neither calls nor yields anything.
        sys.settrace(watch)
        return _join_output(compiled.generate(values))
    except (JinjaError, ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
        raise TemplateError(f"the chat template fails: {error}; take another model") from error
    except (RuntimeError, SystemError, SyntaxError, AssertionError) as error:  # too deep, or too many nested blocks
        raise TemplateError(f"the chat template cannot be run: {error}; take another model") from error
    except MemoryError as error:
        raise TemplateError("the chat template uses too much memory; take another model") from error
    finally:
        sys.settrace(before)


def _join_output(pieces: Iterable[str]) -> str:
    kept, n = [], 0
    for piece in pieces:
        kept.append(piece)
        n += len(piece)
        if n > _MOST_CHARACTERS:
            _refuse(f"writes more than {_MOST_CHARACTERS} characters")
    return "".join(kept)
