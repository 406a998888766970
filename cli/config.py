"""Settings from flags, environment, a TOML file and defaults, in this order, each with its origin."""

import difflib
import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer

from ..runtime.errors import InputError
from ..runtime.paths import expanded

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _setting(
    default: Any, help: str, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


@dataclass(frozen=True, slots=True)
class Settings:
    """What can be set by a flag, by `LOCALREASON_<NAME>` and by a key of the TOML file."""

    model: str | None = _setting(
        None, "a path, a name of `localreason models list`, or OWNER/REPO:QUANT of Hugging Face"
    )
    preset: str = _setting("safe", "a preset of `localreason controls`, or none")
    controls: tuple[str, ...] = _setting((), "a control with parameters, on top of the preset")
    parallel: int = _setting(4, "problems of a file in flight at once", 1, 64)
    seed: int = _setting(0, "the same seed gives the same answers again, to as many problems at once", 0, 2**63 - 1)
    temperature: float = _setting(0.6, "randomness of sampling; 0 takes the likeliest token", 0, 100)
    top_p: float = _setting(0.95, "sample from the likeliest tokens of this total probability; 1 is off", 0, 1)
    top_k: int = _setting(0, "sample from this many likeliest tokens; 0 is off", 0, 2**31 - 1)
    min_p: float = _setting(0.0, "drop tokens less likely than this share of the best one; 0 is off", 0, 1)
    max_tokens: int | None = _setting(None, "most tokens of a reply; unset: the thinking cap and 2048", 1, 2**31 - 1)
    context: int | None = _setting(None, "tokens that the cache holds; unset: what fits into memory", 16, 1 << 24)
    threads: int | None = _setting(None, "threads; unset: the physical cores", 1, 512)
    gpu_layers: int | None = _setting(None, "layers on the GPU; unset: all where there is one", 0, 10_000)
    cache_type: str | None = _setting(
        None,
        "type of the key-value cache; unset: f16, or q8_0 where f16 does not hold the context",
        choices=("f16", "q8_0", "q4_0"),
    )
    format: str | None = _setting(None, "thinking format, e.g. think, harmony, prompted; unset: detected")
    think: bool = _setting(True, "let the model think before it answers")
    store: str | None = _setting(None, "folder of pulled models")
    cluster: bool = _setting(False, "share the model with the paired nodes of the home")
    peers: tuple[str, ...] = _setting((), "a node by host:port, where it is not found by itself")
    windows: str | None = _setting(
        None, "layers by machine in order, after a / those on its GPU, e.g. attic=14/8,head=14; unset: planned"
    )
    objective: str | None = _setting(
        None,
        "what the layers are shared out for; unset: latency for one answer at once, throughput for several",
        choices=("latency", "throughput", "prefill"),
    )
    rounds: int = _setting(0, "how often a token passes the ring; 0: planned", 0, 64)
    row_type: str = _setting("f32", "form of activations on the wire", choices=("f32", "f16", "i8"))
    disk: bool = _setting(False, "let weights that do not fit into memory be read from disk at each token")
    guess: bool = _setting(True, "let nodes that would wait begin with what the next token of a lone answer may be")
    cluster_folder: str | None = _setting(None, "folder of identity and pairings")
    cluster_cache: str | None = _setting(None, "folder of window files")
    plaintext: bool = _setting(False, "speak without encryption to nodes on this machine, for tests")


_OF_RINGS = ("peers", "windows", "objective", "rounds", "row_type", "disk", "guess")
FIELDS = {item.name: item for item in fields(Settings)}


@dataclass(frozen=True, slots=True)
class Config:
    """The settings in force, and for each the words that tell where it comes from."""

    settings: Settings
    origins: Mapping[str, str]

    @property
    def store(self) -> Path:
        """The folder of pulled models."""
        if self.settings.store:
            return expanded(self.settings.store)
        from platformdirs import user_data_path

        return user_data_path("localreason", appauthor=False) / "models"


def flag(name: str, *names: str, show: str | None = None) -> Any:
    """The command-line option of a setting; its help says the limits and the default."""
    item = FIELDS[name]
    meta, default = item.metadata, item.default
    notes = []
    if meta["choices"]:
        notes.append(", ".join(meta["choices"]))
    elif meta["high"] is not None and meta["high"] < 2**31 - 1:
        notes.append(f"{meta['low']} to {meta['high']}")
    if default not in (None, ()) and not isinstance(default, bool):
        notes.append(f"default {default}")
    tail = f" [{'; '.join(notes)}]" if notes else ""
    text = f"{meta['help'][0].upper()}{meta['help'][1:]}{tail}"
    return typer.Option(*(names or (f"--{name.replace('_', '-')}",)), help=text, show_default=False, metavar=show)


def path() -> Path:
    """The TOML file: `LOCALREASON_CONFIG`, or config.toml in the user's configuration folder."""
    named = os.environ.get("LOCALREASON_CONFIG")
    if named:
        return expanded(named)
    from platformdirs import user_config_path

    return user_config_path("localreason", appauthor=False) / "config.toml"


def load(flags: Mapping[str, Any]) -> Config:
    """The settings in force; names in `flags` that are no settings are passed over, as is None.

    Raises InputError for the file and the environment, a usage error for flags.
    """
    file = path()
    written = _read(file)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for name, item in FIELDS.items():
        text = os.environ.get(f"LOCALREASON_{name.upper()}", "")
        value = flags.get(name)
        if value is not None and value not in ([], ()):
            values[name], origins[name] = tuple(value) if isinstance(value, list) else value, "flag"
            problem = _problem(name, values[name])
            if problem:
                raise typer.BadParameter(problem, param_hint=_option(name))
        elif text:
            origins[name] = f"environment LOCALREASON_{name.upper()}"
            values[name] = _parse(name, text, origins[name])
        elif name in written:
            origins[name] = f"file {file}"
            values[name] = _convert(name, written[name], origins[name])
        else:
            values[name], origins[name] = item.default, "default"
    # Commands that know no --cluster, such as `cluster list`, always mean the home's machines.
    idle = [name for name in _OF_RINGS if origins[name] == "flag"]
    if "cluster" in flags and not values["cluster"] and idle:
        raise typer.BadParameter(
            "is only for sharing the model with other machines; give --cluster too", param_hint=_option(idle[0])
        )
    return Config(Settings(**values), origins)


def _option(name: str) -> str:
    return {"controls": "--control", "peers": "--peer"}.get(name, f"--{name.replace('_', '-')}")


def _read(file: Path) -> dict[str, Any]:
    try:
        written = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        if os.environ.get("LOCALREASON_CONFIG"):
            raise InputError(f"LOCALREASON_CONFIG names {file}, which does not exist; correct or unset it") from error
        return {}
    except OSError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{file} is not valid TOML: {error}") from error
    for key in written:
        if key not in FIELDS:
            near = difflib.get_close_matches(key, FIELDS, 1)
            meant = f"do you mean {near[0]!r}?" if near else f"there are {', '.join(FIELDS)}"
            raise InputError(f"{file}: {key!r} is not a setting; {meant}")
    return written


def _kind(name: str) -> Any:
    """The type of a setting without None."""
    type_ = FIELDS[name].type
    if get_origin(type_) is tuple:
        return tuple
    return next((kind for kind in get_args(type_) if kind is not NoneType), type_)


_NOUNS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", tuple: "a list of texts"}


def _parse(name: str, text: str, origin: str) -> Any:
    """The value of an environment variable."""
    kind = _kind(name)
    try:
        if kind is tuple:
            value = tuple(text.split())
        elif kind is bool:
            value = _WORDS[text.strip().lower()]
        else:
            value = kind(text)
    except (ValueError, KeyError) as error:
        raise InputError(f"{origin} is {text!r}; give {_NOUNS[kind]}") from error
    return _checked(name, value, origin)


def _convert(name: str, value: Any, origin: str) -> Any:
    """The value of a TOML key."""
    kind = _kind(name)
    if kind is tuple and isinstance(value, list) and all(isinstance(part, str) for part in value):
        value = tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise InputError(f"{origin}: {name} is {value!r}; give {_NOUNS[kind]}")
    return _checked(name, value, origin)


def _checked(name: str, value: Any, origin: str) -> Any:
    problem = _problem(name, value)
    if problem:
        raise InputError(f"{origin}: {name} {problem}")
    return value


def _problem(name: str, value: Any) -> str | None:
    """What is wrong with a value of the right type, if anything."""
    meta = FIELDS[name].metadata
    if meta["choices"] and value not in meta["choices"]:
        return f"is {value!r}; choose one of {', '.join(meta['choices'])}"
    if meta["low"] is not None and not meta["low"] <= value <= meta["high"]:
        return f"is {value}; give a value from {meta['low']} to {meta['high']}"
    return None


app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True, help="Show the settings.")


@app.command()
def show(
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show every setting and where it comes from: flag, environment, file or default.

    \b
    Example:
      LOCALREASON_PARALLEL=8 localreason config show
    """
    config = load({})
    rows = {name: (getattr(config.settings, name), config.origins[name]) for name in FIELDS}
    if is_json:
        shown = {name: {"value": value, "origin": origin} for name, (value, origin) in rows.items()}
        print(json.dumps(shown, indent=2))
        return
    for name, (value, origin) in rows.items():
        shown = " ".join(value) if isinstance(value, tuple) else "unset" if value is None else str(value)
        print(f"{name:<14} {shown or 'none':<20} {origin}")


@app.command("path")
def show_path() -> None:
    """Show the path of the TOML file, which need not exist."""
    print(path())
