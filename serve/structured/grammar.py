"""From what a request says to a grammar in Lark, which is what llguidance compiles."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import GbnfToLarkError, any_to_lark

from llmlite.serve.structured.schema import InvalidGrammar, prepared

MAX_GRAMMAR = 64 * 1024
MAX_CHOICES = 1000
HEADER = '%llguidance {"no_forcing": true}\n'
"""All ways to spell forced text in tokens stay open. Else each step would tokenize all that is forced from there on,
a megabyte where the grammar says so."""
DIRECTIVES = re.compile(r"%(llguidance|json|regex|lark|override|extend)\b")


@dataclass(frozen=True)
class Grammar:
    """A grammar in Lark, less the header, and the field of the request that it came from."""

    rules: str
    field: str


def json_expression(schema: dict[str, Any], field: str, exact: bool) -> str:
    """A Lark expression for JSON that fits the schema. Raises `InvalidGrammar`."""
    return f"%json {prepared(schema, field, exact)}"


def json_grammar(schema: dict[str, Any], field: str, exact: bool) -> Grammar:
    return Grammar(f"start: {json_expression(schema, field, exact)}\n", field)


def regex_grammar(pattern: str, field: str) -> Grammar:
    """The whole answer matches ``pattern``, in the syntax of Rust's regex, without look-around and back-references."""
    _limit(pattern, field)
    return Grammar(f"start: /{regex_to_lark(pattern, 'd').replace(chr(10), chr(92) + 'n')}/\n", field)


def choice_grammar(choices: list[str], field: str) -> Grammar:
    """The whole answer is one of the texts."""
    _limit("".join(choices), field)
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InvalidGrammar(field, f"takes 1 to {MAX_CHOICES} texts")
    return Grammar(f"start: {' | '.join(json.dumps(choice, ensure_ascii=False) for choice in choices)}\n", field)


def text_grammar(grammar: str, field: str) -> Grammar:
    """GBNF (it has a rule ``root ::= ...``) or Lark (``start: ...``). Raises `InvalidGrammar`."""
    _limit(grammar, field)
    if found := DIRECTIVES.search(grammar):
        raise InvalidGrammar(field, f"{found.group()} may not stand in a grammar")
    try:
        rules = any_to_lark(grammar)
    except Exception as error:
        if type(error) not in (Exception, GbnfToLarkError, RecursionError):  # the converter raises bare Exception
            raise
        raise InvalidGrammar(field, str(error)) from None
    return Grammar(rules.removeprefix("%llguidance {}"), field)


def _limit(text: str, field: str) -> None:
    if len(text) > MAX_GRAMMAR:
        raise InvalidGrammar(field, f"has {len(text)} characters, at most {MAX_GRAMMAR} are taken")
