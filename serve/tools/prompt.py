"""A conversation with tools as the model's template takes it: natively, or in plain messages."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from llmlite.serve.tools.calling import Calling
from llmlite.serve.tools.formats import CallFormat

Message = dict[str, Any]
"""role, content and, where they apply, ``tool_calls`` (their arguments as objects), ``tool_call_id`` and ``name``."""

INTRODUCTION = """You can call functions. These are the functions, one in each line:
{functions}

To call a function, write nothing but
{example}
where ARGUMENTS is a JSON object that fits the function's parameters.{many} The results come in the next message. \
Answer in plain words when no function is needed."""
MANY = " To call several, write one such block after the other."


def conversation(messages: list[Message], form: CallFormat, calling: Calling | None) -> list[Message]:
    """The messages for the template. Results get the name of the function that they are of."""
    names = {call["id"]: call["function"]["name"] for message in messages for call in message.get("tool_calls", ())}
    messages = [
        {**message, "name": names[message["tool_call_id"]]} if message["role"] == "tool" else message
        for message in messages
    ]
    if form.native:
        return [_short_ids(message) for message in messages] if form.short_ids else messages
    plain: list[Message] = []
    for message in messages:
        _add_plain(plain, message, form)
    return plain if calling is None else introduced(plain, introduction(calling))


def introduction(calling: Calling) -> str:
    """What a model is told whose template knows no tools."""
    form = calling.format
    example = f"{form.trigger}{form.begin}{form.before}NAME{form.middle}ARGUMENTS{form.after}{form.close}"
    functions = "\n".join(json.dumps(function.described(), ensure_ascii=False) for function in calling.told)
    return INTRODUCTION.format(functions=functions, example=example, many=MANY if calling.many else "")


def introduced(messages: list[Message], text: str) -> list[Message]:
    """With ``text`` in the system message, which is put in front where there is none."""
    if messages and messages[0]["role"] == "system":
        return [{**messages[0], "content": f"{messages[0]['content']}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def without_system(messages: list[Message]) -> list[Message]:
    """For templates that refuse a system message: its text stands in front of the first user's."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return messages
    return [{**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}, *messages[2:]]


def _add_plain(plain: list[Message], message: Message, form: CallFormat) -> None:
    """Calls as the model would have written them; results as words of the user, those of one turn in one message."""
    if message["role"] == "tool":
        text = f"{form.result[0]}{message['content']}{form.result[1]}"
        if plain and plain[-1].get("results"):
            plain[-1]["content"] += f"\n{text}"
        else:
            plain.append({"role": "user", "content": text, "results": True})
    elif "tool_calls" in message:
        calls = [_written(call["function"], form) for call in message["tool_calls"]]
        text = f"{form.trigger}{form.begin}{form.between.join(calls)}{form.close}"
        plain.append({"role": "assistant", "content": f"{message['content']}\n{text}".lstrip("\n")})
    else:
        plain.append(message)


def _written(function: dict[str, Any], form: CallFormat) -> str:
    arguments = json.dumps(function["arguments"], ensure_ascii=False)
    return f"{form.before}{function['name']}{form.middle}{arguments}{form.after}"


def _short_ids(message: Message) -> Message:
    """Mistral's templates take identifiers of nine letters and digits."""
    if "tool_calls" in message:
        message = {**message, "tool_calls": [{**call, "id": _short(call["id"])} for call in message["tool_calls"]]}
    if "tool_call_id" in message:
        message = {**message, "tool_call_id": _short(message["tool_call_id"])}
    return message


def _short(identifier: str) -> str:
    return hashlib.sha256(identifier.encode()).hexdigest()[:9]
