"""What form a request wants its answer to have: the tools it may call, the grammar it follows."""

from __future__ import annotations

from typing import Any

from llmlite.serve.errors import ApiError
from llmlite.serve.fields_output import NamedTool
from llmlite.serve.schema import ChatRequest, Generating
from llmlite.serve.structured.grammar import Grammar, choice_grammar, json_grammar, regex_grammar, text_grammar
from llmlite.serve.tools.calling import Calling, Function
from llmlite.serve.tools.formats import CallFormat
from llmlite.serve.tools.grammar import calling_grammar

NOTHING: dict[str, Any] = {"type": "object", "properties": {}}


def calling_of(request: ChatRequest, form: CallFormat) -> Calling | None:
    """The tools of a request; None without, or where ``tool_choice`` is none."""
    if not request.tools or request.tool_choice == "none":
        return None
    told = tuple(
        Function(
            tool.function.name,
            tool.function.description,
            NOTHING if tool.function.parameters is None else tool.function.parameters,
            bool(tool.function.strict),
            f"tools.{number}.function",
        )
        for number, tool in enumerate(request.tools)
    )
    choice, wanted = request.tool_choice, request.tool_names
    functions = tuple(function for function in told if function.name in wanted) if wanted else told
    named = isinstance(choice, NamedTool)
    if choice is None or isinstance(choice, str) or named:
        required = named or choice == "required"
    else:
        required = choice.allowed_tools.mode == "required"
    many = form.many and not named and request.parallel_tool_calls is not False
    return Calling(form, told, functions, required, many)


def grammar_of(request: Generating, calling: Calling | None) -> Grammar | None:
    """The grammar that the answer follows; None for free text. Raises `InvalidGrammar`, `ApiError` for two of them."""
    extension = _extension(request)
    wanted = request.response_format.wanted() if isinstance(request, ChatRequest) and request.response_format else None
    if extension is not None and (wanted is not None or calling is not None):
        message = f"{extension.field}: does not go with response_format or tools"
        raise ApiError(400, message, extension.field, "invalid_value")
    if calling is not None:
        if wanted is not None and not calling.required and not calling.format.trigger:
            message = "response_format: this model writes calls as bare JSON, which can't be told from such an answer"
            raise ApiError(400, message, "response_format", "unsupported_parameter")
        schema, _, strict = wanted or (None, "", False)
        return calling_grammar(calling, schema, strict)
    return extension if wanted is None else json_grammar(*wanted)


def _extension(request: Generating) -> Grammar | None:
    if request.grammar is not None:
        return text_grammar(request.grammar, "grammar")
    wanted = request.structured_outputs
    if wanted is None:
        return None
    if wanted.json_ is not None:
        return json_grammar(wanted.json_, "structured_outputs.json", True)
    if wanted.regex is not None:
        return regex_grammar(wanted.regex, "structured_outputs.regex")
    if wanted.choice is not None:
        return choice_grammar(wanted.choice, "structured_outputs.choice")
    assert wanted.grammar is not None
    return text_grammar(wanted.grammar, "structured_outputs.grammar")
