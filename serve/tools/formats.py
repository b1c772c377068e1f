"""How models write calls: a row for each way, found by what the model's chat template contains."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CallFormat:
    """One way to write calls in an answer.

    An answer with calls is: text, ``trigger``, ``begin``, then for each call ``before``, the name, ``middle``, the
    arguments as a JSON object, ``after``, with ``between`` from one call to the next, and ``close`` in the end.
    Without a trigger the answer is nothing but one call. ``contains`` and ``lacks``: of the template. ``native``: the
    template takes ``tools`` and past calls itself; else they are put into plain messages, results within ``result``.
    ``markers`` are control tokens of its vocabulary that belong to the text of a call.
    """

    name: str
    trigger: str
    before: str
    middle: str
    after: str
    begin: str = ""
    between: str = ""
    close: str = ""
    many: bool = True
    contains: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    native: bool = True
    result: tuple[str, str] = ("", "")
    markers: tuple[str, ...] = ()
    short_ids: bool = False

    @property
    def bare_name(self) -> bool:
        """The name stands outside the JSON."""
        return "{" not in self.before


FORMATS = (
    CallFormat(
        "mistral-args",
        trigger="[TOOL_CALLS]", before="", middle="[ARGS]", after="", between="[TOOL_CALLS]",
        contains=("[TOOL_CALLS]", "[ARGS]"), markers=("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"), short_ids=True,
    ),
    CallFormat(
        "mistral",
        trigger="[TOOL_CALLS]", begin="[", before='{"name": "', middle='", "arguments": ', after="}", between=", ",
        close="]", contains=("[TOOL_CALLS]", "[AVAILABLE_TOOLS]"), markers=("[TOOL_CALLS]",), short_ids=True,
    ),
    CallFormat(
        "hermes",
        trigger="<tool_call>", before='\n{"name": "', middle='", "arguments": ', after="}\n</tool_call>",
        between="\n<tool_call>", contains=("<tool_call>", '"arguments', "tools"),
        lacks=("<function=", "<arg_key>", "<tool_calls>"), markers=("<tool_call>", "</tool_call>"),
    ),
    CallFormat(
        "llama3",
        trigger="", before='{"name": "', middle='", "parameters": ', after="}", many=False,
        contains=("<|start_header_id|>", '"parameters"', "tools"), markers=("<|python_tag|>",),
    ),
    CallFormat(
        "gemma",
        trigger="```tool_code", before='\n{"name": "', middle='", "parameters": ', after="}\n```",
        between="\n```tool_code", contains=("<start_of_turn>",), lacks=("tools",), native=False,
        result=("```tool_output\n", "\n```"),
    ),
)  # fmt: skip
"""The first row that fits is taken."""

GENERIC = CallFormat(
    "generic",
    trigger="<tool_call>", before='\n{"name": "', middle='", "arguments": ', after="}\n</tool_call>",
    between="\n<tool_call>", native=False, result=("<tool_response>\n", "\n</tool_response>"),
)  # fmt: skip
"""For templates that know no tools, or write calls in a way that has no row: the model is told in words."""

PYTHON_TAG = "<|python_tag|>"
"""Llama 3 may put it in front of a call."""

CALL_ID = "[CALL_ID]"
"""Mistral may put it and an identifier of its own between name and arguments."""


def format_of(template: str | None) -> CallFormat:
    """The format of a model with this chat template."""
    if template is None:
        return GENERIC
    for row in FORMATS:
        if all(text in template for text in row.contains) and not any(text in template for text in row.lacks):
            return row
    return GENERIC
