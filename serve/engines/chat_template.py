"""Render the chat template that a GGUF file carries, as transformers renders a tokenizer's."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llmlite.serve.engines.base import ChatTemplateError

NO_TEMPLATE = "this model has no chat template; use /v1/completions with the whole prompt as text"


class _Generation(Extension):
    """{% generation %} marks the assistant's words for training; in serving its body is just text."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own interface)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def render(
    template: str, messages: list[dict[str, Any]], special: dict[str, str], tools: list[dict[str, Any]] | None = None
) -> str:
    """The prompt text of a conversation, the assistant's turn opened.

    ``special``: bos_token and eos_token as text. The template is a stranger's program: it runs in jinja2's
    immutable sandbox, over plain data. Raises `ChatTemplateError` with the template's message where it refuses.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    words = {"messages": messages, "tools": tools, "add_generation_prompt": True}
    try:
        return environment.from_string(template).render(**words, **special)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise refused(error) from error


def refused(error: Exception) -> ChatTemplateError:
    """The sentence for a template that raised."""
    return ChatTemplateError(f"the model's chat template refused these messages: {error}")
