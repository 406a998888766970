"""JSON schemas as grammars that llama.cpp reads."""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .server_alike import n_alike
from .server_field import Refused

_MOST_PARTS, _MOST_DEPTH, _MOST_REPEATED, _MOST_BYTES = 512, 32, 500, 65536
"""Of a schema: types and alternatives in all, nesting, characters or items that are counted, bytes of its grammar."""
_MOST_WAYS = 64
_APART = "tell them apart by a property with a const of its own that comes first"
_NOTES = frozenset(
    {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "format"}
    | {"$schema", "$id", "$comment", "$anchor", "$defs", "definitions", "strict"}
)
"""Keywords that say nothing of what is valid; `format` is a note by the standard."""
_OF_TYPE: Mapping[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength"}),
    "number": frozenset(),
    "integer": frozenset(),
    "boolean": frozenset(),
    "null": frozenset(),
}
_TYPES = ", ".join(_OF_TYPE)
_RULES = r"""
ws ::= | " " | "\n" [ \t]{0,20}
char ::= [^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" [0-9a-fA-F]{4})
string ::= "\"" char* "\""
integer ::= "-"? ("0" | [1-9] [0-9]{0,15})
number ::= integer ("." [0-9]{1,15})? ([eE] [-+]? [1-9] [0-9]{0,2})?
boolean ::= "true" | "false"
null ::= "null"
value ::= object | array | string | number | boolean | null
object ::= "{" ws (string ws ":" ws value ws ("," ws string ws ":" ws value ws)*)? "}"
array ::= "[" ws (value ws ("," ws value ws)*)? "]"
"""


def answer_rules(response_format: Any) -> str | None:
    """The grammar that a `response_format` asks for; None for any text. Raises Refused."""
    if response_format is None or response_format == {"type": "text"}:
        return None
    kind = response_format.get("type") if isinstance(response_format, dict) else None
    if kind == "json_object":
        return schema_rules({"type": "object"})
    if kind != "json_schema":
        raise Refused("response_format is none of the types text, json_object, json_schema", "response_format")
    described = response_format.get("json_schema")
    if not isinstance(described, dict) or "schema" not in described:
        raise Refused("response_format.json_schema has no schema; give its name and schema", "response_format")
    return schema_rules(described["schema"])


def schema_rules(schema: Any) -> str:
    """The grammar, in GBNF, of texts that are valid by a JSON schema: not all of them, for properties come in the
    schema's order, others than the named ones only where none is named, and white space is short. Raises Refused for
    keywords that it could not keep to."""
    grammar = _Rules(schema)
    root = grammar.visit(schema, "schema", 0)
    rules = "\n".join([f"root ::= {root}", *grammar.rules]) + _RULES
    try:
        n_bytes = len(rules.encode())
    except UnicodeEncodeError as error:
        raise _refused("schema", "has half a surrogate pair in a text", "leave it out") from error
    if n_bytes > _MOST_BYTES:
        raise _refused("schema", f"makes a grammar of {n_bytes} bytes, above {_MOST_BYTES}", "give a smaller one")
    return rules


