"""The requests of the OpenAI API, field by field: each is honoured, or refused by name.

A field that is here but not served takes only the values that ask for nothing (`only`). A field that is not here
is refused as unknown.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    StrictBool,
    StrictInt,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from llmlite.serve.fields import Strict, Text, between, only, unicode_text
from llmlite.serve.fields_output import (
    MAX_TOOLS,
    AllowedTools,
    NamedTool,
    ResponseFormat,
    StructuredOutputs,
    Tool,
    ToolCall,
)

MAX_CHOICES = 128


def _stop_list(value: object) -> list[str]:
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(stops) > 16 or not all(0 < len(stop) <= 1024 for stop in stops):
        raise PydanticCustomError("stop", "takes up to 16 strings of 1 to 1024 characters")
    return [unicode_text(stop) for stop in stops]


def _bias_table(value: object) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > 1024:
        raise PydanticCustomError("logit_bias", "must be an object of up to 1024 token ids")
    for token, bias in value.items():
        if not (isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 10):
            raise PydanticCustomError("logit_bias", "keys must be token ids, written as strings of digits")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise PydanticCustomError("logit_bias", "values must be numbers from -100 to 100")
    return {int(token): float(bias) for token, bias in value.items()}


STOP = {"type": "string", "minLength": 1, "maxLength": 1024}
STOPS = {"anyOf": [STOP, {"type": "array", "items": STOP, "maxItems": 16}, {"type": "null"}]}
BIASES = {
    "anyOf": [
        {
            "type": "object",
            "maxProperties": 1024,
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        },
        {"type": "null"},
    ]
}
"""What `_stop_list` and `_bias_table` take, for the OpenAPI document."""


Breaker = Annotated[Text, Field(min_length=1, max_length=40)]


class StreamOptions(Strict):
    include_usage: StrictBool | None = None
    include_obfuscation: Annotated[Any, only(False)] = None


class Generating(Strict):
    """What chat and plain completions share. Null means the default, as OpenAI has it.

    Extensions: ``top_k`` draws from the k likeliest tokens (0: from all), ``min_p`` only from those with at least
    this share of the likeliest one's probability, ``typical_p`` from those whose surprise is nearest to the expected
    one; ``repetition_penalty`` divides the logits of the ``repeat_last_n`` last tokens of prompt and reply (-1: of
    all), ``dry_multiplier`` penalizes runs that stood there before; ``grammar`` (GBNF, as llama-server takes it) and
    ``structured_outputs`` (as vLLM takes it) hold the answer to a grammar.
    """

    model: Text
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, between(1, MAX_CHOICES)] | None = None
    max_tokens: Annotated[int, between(0, 2**31)] | None = None
    temperature: Annotated[float, between(0, 2)] | None = None
    top_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    top_k: Annotated[int, between(0, 2**31)] | None = None
    min_p: Annotated[float, between(0, 1)] | None = None
    typical_p: Annotated[float, Field(strict=True, gt=0, le=1)] | None = None
    repetition_penalty: Annotated[float, between(0.01, 100)] | None = None
    repeat_last_n: Annotated[int, between(-1, 2**31)] | None = None
    dry_multiplier: Annotated[float, between(0, 100)] | None = None
    dry_base: Annotated[float, between(1, 100)] | None = None
    dry_allowed_length: Annotated[int, between(1, 2**31)] | None = None
    dry_penalty_last_n: Annotated[int, between(-1, 2**31)] | None = None
    dry_sequence_breakers: Annotated[list[Breaker], Field(max_length=16)] | None = None
    seed: Annotated[int, between(-(2**63), 2**63 - 1)] | None = None
    stop: Annotated[Any, AfterValidator(_stop_list), WithJsonSchema(STOPS), Field(default_factory=list)]
    frequency_penalty: Annotated[float, between(-2, 2)] | None = None
    presence_penalty: Annotated[float, between(-2, 2)] | None = None
    logit_bias: Annotated[Any, AfterValidator(_bias_table), WithJsonSchema(BIASES), Field(default_factory=dict)]
    user: Annotated[Text | None, Field(description="an identifier; never changes an answer")] = None
    grammar: Text | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _stream_options_with_stream(self) -> Generating:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "only allowed with stream: true", {"param": "stream_options"})
        if self.grammar is not None and self.structured_outputs is not None:
            raise PydanticCustomError("grammar", "does not go with structured_outputs", {"param": "grammar"})
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TextPart(Strict):
    type: Literal["text"]
    text: Text


def _content_kind(value: object) -> str | None:
    return STRING if isinstance(value, str) else LIST if isinstance(value, list) else None


def _prompt_kind(value: object) -> str | None:
    if not isinstance(value, list):
        return STRING if isinstance(value, str) else None
    first = value[0] if value else ""
    return LIST if isinstance(first, str) else IDS if isinstance(first, int) else ID_LISTS


def _choice_kind(value: object) -> str | None:
    if isinstance(value, str):
        return STRING
    kind = value.get("type") if isinstance(value, dict) else None
    return {"function": NAMED, "allowed_tools": ALLOWED}.get(kind) if isinstance(kind, str) else None


STRING, LIST, IDS, ID_LISTS, NAMED, ALLOWED = BRANCHES = (
    "<string>", "<list>", "<ids>", "<id lists>", "<named>", "<allowed>",
)  # fmt: skip
Content = Annotated[
    Annotated[Text, Tag(STRING)] | Annotated[list[TextPart], Tag(LIST)],
    Discriminator(
        _content_kind, custom_error_type="content", custom_error_message="must be a string or a list of text parts"
    ),
]
Prompt = Annotated[
    Annotated[Text, Tag(STRING)]
    | Annotated[list[Text], Tag(LIST)]
    | Annotated[list[StrictInt], Tag(IDS)]
    | Annotated[list[list[StrictInt]], Tag(ID_LISTS)],
    Discriminator(
        _prompt_kind, custom_error_type="prompt", custom_error_message="must be text, token ids, or a list of either"
    ),
]


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag(STRING)]
    | Annotated[NamedTool, Tag(NAMED)]
    | Annotated[AllowedTools, Tag(ALLOWED)],
    Discriminator(
        _choice_kind,
        custom_error_type="tool_choice",
        custom_error_message="must be none, auto, required, or an object of type function or allowed_tools",
    ),
]


class Message(Strict):
    """One message; content parts other than text are refused, and names but for those of tools' results."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: Text | None = None
    refusal: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only()] = None
    tool_calls: Annotated[list[ToolCall] | None, Field(max_length=MAX_TOOLS)] = None
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def _as_its_role_has_it(self) -> Message:
        tool = self.role == "tool"
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise PydanticCustomError("missing", "is required", {"field": "content"})
        if self.name is not None and not tool:
            raise PydanticCustomError("unsupported", "this server does not support it", {"field": "name"})
        if self.tool_calls and self.role != "assistant":
            raise PydanticCustomError("tool_calls", "only the assistant calls tools", {"field": "tool_calls"})
        if tool and self.tool_call_id is None:
            raise PydanticCustomError("missing", "is required", {"field": "tool_call_id"})
        if self.tool_call_id is not None and not tool:
            raise PydanticCustomError("tool_call_id", "goes with role tool", {"field": "tool_call_id"})
        for number, call in enumerate(self.tool_calls or []):
            try:
                call.plain()
            except (ValueError, RecursionError):
                field = f"tool_calls.{number}.function.arguments"
                raise PydanticCustomError("arguments", "must be a JSON object as text", {"field": field}) from None
        return self

    def plain(self) -> dict[str, Any]:
        """As templates want it: text parts joined by newlines, "developer" under its older name "system"."""
        parts = [] if self.content is None else self.content
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": text}
        if self.tool_calls:
            message["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class ChatRequest(Generating):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, between(1, 2**31)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[int, between(0, 20)] | None = None
    safety_identifier: Annotated[Text | None, Field(description="an identifier; never changes an answer")] = None
    prompt_cache_key: Annotated[Text | None, Field(description="a hint; never changes an answer")] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only("none")] = None
    functions: Annotated[Any, only([])] = None
    metadata: Annotated[Any, only({})] = None
    modalities: Annotated[Any, only(["text"])] = None
    moderation: Annotated[Any, only()] = None
    parallel_tool_calls: StrictBool | None = None
    prediction: Annotated[Any, only()] = None
    prompt_cache_options: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only("in_memory")] = None
    reasoning_effort: Annotated[Any, only()] = None
    response_format: ResponseFormat | None = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    store: Annotated[Any, only(False)] = None
    tool_choice: ToolChoice | None = None
    tools: Annotated[list[Tool] | None, Field(max_length=MAX_TOOLS)] = None
    verbosity: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "only allowed with logprobs: true", {"param": "top_logprobs"})
        if self.max_tokens == 0:
            raise PydanticCustomError("max_tokens", "must be at least 1", {"param": "max_tokens"})
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise PydanticCustomError("max_tokens", "differs from max_completion_tokens", {"param": "max_tokens"})
        return self

    @model_validator(mode="after")
    def _tools_that_there_are(self) -> ChatRequest:
        called: set[str] = set()
        for number, message in enumerate(self.messages):
            called |= {call.id for call in message.tool_calls or []}
            if message.tool_call_id is not None and message.tool_call_id not in called:
                field = f"messages.{number}.tool_call_id"
                raise PydanticCustomError("tool_call_id", "no message before has a call with this id", {"param": field})
        names = [tool.function.name for tool in self.tools or []]
        if len(set(names)) < len(names):
            raise PydanticCustomError("tools", "two functions have the same name", {"param": "tools"})
        wanted = self.tool_names
        if not names and (wanted or self.tool_choice == "required"):
            raise PydanticCustomError("tool_choice", "only allowed with tools", {"param": "tool_choice"})
        if not names and self.parallel_tool_calls is not None:
            field = "parallel_tool_calls"
            raise PydanticCustomError(field, "only allowed with tools", {"param": field})
        if unknown := [name for name in wanted if name not in names]:
            reason = f"there is no function {unknown[0]!r} among the tools"
            raise PydanticCustomError("tool_choice", "{reason}", {"param": "tool_choice", "reason": reason})
        return self

    @property
    def tool_names(self) -> list[str]:
        """The functions that ``tool_choice`` names."""
        if isinstance(self.tool_choice, NamedTool):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedTools):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return []


class CompletionRequest(Generating):
    """POST /v1/completions. ``max_tokens`` 0 is allowed with ``echo``: it only scores the prompt."""

    prompt: Prompt
    logprobs: Annotated[int, between(0, 20)] | None = None
    echo: StrictBool | None = None
    best_of: Annotated[Any, only(1)] = None
    suffix: Annotated[Any, only("")] = None

    @model_validator(mode="after")
    def _consistent(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise PydanticCustomError("max_tokens", "0 is only allowed with echo: true", {"param": "max_tokens"})
        if not 1 <= len(self.prompts()) * (self.n or 1) <= MAX_CHOICES:
            message = f"prompts times n must lie between 1 and {MAX_CHOICES}"
            raise PydanticCustomError("prompt", message, {"param": "prompt"})
        return self

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one, each as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]
