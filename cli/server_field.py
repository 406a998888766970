"""Bodies of requests to the server and their fields: read, checked, or refused with the field's name."""

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from ..runtime.errors import InputError


class Refused(InputError):
    """A request that is answered with an error object; `param` names the field."""

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.param, self.status, self.code, self.headers = param, status, code, dict(headers or {})


def parse_json(data: bytes) -> dict[str, Any]:
    """The object in a body. Raises Refused."""

    def no_number(text: str) -> NoReturn:
        raise ValueError(f"{text} is not a JSON number")

    try:
        body = json.loads(data.decode("utf-8"), parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not valid JSON: {str(error)[:200] or 'nested too deeply'}") from error
    if not isinstance(body, dict):
        raise Refused('the body is not a JSON object; send one such as {"messages": [...]}')
    return body


def mapping(body: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """An object's field that is an object; empty where it is absent. Raises Refused."""
    value = body.get(name)
    if not isinstance(value, dict | None):
        raise Refused(f"{name} is not an object", name)
    return value or {}


def flag(body: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """A field that is true or false. Raises Refused."""
    value = body.get(name)
    if not isinstance(value, bool | None):
        raise Refused(f"{name} is neither true nor false", name)
    return default if value is None else value


def whole(body: Mapping[str, Any], name: str, low: int, high: int, where: str | None = None) -> int | None:
    """A field that is a whole number within limits; None where it is absent. Raises Refused."""
    value = body.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        raise Refused(f"{where or name} is not a whole number from {low} to {high}", where or name)
    return value


def number(body: Mapping[str, Any], name: str, low: float, high: float, default: float) -> float:
    """A field that is a number within limits. Raises Refused."""
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not low <= value <= high:
        raise Refused(f"{name} is not a number from {low} to {high}", name)
    return float(value)
