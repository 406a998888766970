"""The only place that wires settings to recipes, files and engines."""

import contextlib
from collections.abc import Callable, Generator, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import typer

from ..runtime.errors import ControlError, InputError
from . import store
from .config import Config
from .hub import Hub, HuggingFace
from .say import tell

if TYPE_CHECKING:
    from ..runtime.events import Event
    from ..runtime.llama import EngineOptions
    from ..runtime.model import Answered, Question, Recipe


_FEW_BITS = 4
"""Of weights, from which down thresholds of certainty, tuned at 16, should be looked at again."""
_N_TEMPLATE = 1024
"""Tokens that a prompt may have besides the question."""
_LED = (
    "the model has no thinking of its own and is led to it by a prompt; --no-think asks plainly, which answered more "
    "questions right where it was measured"
)


class Solver(Protocol):
    """What the commands need of an opened model."""

    def solve(
        self, questions: "Iterable[Question]", recipe: "Recipe | None" = None, n_parallel: int = 1
    ) -> "Generator[Event | Answered, None, None]":
        """Events of all questions, each ending with its `Answered`."""
        ...


def open_model(path: Path, options: "EngineOptions", config: Config) -> AbstractContextManager[Solver]:
    """The real thing: a GGUF file in llama.cpp, on this machine or on the home's."""
    from ..runtime.model import Model

    if config.settings.cluster:
        from .ring import open_ring

        model = open_ring(path, options, config)
    else:
        model = Model.open(path, options)
    for note in model.notes:
        tell(note)
    return model


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a test replaces: it hands another one to `main`."""

    open_model: "Callable[[Path, EngineOptions, Config], AbstractContextManager[Solver]]" = open_model
    hub: Callable[[], Hub] = HuggingFace


def wiring(context: typer.Context) -> Wiring:
    """The wiring of this command line."""
    return context.obj if isinstance(context.obj, Wiring) else Wiring()


def make_recipe(config: Config, is_insisting: bool = False) -> "Recipe":
    """Everything that shapes the answers. Raises ControlError or InputError."""
    from ..runtime.controls import combine
    from ..runtime.formats import find_format
    from ..runtime.model import Recipe
    from ..runtime.sampler import Sampling

    chosen = config.settings
    if chosen.format is not None:
        find_format(chosen.format)
    return Recipe(
        controls=combine(None if chosen.preset == "none" else chosen.preset, chosen.controls, is_insisting),
        sampling=Sampling(chosen.temperature, chosen.top_p, chosen.top_k, chosen.min_p),
        seed=chosen.seed,
        max_tokens=chosen.max_tokens,
        is_thinking=chosen.think,
        format=chosen.format,
    )


def describe(recipe: "Recipe", config: Config) -> dict[str, object]:
    """What a row tells of how it came about: the recipe, and types of fewer bits, or the cache's, that were given."""
    chosen = config.settings
    types = {"cache_type": chosen.cache_type, "row_type": chosen.row_type if chosen.cluster else None}
    return recipe.describe() | {name: kind for name, kind in types.items() if kind not in (None, "f32")}


def make_options(config: Config, recipe: "Recipe", n_parallel: int, texts: Iterable[str]) -> "EngineOptions":
    """How the file is to be opened for these problems, this many at once."""
    from ..runtime.llama import EngineOptions

    chosen, n_sequences = config.settings, recipe.n_sequences(n_parallel)
    # No vocabulary makes more tokens of a text than it has bytes; the rest is for a template and its examples.
    n_prompt = max((len(text.encode("utf-8", "replace")) for text in texts), default=0) + _N_TEMPLATE
    try:
        return EngineOptions(
            n_context=chosen.context,
            n_sequences=n_sequences,
            n_threads=chosen.threads,
            n_gpu_layers=chosen.gpu_layers,
            cache_type=chosen.cache_type,
            n_needed=recipe.n_cells(n_parallel, n_prompt),
            n_busy=recipe.n_samples * n_parallel,
        )
    except InputError as error:
        raise ControlError(
            f"{n_parallel} problems at once need {n_sequences} sequences; lower --parallel or search:n ({error})"
        ) from error


def find_model(config: Config, hub: Callable[[], Hub]) -> Path:
    """The file of the model that was asked for, pulled if it is not here; the demo where none was named."""
    reference = config.settings.model
    if reference is None:
        path = store.demo()
        tell(
            f"no model given: {path.stem} only demonstrates; "
            f"for real answers run `localreason models pull {store.RECOMMENDED}` and give --model {store.RECOMMENDED}"
        )
        return path
    path = store.find(reference, config.store)
    if path is None:
        tell(f"{reference} is not here yet; pulling it to {config.store}")
        path = store.pull(reference, config.store, hub())
    return path


def warn(path: Path, config: Config) -> None:
    """One line where the weights, the cache or thinking unasked are known to hurt answers; nothing for the demo, which
    says so itself, nor for a file that cannot be read, which loading tells."""
    from ..quant.inspect import inspect
    from ..runtime.errors import ModelError
    from ..runtime.formats import detect
    from ..runtime.parts import read_local

    if config.settings.model is None:
        return
    with contextlib.suppress(ModelError):
        pieces = read_local(path)
        report = inspect(pieces)
        found = report.advice(config.settings.cache_type or "f16")
        told = {key: value for key, value in pieces[0].header.values.items() if isinstance(value, str)}
        is_led = detect(told.get("tokenizer.chat_template"), told).is_prompted
        if is_led and config.settings.format is None and config.origins["think"] == "default":
            found.append(_LED)
        has_certainty = make_recipe(config, is_insisting=True).get("suppress") is not None
        if has_certainty and report.precision.weight_bits <= _FEW_BITS:
            found.append(f"the certainty that suppress goes by was tuned at 16 bits, not for {report.precision.scheme}")
        if found:
            tell("; ".join(found))


def describe_controls() -> dict[str, Any]:
    """All controls with their parameters, and all presets, as plain values."""
    from dataclasses import fields

    from ..runtime.controls import CONTROLS, PRESETS, describe

    controls = []
    for name, control in CONTROLS.items():
        parameters = [
            {
                "name": item.name,
                "default": item.default,
                "help": item.metadata["help"],
                "min": item.metadata.get("min"),
                "max": item.metadata.get("max"),
                "choices": list(item.metadata.get("choices", ())),
            }
            for item in fields(control.Parameters)
        ]
        controls.append({"name": name, "summary": control.summary, "source": control.source, "parameters": parameters})
    presets = [
        {"name": preset.name, "summary": preset.summary, "controls": [describe(item) for item in preset.controls]}
        for preset in PRESETS.values()
    ]
    return {"controls": controls, "presets": presets}
