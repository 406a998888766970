"""`localreason controls`: what can shape the thinking, with its parameters, limits and sources."""

import json
from typing import Annotated, Any

import typer

from ..runtime.errors import ControlError
from .build import describe_controls

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command()
def controls(
    name: Annotated[str | None, typer.Argument(help="One control; all of them and the presets if not given.")] = None,
    is_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the controls with parameters, defaults, limits and source, and the presets.

    \b
    Examples:
      localreason controls
      localreason controls budget
      localreason solve "..." --preset fast -c budget:max=512,lead=no
    """
    known = describe_controls()
    if name is not None:
        known["controls"] = [control for control in known["controls"] if control["name"] == name]
        del known["presets"]
        if not known["controls"]:
            names = ", ".join(control["name"] for control in describe_controls()["controls"])
            raise ControlError(f"there is no control {name!r}; choose one of {names}")
    if is_json:
        print(json.dumps(known, indent=2, ensure_ascii=False))
        return
    for control in known["controls"]:
        print(f"{control['name']}: {control['summary']}\n    source: {control['source']}")
        for parameter in control["parameters"]:
            print(f"    {parameter['name']}={_show(parameter['default'])}  {parameter['help']}{_limits(parameter)}")
        print()
    for preset in known.get("presets", ()):
        print(f"--preset {preset['name']}: {preset['summary']}")
        for control in preset["controls"]:
            values = ",".join(f"{key}={_show(value)}" for key, value in control.items() if key != "control")
            print(f"    {control['control']}:{values}")


def _limits(parameter: dict[str, Any]) -> str:
    if parameter["choices"]:
        return f" [{', '.join(parameter['choices'])}]"
    low, high = parameter["min"], parameter["max"]
    if low is None and high is None:
        return ""
    return f" [{low} or more]" if high is None else f" [{low} to {high}]"


def _show(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value).replace("\n", "\\n")
