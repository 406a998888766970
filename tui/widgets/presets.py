"""How the model thinks: presets and controls, each with what it does and where it comes from."""

from dataclasses import fields

from ...runtime.controls import CONTROLS, PRESETS, describe
from ...runtime.recipe import Recipe
from .chooser import Choice, Chooser

PRESET, CONTROL = "preset:", "control:"


class Presets(Chooser):
    """Gives `preset:NAME` or `control:NAME`, or None."""

    def __init__(self, preset: str, recipe: Recipe) -> None:
        choices = [Choice("", "Presets")]
        choices += [
            Choice(PRESET + one.name, one.name, one.summary, " ".join(map(_text, one.controls)))
            for one in PRESETS.values()
        ]
        choices.append(Choice("", "Controls, on top of the preset"))
        for name, control in CONTROLS.items():
            chosen = recipe.get(name)
            sign = f"on   {control.summary}" if chosen else f"off  {control.summary}"
            choices.append(Choice(CONTROL + name, name, sign, f"{explain(name)}"))
        super().__init__(
            "How it thinks", choices, PRESET + preset, "Enter takes a preset or sets a control · Esc leaves"
        )


def explain(name: str) -> str:
    """A control's parameters with what they do, and its source."""
    control = CONTROLS[name]
    lines = [f"{item.name}: {item.metadata['help']}" for item in fields(control.Parameters)]
    return "\n".join([*lines, f"source: {control.source}"])


def _text(parameters: object) -> str:
    from ...runtime.controls import Parameters

    assert isinstance(parameters, Parameters)
    values = describe(parameters)
    default = describe(CONTROLS[parameters.control].Parameters())
    changed = ",".join(f"{key}={value}" for key, value in values.items() if value != default[key])
    return f"{parameters.control}:{changed}" if changed else parameters.control
