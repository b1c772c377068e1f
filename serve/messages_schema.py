"""The request of Anthropic's Messages API, and the chat request that it amounts to."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictBool, StrictStr, Tag

from llmlite.serve.errors import ApiError
from llmlite.serve.retelling import chat_request
from llmlite.serve.schema import LIST, STRING, ChatRequest, Strict, Text, between, only

NAMES = {"max_completion_tokens": "max_tokens", "response_format": "output_config.format", "stop": "stop_sequences"}
"""What this API calls a field of a chat request."""


class CacheControl(Strict):
    """A hint: prefixes are always reused here, so it never changes an answer."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Strict):
    cache_control: CacheControl | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: Text
    citations: Annotated[Any, only([])] = None


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: Text
    name: Text
    input: dict[str, Any]
    caller: Annotated[Any, only()] = None
    toolset_name: Annotated[Any, only()] = None


def _kind(value: object) -> str | None:
    return STRING if isinstance(value, str) else LIST if isinstance(value, list) else None


Texts = Annotated[
    Annotated[Text, Tag(STRING)] | Annotated[list[TextBlock], Tag(LIST)],
    Discriminator(_kind, custom_error_type="content", custom_error_message="must be a string or a list of text blocks"),
]


class ToolResultBlock(Block):
    """What a tool gave; with ``is_error`` the model reads "Error: " in front of it."""

    type: Literal["tool_result"]
    tool_use_id: Text
    content: Texts | None = None
    is_error: StrictBool | None = None
    toolset_name: Annotated[Any, only()] = None


