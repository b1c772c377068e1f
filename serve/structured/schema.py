"""What is checked and settled in a JSON schema before it becomes a grammar."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from llmlite.errors import LlmliteError

MAX_CHARACTERS = 64 * 1024
MAX_DEPTH = 64
"""Of brackets within brackets in the schema's JSON; the compiler recurses."""
MAX_PROPERTIES = 500
MAX_MULTIPLE = 10_000
"""Largest multipleOf, its decimal point left out: the compiler makes a state for each remainder."""

LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
SINGLES = (
    "items", "additionalItems", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties",
)  # fmt: skip
COMBINING = ("allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas", "patternProperties", "unevaluatedProperties")


class InvalidGrammar(LlmliteError):
    """A schema or grammar that can't be followed, the field of the request that it is in, and why."""

    def __init__(self, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field


def prepared(schema: dict[str, Any], where: str, exact: bool) -> str:
    """The schema as JSON for llguidance, with its options; ``where`` it stands in the request.

    ``exact``: keywords that can't be held to are refused by the compiler; else they are left out. Objects that list
    their properties and don't speak of others take no others, unless the schema puts objects together from parts.
    Between tokens of the answer's JSON stands one space or none, so that only strings and lists can go on for ever.
    """
    _check_size(schema, where)
    schema = copy.deepcopy(schema)
    found = list(subschemas(schema))
    _check(found, where, exact)
    if not any(_combines(part) for part in found):
        for part in found:
            if isinstance(part.get("properties"), dict) and "patternProperties" not in part:
                part.setdefault("additionalProperties", False)
    schema["x-guidance"] = {
        "whitespace_flexible": False, "key_separator": ": ?", "item_separator": ", ?",
        "lenient": not exact, "coerce_one_of": not exact,
    }  # fmt: skip
    return json.dumps(schema)


def subschemas(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The schema and every schema in it, wherever a keyword may hold one."""
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        yield part
        waiting += [part[key] for key in SINGLES if key in part]
        for key in (*LISTS, "items"):
            if isinstance(part.get(key), list):
                waiting += part[key]
        for key in MAPS:
            if isinstance(part.get(key), dict):
                waiting += part[key].values()


def _combines(part: dict[str, Any]) -> bool:
    """Whether what one place lists as properties may be only some of the object's."""
    return "allOf" in part or ("properties" in part and any(key in part for key in COMBINING))


def _check_size(schema: dict[str, Any], where: str) -> None:
    level: list[Any] = [schema]
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise InvalidGrammar(where, f"the schema is nested more than {MAX_DEPTH} deep")
        inner = [value.values() if isinstance(value, dict) else value for value in level]
        level = [value for values in inner for value in values if isinstance(value, dict | list)]
    length = len(json.dumps(schema, ensure_ascii=False))
    if length > MAX_CHARACTERS:
        raise InvalidGrammar(where, f"the schema has {length} characters, at most {MAX_CHARACTERS} are taken")


def _check(parts: list[dict[str, Any]], where: str, exact: bool) -> None:
    properties = 0
    for part in parts:
        reference = part.get("$ref", "#")
        if not (isinstance(reference, str) and reference.startswith("#")):
            raise InvalidGrammar(where, f"$ref {reference!r} points outside the schema; only '#...' is followed")
        multiple = part.get("multipleOf")
        if isinstance(multiple, int | float) and not isinstance(multiple, bool) and multiple == multiple:
            digits = Decimal(str(multiple)).normalize()
            if int("".join(map(str, digits.as_tuple().digits))) * 10 ** max(0, _exponent(digits)) > MAX_MULTIPLE:
                raise InvalidGrammar(where, f"multipleOf {multiple} has more than {MAX_MULTIPLE} remainders")
        if exact and part.get("minProperties", 0) not in (0, 1):
            raise InvalidGrammar(where, "minProperties above 1 is not supported: a key might come twice")
        properties += len(part["properties"]) if isinstance(part.get("properties"), dict) else 0
    if properties > MAX_PROPERTIES:
        raise InvalidGrammar(where, f"the schema has {properties} properties, at most {MAX_PROPERTIES} are taken")


def _exponent(number: Decimal) -> int:
    exponent = number.as_tuple().exponent
    return min(exponent, 400) if isinstance(exponent, int) else 0
