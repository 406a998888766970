"""Where two descriptions of a run differ, in words."""

import json
from typing import Any


def difference(there: Any, here: Any, name: str = "") -> str:
    """The first part in which two values of JSON differ, such as recipes: what it was, and what it is now."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in {**there, **here}:
            if there.get(key) != here.get(key):
                return difference(there.get(key), here.get(key), f"{name}.{key}".strip("."))
    if _is_controls(there) and _is_controls(here) and len(there) == len(here):
        for one, other in zip(there, here, strict=True):
            if one != other and one.get("control") == other.get("control"):
                return difference(one, other, str(one.get("control")))
    return f"{name} was {_brief(there)} and is now {_brief(here)}"


def _is_controls(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _brief(value: Any) -> str:
    if _is_controls(value):
        return "+".join(str(item.get("control")) for item in value) or "none"
    return json.dumps(value, ensure_ascii=False)
