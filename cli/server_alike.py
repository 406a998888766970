"""Alternatives of a JSON schema that begin alike.

llama.cpp follows all ways to read a text at once. Alternatives that are not told apart before something is nested in
them multiply these ways at each level of nesting: one `[` of an innocent schema took minutes.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_ANY = object()
"""A value in a beginning that tells nothing apart."""
_NESTED = frozenset({"object", "array"})
Resolve = Callable[[str], Any]
"""The schema that a `$ref` stands for, None where there is none."""


def n_alike(alternatives: list[Any], resolve: Resolve) -> int:
    """The most of the alternatives that cannot be told apart before something is nested in them; at least 1."""
    single = [one for schema in alternatives for one in _flat(schema, resolve, set())]
    nested = [_beginning(one, resolve) for one in single if _kinds(one)]
    return max((sum(_is_alike(one, other) for other in nested) for one in nested), default=1)


def _flat(schema: Any, resolve: Resolve, seen: set[int]) -> Iterator[Mapping[str, Any]]:
    """The schema, or those that it stands for where it is a reference or a list of alternatives itself."""
    if schema is True:
        schema = {"type": sorted(_NESTED)}
    if not isinstance(schema, dict) or id(schema) in seen:
        return
    seen.add(id(schema))
    if isinstance(schema.get("$ref"), str):
        yield from _flat(resolve(schema["$ref"]), resolve, seen)
    elif isinstance(inner := schema.get("anyOf", schema.get("allOf")), list):
        for one in inner:
            yield from _flat(one, resolve, seen)
    else:
        yield schema


def _kinds(schema: Mapping[str, Any]) -> frozenset[str]:
    """Which of the types that nest others a schema may be."""
    if "const" in schema or "enum" in schema:
        return frozenset()
    kinds = schema.get("type")
    if kinds is None:
        return frozenset({"object"} if "properties" in schema else {"array"} if "items" in schema else _NESTED)
    return _NESTED.intersection([kinds] if isinstance(kinds, str) else filter(lambda k: isinstance(k, str), kinds))


def _beginning(schema: Mapping[str, Any], resolve: Resolve) -> list[Any]:
    """What comes before anything nested: the bracket, then names and values of properties by turns."""
    kinds = _kinds(schema)
    if len(kinds) > 1:
        return []
    if kinds == {"array"}:
        return ["["]
    beginning: list[Any] = ["{"]
    named, needed = schema.get("properties", {}), schema.get("required", [])
    for name, value in named.items() if isinstance(named, dict) and isinstance(needed, list) else ():
        if name not in needed:
            break
        beginning.append(name)
        if any(_kinds(one) for one in _flat(value, resolve, set())):
            break
        beginning.append(_only(value))
    return beginning


def _only(schema: Any) -> Any:
    """The text of the only value that a schema allows, if there is one."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    return json.dumps(values[0], sort_keys=True) if isinstance(values, list) and len(values) == 1 else _ANY


def _is_alike(one: list[Any], other: list[Any]) -> bool:
    return all(a is _ANY or b is _ANY or a == b for a, b in zip(one, other, strict=False))
