"""Grammars of answers that call tools."""

from __future__ import annotations

import json
import re
from typing import Any

from llmlite.serve.structured.grammar import Grammar, json_expression
from llmlite.serve.tools.calling import Calling, Function
from llmlite.serve.tools.formats import PYTHON_TAG

MAX_CALLS = 16
"""In one answer."""
SPACES = r"[ \n]{0,8}"


def calling_grammar(calling: Calling, text: dict[str, Any] | None, exact: bool) -> Grammar:
    """What an answer may be: calls alone where one is required, else text, or text up to a call and then calls.

    From the moment that a call has begun it must be one of the functions with arguments that fit its schema. ``text``:
    the JSON schema that an answer without calls follows. Raises `InvalidGrammar`.
    """
    rules = [f"args_{n}: {_arguments(function)}" for n, function in enumerate(calling.functions)]
    if not calling.format.trigger:
        rules += _bare(calling)
    else:
        rules += _triggered(calling, text, exact)
    return Grammar("\n".join(rules) + "\n", "tools")


def arguments_grammar(function: Function) -> Grammar:
    """Of the arguments of one function alone."""
    return Grammar(f"start: {_arguments(function)}\n", f"{function.field}.parameters")


def _arguments(function: Function) -> str:
    return json_expression(function.parameters, f"{function.field}.parameters", function.strict)


def _triggered(calling: Calling, text: dict[str, Any] | None, exact: bool) -> list[str]:
    form = calling.format
    bodies = " | ".join(f"{_literal(f.name + form.middle)} args_{n}" for n, f in enumerate(calling.functions))
    more = f"({_literal(form.between)} call)~0..{MAX_CALLS - 1}" if calling.many else ""
    rules = [
        f"call: {_literal(form.before)} ({bodies}) {_literal(form.after)}",
        f"calls: {_literal(form.begin)} call {more} {_literal(form.close)}",
    ]
    if calling.required:
        return [f"start: {_literal(form.trigger)} calls", *rules]
    if text is not None:
        answer = json_expression(text, "response_format", exact)
        return ["start: answer", f"answer: {answer} | {_literal(form.trigger)} calls", *rules]
    rules += ["TEXT: /(.|\\n)*/", f"trigger[lazy]: /(.|\\n)*/ {_literal(form.trigger)}"]
    return ["start: TEXT | trigger calls", *rules]


def _bare(calling: Calling) -> list[str]:
    """The answer is one call or text; it is a call as soon as it has begun with the name of a function."""
    form = calling.format
    if calling.required:
        bodies = " | ".join(f"{_literal(f.name + form.middle)} args_{n}" for n, f in enumerate(calling.functions))
        return [f"start: {_literal(form.before)} ({bodies}) {_literal(form.after)}"]
    rules = ["TEXT: /(.|\\n)*/"]
    starts = ["TEXT"]
    for n, function in enumerate(calling.functions):
        tag = f"({re.escape(PYTHON_TAG)})?"
        name = re.escape(json.dumps(function.name))
        rules.append(f'head_{n}[lazy]: /{SPACES}{tag}{SPACES}\\{{{SPACES}"name"{SPACES}:{SPACES}{name}/')
        starts.append(f"head_{n} {_literal(form.middle[1:])} args_{n} {_literal(form.after)}")
    return [f"start: {' | '.join(starts)}", *rules]


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""
