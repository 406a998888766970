"""The table of controls, the presets, and how both are named on a command line.

A control is added by adding a file and a line in `CONTROLS`, which is also the order in which controls act.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Texts
from dataclasses import asdict, dataclass, fields, replace

from ..errors import ControlError
from .budget import BudgetForcing, BudgetParameters
from .control import Control, Parameters, Setup
from .hint import ConciseHint, HintParameters
from .search import FirstFinishSearch, SearchParameters
from .suppress import ReflectionSuppression, SuppressParameters

__all__ = ["CONTROLS", "PRESETS", "Control", "Parameters", "Preset", "Setup", "combine", "describe", "parse"]

CONTROLS: dict[str, type[Control]] = {
    "budget": BudgetForcing,
    "hint": ConciseHint,
    "suppress": ReflectionSuppression,
    "search": FirstFinishSearch,
}


@dataclass(frozen=True, slots=True)
class Preset:
    """A named choice of controls; each has a hard cap, for some prompts draw thinking without end."""

    name: str
    summary: str
    controls: tuple[Parameters, ...]


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("safe", "a hard cap only", (BudgetParameters(),)),
        Preset("fast", "fewer reflections once the answer is certain", (BudgetParameters(), SuppressParameters())),
        Preset("concise", "hints to be concise", (BudgetParameters(), HintParameters(prompt=True))),
        Preset("careful", "one end of thinking is ignored", (BudgetParameters(max=32768, ignore=1, repeat=64),)),
        Preset("parallel", "four samples vote", (BudgetParameters(), SearchParameters(rule="majority"))),
    )
}


def parse(text: str) -> Parameters:
    """Parameters from `name` or `name:key=value,key=value`. Raises ControlError naming what is wrong."""
    return _update(*_split(text))


def combine(preset: str | None, texts: Texts[str], insist: bool = False) -> tuple[Parameters, ...]:
    """A preset's controls with those of `texts` added or changed, in the order of `CONTROLS`.

    Raises ControlError for unknown names, a control named twice, and for controls that contradict each other unless
    `insist`.
    """
    chosen: dict[str, Parameters] = {}
    if preset is not None:
        if preset not in PRESETS:
            raise ControlError(f"there is no preset {preset!r}; choose one of {', '.join(PRESETS)}")
        chosen = {parameters.control: parameters for parameters in PRESETS[preset].controls}
    named = set()
    for text in texts:
        name, values = _split(text)
        if name in named:
            raise ControlError(f"the control {name!r} is named twice; join its parameters with commas")
        named.add(name)
        chosen[name] = _update(name, values, chosen.get(name))
    ordered = tuple(chosen[name] for name in CONTROLS if name in chosen)
    if not insist:
        _refuse_contradictions(ordered)
    return ordered


def describe(parameters: Parameters) -> dict[str, object]:
    """A control's name and parameters, as results store them."""
    return {"control": parameters.control, **asdict(parameters)}


def _split(text: str) -> tuple[str, dict[str, str]]:
    name, _, rest = text.partition(":")
    if name not in CONTROLS:
        raise ControlError(f"there is no control {name!r}; choose one of {', '.join(CONTROLS)}")
    values: dict[str, str] = {}
    texts = {item.name for item in fields(CONTROLS[name].Parameters) if isinstance(item.default, str)}
    last = ""
    for pair in rest.split(","):
        key, equals, value = pair.partition("=")
        if last in texts and not (equals and key.strip().isidentifier()):
            values[last] += f",{pair}"  # a comma of the text's own
            continue
        if not pair:
            continue
        if not equals:
            raise ControlError(f"{name}: {pair!r} is not of the form parameter=value")
        last = key.strip()
        if last in values:
            raise ControlError(f"{name}: {last} is given twice; give it once")
        values[last] = value
    return name, values


def _update(name: str, values: dict[str, str], base: Parameters | None = None) -> Parameters:
    base = base or CONTROLS[name].Parameters()
    known = {item.name: getattr(base, item.name) for item in fields(base)}
    changed = {}
    for key, text in values.items():
        if key not in known:
            raise ControlError(f"{name} has no parameter {key!r}; it has {', '.join(known)}")
        changed[key] = _value(name, key, text, known[key])
    return replace(base, **changed)


def _value(name: str, key: str, text: str, like: object) -> object:
    """The text as a value of the type of `like`."""
    if isinstance(like, bool):
        words = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if text.lower() not in words:
            raise ControlError(f"{name}: {key} is {text!r}; give yes or no")
        return words[text.lower()]
    if isinstance(like, int | float):
        try:
            return type(like)(text)
        except ValueError as error:
            kind = "a whole number" if isinstance(like, int) else "a number"
            raise ControlError(f"{name}: {key} is {text!r}; give {kind}") from error
    return text


def _refuse_contradictions(controls: Iterable[Parameters]) -> None:
    chosen = {parameters.control: parameters for parameters in controls}
    budget = chosen.get("budget")
    if isinstance(budget, BudgetParameters) and (budget.ignore or budget.min):
        longer = "ignore" if budget.ignore else "min"
        for name in ("suppress", "hint"):
            if name in chosen:
                raise ControlError(
                    f"budget:{longer}={getattr(budget, longer)} lengthens the thinking and {name} shortens it; "
                    f"drop one of them, or insist"
                )
