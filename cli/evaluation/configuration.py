"""Configurations that are compared: a name and the recipe behind it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ...runtime.controls import CONTROLS
from ...runtime.errors import ControlError
from .. import build
from ..config import Config

if TYPE_CHECKING:
    from ...runtime.recipe import Recipe

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_JOINT = re.compile(rf"\+(?=(?:{'|'.join(CONTROLS)})(?:[:+]|$))")
SEED_STEP = 64
"""Seeds of two repeats are this far apart: a question has as many samples at most, each with a seed of its own."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """A recipe that is measured under a name."""

    name: str
    recipe: "Recipe"

    def repeat(self, number: int) -> "Recipe":
        """The recipe of one of several repeats: the same in all but the seed."""
        return replace(self.recipe, seed=self.recipe.seed + number * SEED_STEP)


def make_configurations(
    config: Config, presets: Sequence[str], texts: Sequence[str], is_insisting: bool
) -> list[Configuration]:
    """One for each preset, then those of `texts`, `NAME=PRESET+CONTROL:KEY=VALUE,...+...`; controls of the settings are
    put on top of each preset. The settings' own preset where neither names any. Raises ControlError."""
    parts = [(preset, preset, ()) for preset in presets] + [_split(text) for text in texts]
    if not parts:
        parts = [(config.settings.preset, config.settings.preset, ())]
    found: dict[str, Configuration] = {}
    for name, preset, controls in parts:
        if name in found:
            raise ControlError(f"two configurations are named {name!r}; name them with --config NAME=PRESET+CONTROL")
        settings = replace(config.settings, preset=preset, controls=_join((*config.settings.controls, *controls)))
        found[name] = Configuration(name, build.make_recipe(Config(settings, config.origins), is_insisting))
    return list(found.values())


def _join(controls: Sequence[str]) -> tuple[str, ...]:
    """Parameters of the same control in one text; of the same parameter what a configuration says itself, which comes
    last."""
    found: dict[str, dict[str, str]] = {}
    for control in controls:
        name, _, values = control.partition(":")
        pairs = filter(None, values.split(","))
        found.setdefault(name, {}).update({pair.partition("=")[0]: pair for pair in pairs})
    return tuple(f"{name}:{','.join(pairs.values())}" if pairs else name for name, pairs in found.items())


def _split(text: str) -> tuple[str, str, tuple[str, ...]]:
    name, equals, rest = text.partition("=")
    if not equals or not _NAME.fullmatch(name) or not rest:
        raise ControlError(f"the configuration {text!r} is not NAME=PRESET+CONTROL:KEY=VALUE,...; e.g. short=safe+hint")
    preset, *controls = _JOINT.split(rest)
    return name, preset, tuple(controls)