Content = Annotated[
    Annotated[Text, Tag(STRING)]
    | Annotated[
        list[Annotated[TextBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")]], Tag(LIST)
    ],
    Discriminator(_kind, custom_error_type="content", custom_error_message="must be a string or a list of blocks"),
]  # fmt: skip


class Turn(Strict):
    role: Literal["user", "assistant"]
    content: Content

    def blocks(self) -> list[TextBlock | ToolUseBlock | ToolResultBlock]:
        if isinstance(self.content, str):
            return [TextBlock(type="text", text=self.content)]
        return self.content


class Tool(Strict):
    """A tool of the client's own; the tools that Anthropic's servers run are refused."""

    type: Literal["custom"] | None = None
    name: StrictStr
    input_schema: dict[str, Any]
    description: Text | None = None
    strict: StrictBool | None = None
    cache_control: CacheControl | None = None
    allowed_callers: Annotated[Any, only(["direct"])] = None
    defer_loading: Annotated[Any, only(False)] = None
    eager_input_streaming: Annotated[bool | None, Field(description="streams as it comes, always")] = None
    input_examples: Annotated[Any, only([])] = None


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: StrictBool | None = None


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Strict):
    format: OutputFormat | None = None
    effort: Annotated[Any, only()] = None


class Metadata(Strict):
    user_id: Annotated[Text | None, Field(description="an identifier; never changes an answer")] = None


class Conversation(Strict):
    """What a message and its count of tokens share."""

    model: Text
    messages: Annotated[list[Turn], Field(min_length=1)]
    system: Texts | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    thinking: Annotated[Any, only({"type": "disabled"})] = None  # replies are not told apart into thoughts and words
    cache_control: CacheControl | None = None

    def as_chat(self) -> ChatRequest:
        """The chat request that asks for the same. Raises 400 for what the chat endpoint refuses."""
        messages, places = self._messages()
        choice, form = self.tool_choice, None if self.output_config is None else self.output_config.format
        fields = {
            "model": self.model,
            "messages": messages,
            "tools": None if self.tools is None else [_function(tool) for tool in self.tools],
            "tool_choice": None if choice is None else _choice(choice),
            "response_format": None if form is None else _format(form),
            **self._sampling(),
        }
        if choice is not None and choice.disable_parallel_tool_use is not None:
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        return chat_request(fields, NAMES, places)

    def _sampling(self) -> dict[str, Any]:
        return {}

    def _messages(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The messages of a chat, and for each the field that it came from."""
        messages: list[dict[str, Any]] = []
        places: list[str] = []
        if self.system is not None:
            messages.append({"role": "system", "content": _text(self.system)})
            places.append("system")
        for number, turn in enumerate(self.messages):
            place = f"messages.{number}"
            made = _of_assistant(turn, place) if turn.role == "assistant" else _of_user(turn, place)
            for message in made:
                if messages and message["role"] == messages[-1]["role"] != "tool":
                    messages[-1] = _combined(messages[-1], message)
                else:
                    messages.append(message)
                    places.append(place)
        if messages[-1]["role"] == "assistant":
            text = "the last turn is the assistant's own: this server does not continue a turn that was begun"
            raise ApiError(400, f"{places[-1]}: {text}", places[-1], "unsupported_parameter")
        return messages, places


class CountRequest(Conversation):
    """POST /v1/messages/count_tokens."""


class MessagesRequest(Conversation):
    """POST /v1/messages."""

    max_tokens: Annotated[int, between(1, 2**31)]
    stop_sequences: Annotated[list[Text], Field(max_length=16)] | None = None
    stream: StrictBool | None = None
    temperature: Annotated[float, between(0, 1)] | None = None
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    top_k: Annotated[int, between(0, 2**31)] | None = None
    metadata: Metadata | None = None
    container: Annotated[Any, only()] = None
    diagnostics: Annotated[Any, only()] = None
    inference_geo: Annotated[Any, only()] = None
    service_tier: Annotated[Any, only("auto", "standard_only")] = None
    speed: Annotated[Any, only("standard")] = None
    user_profile_id: Annotated[Any, only()] = None

    def _sampling(self) -> dict[str, Any]:
        """Stop sequences are not passed on: the answer must name the one that was met, so they are looked for there."""
        for stop in self.stop_sequences or []:
            if not 0 < len(stop) <= 1024:
                raise ApiError(400, "stop_sequences: each has 1 to 1024 characters", "stop_sequences", "invalid_value")
        return {
            "max_completion_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }


def _text(texts: str | list[TextBlock]) -> str:
    return texts if isinstance(texts, str) else "\n".join(block.text for block in texts)


def _of_user(turn: Turn, place: str) -> list[dict[str, Any]]:
    """Results of tools are messages of their own, in front of what the user says."""
    results, texts = [], []
    for block in turn.blocks():
        if isinstance(block, ToolResultBlock):
            content = ("Error: " if block.is_error else "") + _text(block.content or "")
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        elif isinstance(block, TextBlock):
            texts.append(block.text)
        else:
            raise _misplaced(place, "tool_use", "assistant")
    said = [{"role": "user", "content": "\n".join(texts)}] if texts or not results else []
    return results + said


def _of_assistant(turn: Turn, place: str) -> list[dict[str, Any]]:
    message: dict[str, Any] = {"role": "assistant", "content": None}
    texts, calls = [], []
    for block in turn.blocks():
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolUseBlock):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
        else:
            raise _misplaced(place, "tool_result", "user")
    if calls:
        message["tool_calls"] = calls
    message["content"] = "\n".join(texts) if texts or not calls else None
    return [message]


def _combined(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two turns of one speaker in a row are one."""
    texts = [message["content"] for message in (first, second) if message["content"] is not None]
    calls = [*first.get("tool_calls", []), *second.get("tool_calls", [])]
    content = "\n".join(texts) if texts else None
    return {"role": first["role"], "content": content, **({"tool_calls": calls} if calls else {})}


def _misplaced(place: str, block: str, role: str) -> ApiError:
    field = f"{place}.content"
    return ApiError(400, f"{field}: a {block} block belongs to the {role}", field, "invalid_value")


def _function(tool: Tool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema,
                "strict": tool.strict}  # fmt: skip
    return {"type": "function", "function": {name: value for name, value in function.items() if value is not None}}


def _choice(choice: ToolChoice) -> str | dict[str, Any]:
    if choice.type == "tool":
        if choice.name is None:
            raise ApiError(400, "tool_choice.name: is required", "tool_choice.name", "missing_required_parameter")
        return {"type": "function", "function": {"name": choice.name}}
    if choice.name is not None:
        message = f"tool_choice.name: not allowed with type {choice.type!r}"
        raise ApiError(400, message, "tool_choice.name", "invalid_value")
    return {"auto": "auto", "any": "required", "none": "none"}[choice.type]


def _format(form: OutputFormat) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "output", "schema": form.schema_, "strict": True}}
