"""The fields of a request that say what form the answer has: schemas, grammars, tools."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

from llmlite.serve.fields import Strict, Text

MAX_TOOLS = 128
JsonObject = dict[str, Any]


class JsonSchema(Strict):
    """``strict``: a keyword that can't be held to is refused; else the answer keeps to all that can."""

    name: Annotated[Text, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None
    strict: StrictBool | None = None


class ResponseFormat(Strict):
    """OpenAI's, and with type json_object a ``schema`` as llama-server takes it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: Annotated[JsonObject | None, Field(alias="schema")] = None

    @model_validator(mode="after")
    def _consistent(self) -> ResponseFormat:
        if (self.json_schema is not None) != (self.type == "json_schema"):
            message = "json_schema goes with type json_schema, and only with it"
            raise PydanticCustomError("json_schema", message, {"param": "response_format.json_schema"})
        if self.schema_ is not None and self.type != "json_object":
            raise PydanticCustomError("schema", "goes with type json_object", {"param": "response_format.schema"})
        return self

    def wanted(self) -> tuple[JsonObject, str, bool] | None:
        """The schema of the answer, the field it is in, and whether it is strict; None for plain text."""
        if self.json_schema is not None:
            schema, field = self.json_schema.schema_, "response_format.json_schema.schema"
            return ({"type": "object"} if schema is None else schema), field, bool(self.json_schema.strict)
        if self.type == "json_object":
            return self.schema_ or {"type": "object"}, "response_format.schema", self.schema_ is not None
        return None


class StructuredOutputs(Strict):
    """An extension, spelled as vLLM's: exactly one of its fields. ``grammar`` is GBNF or Lark."""

    json_: Annotated[JsonObject | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: list[Text] | None = None
    grammar: Text | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        if sum(value is not None for value in (self.json_, self.regex, self.choice, self.grammar)) != 1:
            message = "takes exactly one of json, regex, choice and grammar"
            raise PydanticCustomError("structured_outputs", message, {"param": "structured_outputs"})
        return self


class FunctionDefinition(Strict):
    name: Annotated[Text, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: Text | None = None
    parameters: JsonObject | None = None
    strict: StrictBool | None = None


class Tool(Strict):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Strict):
    name: Text


class NamedTool(Strict):
    type: Literal["function"]
    function: FunctionName


class AllowedToolList(Strict):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedTools(Strict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedToolList


class CalledFunction(Strict):
    name: Text
    arguments: Text


class ToolCall(Strict):
    """A call that the assistant made earlier."""

    id: Text
    type: Literal["function"]
    function: CalledFunction
    index: Annotated[int | None, Field(description="left over from a stream; never changes an answer")] = None

    def plain(self) -> JsonObject:
        """As templates want it: the arguments as an object. Raises ValueError where they are none."""
        arguments = json.loads(self.function.arguments or "{}")
        if not isinstance(arguments, dict):
            raise ValueError("not an object")
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}
