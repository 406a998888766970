"""What a request to the server may say: JSON of any shape in, a checked `Wanted` out, or `Refused`."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..runtime.controls import CONTROLS, PRESETS, Parameters, combine
from ..runtime.controls.budget import BudgetParameters
from ..runtime.errors import ControlError
from ..runtime.model import Recipe
from ..runtime.sampler import Sampling
from ..runtime.template import Message
from .server_field import Refused, flag, mapping, number, whole
from .server_grammar import answer_rules

EFFORTS: Mapping[str, int | None] = {"none": 0, "minimal": 128, "low": 512, "medium": 2048, "high": None, "xhigh": None}
"""`reasoning_effort` as most thinking tokens; None stands for the server's cap, and "none" turns thinking off."""
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MOST_MESSAGES, _MOST_STOPS, _MOST_STOP, _MOST_CONTROLS, _MOST_CONTROL = 2048, 16, 256, 16, 256
_MOST_TOP, _MOST_TOP_TEXT = 20, 5
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "modalities": (["text"], []),
    "audio": (),
    "web_search_options": (),
    "echo": (False,),
    "suffix": ("",),
}
"""What this server does not do, and the values that ask for nothing."""
_KNOWN = frozenset(
    {"model", "messages", "prompt", "stream", "stream_options", "n", "best_of", "seed", "stop", "temperature", "top_p"}
    | {"top_k", "min_p", "max_tokens", "max_completion_tokens", "logprobs", "top_logprobs", "reasoning_effort"}
    | {"response_format", "localreason", *_NEUTRAL}
)
_LEAST_THINKING = 16
"""A reply that has no room for as many thinking tokens goes without."""
_OWN = ("budget", "preset", "controls", "search", "think")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the server grants at most, and what holds where a request says nothing."""

    recipe: Recipe
    """The server's own; its `limit` and `max_thinking` bound every request."""
    max_tokens: int
    max_thinking: int
    preset: str | None = None
    controls: tuple[str, ...] = ()
    n_sequences: int = 16
    """Most sequences of one request: choices times samples."""
    n_vocab: int = 1 << 31
    n_closing: int = 0
    """Tokens that a cut writes: the end of the thinking and the lead to the answer."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A checked request. Exactly one of `turns` and `prompt` is given."""

    recipe: Recipe
    turns: tuple[Message, ...] = ()
    prompt: str | tuple[int, ...] = ""
    n: int = 1
    stop: tuple[str, ...] = ()
    is_stream: bool = False
    has_usage: bool = False
    n_top: int | None = None
    """Alternatives to report beside each token's log-probability; None for no log-probabilities."""
    ignored: tuple[str, ...] = ()
    rules: str | None = None
    """The grammar that the answer has to follow, in GBNF."""

    @property
    def is_chat(self) -> bool:
        return bool(self.turns)

    @property
    def n_sequences(self) -> int:
        return self.n * self.recipe.n_samples


def parse_chat(body: Mapping[str, Any], limits: Limits) -> Wanted:
    """A request to /v1/chat/completions. Raises Refused."""
    turns = _turns(body.get("messages"))
    has_logprobs = flag(body, "logprobs")
    n_top = whole(body, "top_logprobs", 0, _MOST_TOP)
    if n_top is not None and not has_logprobs:
        raise Refused("top_logprobs needs logprobs: true", "top_logprobs")
    wanted = _shared(body, limits, "max_completion_tokens")
    recipe, rules = wanted.recipe, answer_rules(body.get("response_format"))
    if rules is not None:
        recipe = replace(recipe, controls=tuple(map(_without_lead, recipe.controls)))
    return replace(wanted, recipe=recipe, rules=rules, turns=turns, n_top=(n_top or 0) if has_logprobs else None)


def parse_completion(body: Mapping[str, Any], limits: Limits) -> Wanted:
    """A request to /v1/completions. Raises Refused."""
    prompt = _prompt(body.get("prompt"), limits.n_vocab)
    if answer_rules(body.get("response_format")) is not None:
        raise Refused("response_format is for chats only; use /v1/chat/completions", "response_format")
    wanted = _shared(body, limits, "max_tokens")
    best_of = whole(body, "best_of", 1, limits.n_sequences)
    if best_of not in (None, wanted.n):
        raise Refused(f"best_of is {best_of} and n is {wanted.n}; leave best_of out", "best_of")
    n_top = None if body.get("logprobs") is False else whole(body, "logprobs", 0, _MOST_TOP_TEXT)
    return replace(wanted, prompt=prompt, n_top=n_top)


