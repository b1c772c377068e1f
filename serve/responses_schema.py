"""The request of OpenAI's Responses API, and the chat request that it amounts to.

Nothing is stored: ``store: true`` and whatever refers to a stored response is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, StrictBool, Tag
from pydantic_core import PydanticCustomError

from llmlite.serve.retelling import chat_request
from llmlite.serve.schema import LIST, STRING, ChatRequest, Strict, Text, between, only

LOGPROBS = "message.output_text.logprobs"
REASONING = "reasoning.encrypted_content"  # there is none, so there is nothing to leave out
MESSAGE, CALL, OUTPUT = ITEM_BRANCHES = ("<message>", "<function_call>", "<function_call_output>")

NAMES = {"max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
"""What this API calls a field of a chat request."""


class ContentPart(Strict):
    """Text that a user or the model wrote; what an earlier answer said about it is taken and not used."""

    type: Literal["input_text", "output_text"]
    text: Text
    annotations: Annotated[list[Any] | None, Field(description="never changes an answer")] = None
    logprobs: Annotated[list[Any] | None, Field(description="never changes an answer")] = None


def _kind(value: object) -> str | None:
    return STRING if isinstance(value, str) else LIST if isinstance(value, list) else None


Content = Annotated[
    Annotated[Text, Tag(STRING)] | Annotated[list[ContentPart], Tag(LIST)],
    Discriminator(_kind, custom_error_type="content", custom_error_message="must be a string or a list of text parts"),
]


def _text(content: str | list[ContentPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class Item(Strict):
    """What every input item may carry when an output item is sent back."""

    id: Annotated[Text | None, Field(description="never changes an answer")] = None
    status: Annotated[Literal["in_progress", "completed", "incomplete"] | None, Field()] = None


class MessageItem(Item):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    phase: Annotated[Any, only()] = None


class CallItem(Item):
    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Text


class OutputItem(Item):
    type: Literal["function_call_output"]
    call_id: Text
    output: Content


def _item_kind(value: object) -> str | None:
    """Pydantic's own models have attributes, JSON has keys."""
    found = value.get("type", "message") if isinstance(value, Mapping) else None
    return f"<{found}>" if f"<{found}>" in ITEM_BRANCHES else None


InputItem = Annotated[
    Annotated[MessageItem, Tag(MESSAGE)] | Annotated[CallItem, Tag(CALL)] | Annotated[OutputItem, Tag(OUTPUT)],
    Discriminator(
        _item_kind,
        custom_error_type="item",
        custom_error_message="must be an item of type message, function_call or function_call_output",
    ),
]

Input = Annotated[
    Annotated[Text, Tag(STRING)] | Annotated[list[InputItem], Tag(LIST), Field(min_length=1)],
    Discriminator(_kind, custom_error_type="input", custom_error_message="must be a string or a list of items"),
]


class TextConfig(Strict):
    format: Annotated[dict[str, Any] | None, Field(description="as response_format of chat completions, flat")] = None
    verbosity: Annotated[Any, only()] = None


class ResponseStreamOptions(Strict):
    include_obfuscation: Annotated[Any, only(False)] = None


def _metadata(value: dict[str, str] | None) -> dict[str, str] | None:
    if value and (len(value) > 16 or any(len(key) > 64 or len(text) > 512 for key, text in value.items())):
        raise PydanticCustomError("metadata", "takes up to 16 keys of 64 characters with values of 512")
    return value


class ResponsesRequest(Strict):
    """POST /v1/responses."""

    model: Text
    input: Input
    instructions: Text | None = None
    max_output_tokens: Annotated[int, between(1, 2**31)] | None = None
    temperature: Annotated[float, between(0, 2)] | None = None
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    top_logprobs: Annotated[int, between(0, 20)] | None = None
    text: TextConfig | None = None
    tools: Annotated[list[dict[str, Any]] | None, Field(description="functions; the model's own are refused")] = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: StrictBool | None = None
    stream: StrictBool | None = None
    stream_options: ResponseStreamOptions | None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None
    metadata: Annotated[dict[Text, Text] | None, AfterValidator(_metadata), Field(description="given back")] = None
    user: Annotated[Text | None, Field(description="an identifier; never changes an answer")] = None
    safety_identifier: Annotated[Text | None, Field(description="an identifier; never changes an answer")] = None
    prompt_cache_key: Annotated[Text | None, Field(description="a hint; never changes an answer")] = None
    access_programs: Annotated[Any, only()] = None
    background: Annotated[Any, only(False)] = None
    background_options: Annotated[Any, only()] = None
    context_management: Annotated[Any, only([])] = None
    conversation: Annotated[Any, only()] = None
    image: Annotated[Any, only()] = None
    max_tool_calls: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    previous_response_id: Annotated[Any, only()] = None
    prompt: Annotated[Any, only()] = None
    prompt_cache_options: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only("in_memory")] = None
    reasoning: Annotated[Any, only({})] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    store: Annotated[Any, only(False)] = None
    truncation: Annotated[Any, only("disabled")] = None

    @property
    def logprobs(self) -> bool:
        return self.top_logprobs is not None or LOGPROBS in (self.include or [])

    def as_chat(self) -> ChatRequest:
        """The chat request that asks for the same. Raises 400 for what the chat endpoint refuses."""
        messages, places = self._messages()
        fields = {
            "model": self.model,
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": self.logprobs or None,
            "top_logprobs": self.top_logprobs,
            "tools": None if self.tools is None else [_nested_tool(tool) for tool in self.tools],
            "tool_choice": _nested_choice(self.tool_choice),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": _nested_format(None if self.text is None else self.text.format),
            "user": self.user,
        }
        return chat_request(fields, NAMES, places)

    def _messages(self) -> tuple[list[dict[str, Any]], list[str]]:
        """The messages of a chat, and for each the field that it came from. Calls side by side share a message."""
        messages: list[dict[str, Any]] = []
        places: list[str] = []

        def add(message: dict[str, Any], place: str) -> None:
            messages.append(message)
            places.append(place)

        if self.instructions is not None:
            add({"role": "system", "content": self.instructions}, "instructions")
        if isinstance(self.input, str):
            add({"role": "user", "content": self.input}, "input")
            return messages, places
        for number, item in enumerate(self.input):
            place = f"input.{number}"
            if isinstance(item, MessageItem):
                add({"role": item.role, "content": _text(item.content)}, place)
            elif isinstance(item, OutputItem):
                add({"role": "tool", "tool_call_id": item.call_id, "content": _text(item.output)}, place)
            else:
                if not messages or messages[-1]["role"] != "assistant":
                    add({"role": "assistant", "content": None}, place)
                call = {"name": item.name, "arguments": item.arguments}
                calls = messages[-1].setdefault("tool_calls", [])
                calls.append({"id": item.call_id, "type": "function", "function": call})
        return messages, places


def _nested_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Responses have a function's fields beside its type, chat has them under "function"; its nulls mean "absent"."""
    if tool.get("type") != "function":
        return tool
    function = {name: value for name, value in tool.items() if name != "type" and value is not None}
    return {"type": "function", "function": function}


def _nested_choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {name: value for name, value in choice.items() if name != "type"}}
    return choice


def _nested_format(form: dict[str, Any] | None) -> dict[str, Any] | None:
    if form is None or form.get("type") != "json_schema":
        return form
    schema = {name: value for name, value in form.items() if name != "type" and value is not None}
    return {"type": "json_schema", "json_schema": schema}