class _Rules:
    """Rules of one schema by number; what is visited gives an expression to stand in another rule."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._references: dict[str, str] = {}
        self._n_parts = 0
        self._n_ways = self._most_ways = 1
        """Ways to read what is nested here, by alternatives that begin alike; and the most below a reference."""
        self._open: dict[str, int] = {}
        self._ways_in: dict[str, int] = {}
        """Ways at the references that are being visited; how many times more there are within those that were."""
        self.rules: list[str] = []

    def visit(self, schema: Any, where: str, depth: int) -> str:
        """The expression of a schema. Raises Refused."""
        self._count(where)
        if depth > _MOST_DEPTH:
            raise _refused(where, f"is nested deeper than {_MOST_DEPTH}", "give a flatter one")
        if schema is True:
            return "value"
        if not isinstance(schema, dict):
            raise _refused(where, "is neither an object nor true", "give a JSON schema")
        if "$ref" in schema:
            return self._reference(schema, where, depth)
        for name in ("const", "enum", "anyOf", "allOf"):
            if name in schema:
                _check(schema, where, {name, *(("type",) if name in ("const", "enum") else ())})
                return getattr(self, f"_{name.lower()}")(schema[name], f"{where}.{name}", depth)
        return self._typed(schema, where, depth)

    def _count(self, where: str, n: int = 1) -> None:
        self._n_parts += n
        if self._n_parts > _MOST_PARTS:
            raise _refused(where, f"comes after {_MOST_PARTS} types and alternatives", "give a smaller schema")

    def _add(self, rule: str) -> str:
        self.rules.append(f"r{len(self.rules)} ::= {rule}")
        return f"r{len(self.rules) - 1}"

    def _reference(self, schema: Mapping[str, Any], where: str, depth: int) -> str:
        _check(schema, where, {"$ref"})
        path = schema["$ref"]
        if not isinstance(path, str) or not (path == "#" or path.startswith("#/")):
            raise _refused(where, "refers to something outside itself", "use #/$defs/NAME")
        if path in self._open:
            if self._n_ways > self._open[path]:
                raise _refused(where, "nests itself through alternatives that begin alike", _APART)
        elif path in self._references:
            with self._among(self._ways_in[path], where):
                pass
        else:
            target = self._resolve(path)
            if target is None:
                raise _refused(where, f"refers to {path[:128]!r}, which is not there", "define it in $defs")
            self._references[path] = name = f"d{len(self._references)}"
            self._open[path], most, self._most_ways = self._n_ways, self._most_ways, self._n_ways
            self.rules.append(f"{name} ::= {self.visit(target, path, depth + 1)}")
            self._ways_in[path] = self._most_ways // self._open.pop(path)
            self._most_ways = max(most, self._most_ways)
        return self._references[path]

    def _resolve(self, path: str) -> Any:
        target = self._schema
        for key in path.split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            if not isinstance(target, dict) or key not in target:
                return None
            target = target[key]
        return target

    @contextlib.contextmanager
    def _among(self, n: int, where: str) -> Iterator[None]:
        """Visit what can be read in `n` ways that begin alike."""
        self._n_ways *= n
        self._most_ways = max(self._most_ways, self._n_ways)
        if self._n_ways > _MOST_WAYS:
            raise _refused(where, f"has more than {_MOST_WAYS} alternatives in one another that begin alike", _APART)
        yield
        self._n_ways //= n

    def _const(self, value: Any, where: str, depth: int) -> str:
        return self._enum([value], where, depth)

    def _enum(self, values: Any, where: str, depth: int) -> str:
        if not isinstance(values, list) or not values:
            raise _refused(where, "is not a list of values", "give at least one")
        self._count(where, len(values))
        return self._choice([_literal(value) for value in values])

    def _anyof(self, schemas: Any, where: str, depth: int) -> str:
        if not isinstance(schemas, list) or not schemas:
            raise _refused(where, "is not a list of schemas", "give at least one")
        with self._among(n_alike(schemas, self._resolve), where):
            return self._choice([self.visit(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(schemas)])

    def _allof(self, schemas: Any, where: str, depth: int) -> str:
        if not isinstance(schemas, list) or len(schemas) != 1:
            raise _refused(where, "has not exactly one schema", "join them")
        return self.visit(schemas[0], f"{where}[0]", depth + 1)

    def _choice(self, options: Sequence[str]) -> str:
        return options[0] if len(options) == 1 else self._add(" | ".join(dict.fromkeys(options)))

    def _typed(self, schema: Mapping[str, Any], where: str, depth: int) -> str:
        kinds = schema.get("type", _implied(schema))
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if kinds is None:
            _check(schema, where, set())
            return "value"
        if not isinstance(kinds, list) or not kinds or not all(k in _OF_TYPE for k in kinds if isinstance(k, str)):
            raise _refused(f"{where}.type", f"is none of {_TYPES}", "give one, or a list of them")
        if not all(isinstance(kind, str) for kind in kinds):
            raise _refused(f"{where}.type", "is not a text", f"give one of {_TYPES}")
        _check(schema, where, {"type"}.union(*(_OF_TYPE[kind] for kind in kinds)))
        self._count(where, len(kinds) - 1)
        made: dict[str, Callable[[Mapping[str, Any], str, int], str]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
        }
        return self._choice([made[kind](schema, where, depth) if kind in made else kind for kind in kinds])

    def _string(self, schema: Mapping[str, Any], where: str, depth: int) -> str:
        least, most = _bounds(schema, "minLength", "maxLength", where)
        if not least and most is None:
            return "string"
        return self._add(rf'"\"" char{{{least},{"" if most is None else most}}} "\""')

    def _array(self, schema: Mapping[str, Any], where: str, depth: int) -> str:
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            raise _refused(f"{where}.prefixItems", "is not a list of schemas", "give one")
        least, most = _bounds(schema, "minItems", "maxItems", where)
        heads = [self.visit(item, f"{where}.prefixItems[{i}]", depth + 1) for i, item in enumerate(first)]
        has_more = schema.get("items", True) is not False
        if least > len(heads) and not has_more:
            raise _refused(where, f"wants {least} items and describes {len(heads)}", "lower minItems")
        most = len(heads) if not has_more else most
        if most == 0:
            return self._add('"[" ws "]"')
        item = self.visit(schema.get("items", True), f"{where}.items", depth + 1) if has_more else ""
        # Item by item from the last one on: `tail` is what may follow behind items 0 to i.
        n_single = len(heads) if most is None else min(len(heads), most)
        tail = self._repeat(item, max(0, least - n_single), None if most is None else most - n_single)
        if not has_more:
            tail = ""
        for i in range(n_single - 1, 0, -1):
            step = f'"," ws {heads[i]} ws {tail}'
            tail = self._add(step if i < least else f"({step})?")
        if n_single:
            body = f"{heads[0]} ws {tail}"
        else:
            body = f"{item} ws {self._repeat(item, max(0, least - 1), None if most is None else most - 1)}"
        return self._add(f'"[" ws {body if least else f"({body})?"} "]"')

    def _repeat(self, item: str, least: int, most: int | None) -> str:
        """Between `least` and `most` further items, each behind its comma."""
        if most == 0 or not item:
            return ""
        one = self._add(f'"," ws {item} ws')
        return f"{one}{{{least},{'' if most is None else most}}}"

    def _object(self, schema: Mapping[str, Any], where: str, depth: int) -> str:
        named, needed = schema.get("properties", {}), schema.get("required", [])
        others = schema.get("additionalProperties", True)
        if not isinstance(named, dict):
            raise _refused(f"{where}.properties", "is not an object", "give name and schema of each property")
        if not isinstance(needed, list) or not all(isinstance(name, str) for name in needed):
            raise _refused(f"{where}.required", "is not a list of names", "give one")
        missing = [name for name in needed if name not in named]
        if missing:
            raise _refused(where, f"requires {missing[0][:64]!r} without a schema", "describe it in properties")
        if not named:
            return self._map(others, where, depth)
        if others not in (True, False):
            self.visit(others, f"{where}.additionalProperties", depth + 1)  # checked, though none is written
        pairs = [
            f'{_literal(name)} ws ":" ws {self.visit(value, f"{where}.{name[:64]}", depth + 1)} ws'
            for name, value in named.items()
        ]
        # From the last property on: what may follow behind one that was written, and where none was yet.
        after, first = "", ""
        for pair, name in reversed(list(zip(pairs, named, strict=True))):
            pair = self._add(pair)
            begun, skipped = f"{pair} {after}", first
            if name in needed:
                first, after = self._add(begun), self._add(f'"," ws {begun}')
            elif skipped:
                first, after = self._add(f"{begun} | {skipped}"), self._add(f'"," ws {begun} | {after}')
            else:
                first, after = self._add(f"({begun})?"), self._add(f'("," ws {begun})?')
        return self._add(f'"{{" ws {first} "}}"')

    def _map(self, others: Any, where: str, depth: int) -> str:
        if others is False:
            return self._add('"{" ws "}"')
        if others is True:
            return "object"
        value = self.visit(others, f"{where}.additionalProperties", depth + 1)
        pair = self._add(f'string ws ":" ws {value} ws')
        return self._add(f'"{{" ws ({pair} ("," ws {pair})*)? "}}"')


def _implied(schema: Mapping[str, Any]) -> str | None:
    """The type that keywords speak of where none is given; those of another type would be valid as well."""
    return next((kind for kind, names in _OF_TYPE.items() if names & schema.keys()), None)


def _check(schema: Mapping[str, Any], where: str, known: set[str]) -> None:
    for name in schema:
        if name not in known and name not in _NOTES:
            raise _refused(f"{where}.{name[:64]}", "cannot be kept to here", "leave it out")


def _bounds(schema: Mapping[str, Any], low: str, high: str, where: str) -> tuple[int, int | None]:
    for name in (low, high):
        value = schema.get(name, 0)
        if type(value) is not int or not 0 <= value <= _MOST_REPEATED:
            raise _refused(f"{where}.{name}", f"is no whole number from 0 to {_MOST_REPEATED}", "give one, or none")
    least, most = schema.get(low, 0), schema.get(high)
    if most is not None and least > most:
        raise _refused(f"{where}.{low}", f"is {least}, above {high} of {most}", "lower it")
    return least, most


def _literal(value: Any) -> str:
    """A JSON value as a text of the grammar."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise _refused("a value", "is too large a number, or nested too deeply", "leave it out") from error
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\x7f", "\\x7F")
    return f'"{escaped}"'


def _refused(where: str, fault: str, remedy: str) -> Refused:
    return Refused(f"response_format: {where} {fault}; {remedy}", "response_format")