def _shared(body: Mapping[str, Any], limits: Limits, limit_name: str) -> Wanted:
    """What both endpoints have in common."""
    for name, neutral in _NEUTRAL.items():
        if body.get(name) is not None and body[name] not in neutral:
            raise Refused(f"{name} is not supported by this server; leave it out", name, code="unsupported_parameter")
    if not isinstance(body.get("model", ""), str | None):
        raise Refused("model is not a text", "model")
    n = whole(body, "n", 1, limits.n_sequences) or 1
    recipe = _recipe(body, limits, limit_name)
    if n * recipe.n_samples > limits.n_sequences:
        raise Refused(
            f"n is {n} with {recipe.n_samples} samples each, and this server runs {limits.n_sequences} sequences of "
            f"one request at most; lower n or search:n",
            "n",
        )
    options = mapping(body, "stream_options")
    return Wanted(
        recipe=recipe,
        n=n,
        stop=_stops(body.get("stop")),
        is_stream=flag(body, "stream"),
        has_usage=flag(options, "include_usage"),
        ignored=tuple(sorted(name[:64] for name in body if name not in _KNOWN))[:32],
    )


def _recipe(body: Mapping[str, Any], limits: Limits, limit_name: str) -> Recipe:
    """The server's recipe with what the request changes, within the server's limits."""
    base, own = limits.recipe, mapping(body, "localreason")
    for name in own:
        if name not in _OWN:
            raise Refused(f"localreason has no {name[:64]!r}; it has {', '.join(_OWN)}", "localreason")
    given = {name: whole(body, name, 1, 2**31 - 1) for name in ("max_completion_tokens", "max_tokens")}
    max_tokens = given[limit_name] or given["max_tokens"] or given["max_completion_tokens"] or limits.max_tokens
    max_tokens = min(max_tokens, limits.max_tokens)
    effort = body.get("reasoning_effort")
    if effort is not None and (not isinstance(effort, str) or effort not in EFFORTS):
        raise Refused(f"reasoning_effort is none of {', '.join(EFFORTS)}", "reasoning_effort")
    wanted = whole(own, "budget", 0, 2**31 - 1, "localreason.budget")
    wanted = wanted if wanted is not None or effort is None else EFFORTS[effort]
    n_room = _room_to_think(max_tokens, limits)
    cap = min(limits.max_thinking, n_room, *(() if wanted is None else (wanted,)))
    controls = _capped(_controls(own, limits), cap)
    seed = whole(body, "seed", -(2**63), 2**63 - 1)
    top_k, sampling = whole(body, "top_k", 0, 2**31 - 1), base.sampling
    return replace(
        base,
        controls=controls if n_room else tuple(map(_without_lead, controls)),
        sampling=Sampling(
            number(body, "temperature", 0, 2, sampling.temperature),
            number(body, "top_p", 0, 1, sampling.top_p),
            sampling.top_k if top_k is None else top_k,
            number(body, "min_p", 0, 1, sampling.min_p),
        ),
        seed=secrets.randbelow(2**63) if seed is None else seed % 2**63,
        max_tokens=max_tokens,
        is_thinking=flag(own, "think", base.is_thinking and effort != "none") and n_room > 0,
    )


def _room_to_think(max_tokens: int, limits: Limits) -> int:
    """Three quarters of what a cut leaves of a reply, for the rest is the answer's; 0 where that is too little."""
    n_room = (max_tokens - limits.n_closing) * 3 // 4
    return n_room if n_room >= _LEAST_THINKING else 0


