"""Limits on what a body may hold, checked before anything costly is done with it."""

from __future__ import annotations

import json
import re
from typing import Any

from fastapi import Request

from llmlite.serve.errors import ApiError

MAX_DEPTH = 64
"""Arrays and objects within each other. A schema in a tool in a list of tools has 6 levels before its own."""

MAX_PARTS = 200_000
"""Texts, keys, arrays and objects in a body. Each is a Python object, made on the event loop."""

MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_SCHEMA = 64 * 1024
"""Characters of one JSON schema, written without spaces. Grammars are made of it, which takes time and memory."""

MAX_GRAMMAR = 64 * 1024
"""Characters of a grammar or a regular expression."""

# A string runs to its end or, unclosed, to the end of the body. The possessive quantifiers (+ after *) never go back:
# a hostile body takes as long as an honest one of its length.
PART = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)


def check_body(body: bytes, max_text: int) -> None:
    """Raises 400 or 413 for JSON that is nested too deeply, has too many parts or too long a text. No parser is run."""
    depth = 0
    for parts, match in enumerate(PART.finditer(body)):
        first = body[match.start()]
        if first == 0x22:
            if match.end() - match.start() - 2 > max_text:
                raise ApiError(413, f"a text in the body is longer than {max_text} bytes", code="text_too_long")
        elif first in b"[{":
            depth += 1
        else:
            depth -= 1
        if depth > MAX_DEPTH:
            raise ApiError(400, f"the body is nested more than {MAX_DEPTH} levels deep", code="nested_too_deeply")
        if parts >= MAX_PARTS:
            message = f"the body has more than {MAX_PARTS} texts, arrays and objects"
            raise ApiError(413, message, code="too_many_parts")


async def check_sizes(request: Request) -> None:
    """A dependency of every route: raises 400 for too many messages or tools, too large a schema or grammar.

    Other faults of the body are left to the route's own schema.
    """
    if request.method != "POST" or not request.headers.get("content-type", "").startswith("application/json"):
        return
    try:
        body = await request.json()  # parsed once: the request keeps it
    except ValueError:
        return
    if not isinstance(body, dict):
        return
    for name, most in (("messages", MAX_MESSAGES), ("input", MAX_MESSAGES), ("tools", MAX_TOOLS)):
        if isinstance(body.get(name), list) and len(body[name]) > most:
            raise ApiError(400, f"{name}: takes at most {most}, not {len(body[name])}", name, "too_many")
    for index, tool in enumerate(body["tools"] if isinstance(body.get("tools"), list) else ()):
        _check_schema(tool, f"tools.{index}")
    for name in ("response_format", "text", "guided_json", "structured_outputs"):
        _check_schema(body.get(name), name)
    for name in ("grammar", "guided_grammar", "guided_regex"):
        if isinstance(body.get(name), str) and len(body[name]) > MAX_GRAMMAR:
            raise ApiError(400, f"{name}: is longer than {MAX_GRAMMAR} characters", name, "too_large")


def _check_schema(value: Any, field: str) -> None:
    if isinstance(value, dict) and len(json.dumps(value, separators=(",", ":"))) > MAX_SCHEMA:
        raise ApiError(400, f"{field}: its JSON is longer than {MAX_SCHEMA} characters", field, "too_large")
