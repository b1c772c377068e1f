"""The requests of the OpenAI API, field by field: each is honoured, or refused by name.

A field that is here but not served takes only the values that ask for nothing (`only`). A field that is not here
is refused as unknown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StrictBool,
    StrictInt,
    StrictStr,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

MAX_CHOICES = 128


@dataclass(frozen=True)
class Only:
    """See `only`. The OpenAPI document lists what passes."""

    values: tuple[object, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.values]}

    def _check(self, value: object) -> object:
        if value is None or any(type(value) is type(same) and value == same for same in self.values):
            return value
        raise PydanticCustomError("unsupported", "this server does not support it")


def only(*neutral: object) -> Only:
    """For a field this server doesn't serve: null and ``neutral`` ask for nothing and pass."""
    return Only(neutral)


def _unicode(text: str) -> str:
    """JSON can spell half a surrogate pair; no tokenizer can read it."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("unicode", "has half a surrogate pair in it, which is no character")
    return text


Text = Annotated[StrictStr, AfterValidator(_unicode)]


def _stop_list(value: object) -> list[str]:
    if value is None:
        return []
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise PydanticCustomError("stop", "must be a string or a list of strings")
    if len(stops) > 16 or not all(0 < len(stop) <= 1024 for stop in stops):
        raise PydanticCustomError("stop", "takes up to 16 strings of 1 to 1024 characters")
    return [_unicode(stop) for stop in stops]


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


def between(low: float, high: float) -> Any:
    """A number of the annotated type, not another that could be turned into it, within the range."""
    return Field(strict=True, ge=low, le=high)


class Strict(BaseModel):
    """Refuses fields it doesn't know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    include_usage: StrictBool | None = None
    include_obfuscation: Annotated[Any, only(False)] = None


class Generating(Strict):
    """What chat and plain completions share. Null means the default, as OpenAI has it.

    Two extensions: ``top_k`` draws from the k likeliest tokens (0: from all), ``min_p`` only from those with at least
    this share of the likeliest one's probability.
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
    seed: Annotated[int, between(-(2**63), 2**63 - 1)] | None = None
    stop: Annotated[Any, AfterValidator(_stop_list), WithJsonSchema(STOPS)] = []
    frequency_penalty: Annotated[float, between(-2, 2)] | None = None
    presence_penalty: Annotated[float, between(-2, 2)] | None = None
    logit_bias: Annotated[Any, AfterValidator(_bias_table), WithJsonSchema(BIASES)] = {}
    user: Annotated[Text | None, Field(description="an identifier; never changes an answer")] = None

    @model_validator(mode="after")
    def _stream_options_with_stream(self) -> Generating:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "only allowed with stream: true", {"param": "stream_options"})
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


STRING, LIST, IDS, ID_LISTS = BRANCHES = ("<string>", "<list>", "<ids>", "<id lists>")
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


class Message(Strict):
    """One message; content parts other than text, names and tool calls are refused."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Annotated[Any, only()] = None
    refusal: Annotated[Any, only()] = None
    audio: Annotated[Any, only()] = None
    annotations: Annotated[Any, only([])] = None
    function_call: Annotated[Any, only()] = None
    tool_calls: Annotated[Any, only([])] = None

    def plain(self) -> dict[str, str]:
        """As templates want it: text parts joined by newlines, "developer" under its older name "system"."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


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
    parallel_tool_calls: Annotated[Any, only()] = None
    prediction: Annotated[Any, only()] = None
    prompt_cache_options: Annotated[Any, only()] = None
    prompt_cache_retention: Annotated[Any, only("in_memory")] = None
    reasoning_effort: Annotated[Any, only()] = None
    response_format: Annotated[Any, only({"type": "text"})] = None
    service_tier: Annotated[Any, only("auto", "default")] = None
    store: Annotated[Any, only(False)] = None
    tool_choice: Annotated[Any, only("none")] = None
    tools: Annotated[Any, only([])] = None
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