def _controls(own: Mapping[str, Any], limits: Limits) -> tuple[Parameters, ...]:
    preset, texts = own.get("preset"), own.get("controls")
    if preset is not None and (not isinstance(preset, str) or preset not in PRESETS):
        raise Refused(f"localreason.preset is none of {', '.join(PRESETS)}", "localreason.preset")
    texts = [] if texts is None else texts
    is_list = isinstance(texts, list) and len(texts) <= _MOST_CONTROLS
    if not is_list or not all(isinstance(text, str) and len(text) <= _MOST_CONTROL for text in texts):
        raise Refused(
            f"localreason.controls is not a list of at most {_MOST_CONTROLS} texts such as 'budget:max=512'",
            "localreason.controls",
        )
    texts = [*texts, *_search(own.get("search"))]
    names = {text.partition(":")[0] for text in texts}
    kept = [text for text in limits.controls if text.partition(":")[0] not in names] if preset is None else []
    try:
        return combine(preset or limits.preset, [*kept, *texts])
    except (ControlError, OverflowError) as error:
        raise Refused(str(error), "localreason.controls") from error


def _search(value: Any) -> list[str]:
    """A rule such as "majority", or an object of search's parameters, as the text of a control."""
    if value is None:
        return []
    values = {"rule": value} if isinstance(value, str) else value
    if not isinstance(values, dict) or not all(
        isinstance(item, str | int) and "," not in str(item)[:_MOST_CONTROL] for item in values.values()
    ):
        raise Refused("localreason.search is neither a rule nor an object of search's parameters", "localreason.search")
    text = "search:" + ",".join(f"{key}={item}" for key, item in values.items())
    if len(text) > _MOST_CONTROL:
        raise Refused(f"localreason.search has more than {_MOST_CONTROL} characters", "localreason.search")
    return [text]


def _capped(controls: tuple[Parameters, ...], cap: int) -> tuple[Parameters, ...]:
    """The controls with a budget of at most `cap` thinking tokens, whether or not there was one."""
    budget = next((item for item in controls if isinstance(item, BudgetParameters)), BudgetParameters())
    highest = min(budget.max, cap)
    total = min(budget.total, cap)
    least = min(budget.min, highest, total or highest)
    capped = {item.control: item for item in controls}
    capped["budget"] = replace(budget, max=highest, total=total, min=least)
    return tuple(capped[name] for name in CONTROLS if name in capped)


def _without_lead(parameters: Parameters) -> Parameters:
    """A budget that writes nothing behind the end of the thinking, where the answer is to be of another form."""
    return replace(parameters, lead=False) if isinstance(parameters, BudgetParameters) else parameters


def _turns(messages: Any) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not 1 <= len(messages) <= _MOST_MESSAGES:
        raise Refused(f"messages is not a list of 1 to {_MOST_MESSAGES} messages", "messages")
    turns = tuple(_turn(message, f"messages[{i}]") for i, message in enumerate(messages))
    if not any(turn.role == "user" for turn in turns):
        raise Refused("messages has none of the role user", "messages")
    return turns


def _turn(message: Any, where: str) -> Message:
    role = message.get("role") if isinstance(message, dict) else None
    if not isinstance(role, str) or role not in _ROLES:
        raise Refused(f"{where} has no role of {', '.join(_ROLES)}; tools are not supported", where)
    if message.get("tool_calls") or message.get("function_call"):
        raise Refused(f"{where} calls a tool; tools are not supported", where, code="unsupported_parameter")
    content = message.get("content")
    # What a reply of thinking alone is in some clients' histories.
    content = "" if content is None and role == "assistant" else _text(content)
    if content is None:
        raise Refused(f"{where}.content is neither a text nor a list of parts of the type text", where)
    return Message(_ROLES[role], content)


def _text(content: Any) -> str | None:
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    texts: list[str] = []
    for part in parts if isinstance(parts, list) else [None]:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            return None
        texts.append(text)
    return "".join(texts)


def _prompt(prompt: Any, n_vocab: int) -> str | tuple[int, ...]:
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str | list):
        prompt = prompt[0]
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt and all(type(item) is int and 0 <= item < n_vocab for item in prompt):
        return tuple(prompt)
    raise Refused(f"prompt is neither one text nor one list of token ids from 0 to {n_vocab - 1}", "prompt")


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    is_list = isinstance(stops, list) and len(stops) <= _MOST_STOPS
    if not is_list or not all(isinstance(text, str) and 1 <= len(text) <= _MOST_STOP for text in stops):
        raise Refused(f"stop is not a list of at most {_MOST_STOPS} texts of 1 to {_MOST_STOP} characters", "stop")
    return tuple(stops)
