"""The parts that request models are made of: types that take nothing else for themselves, and refusals by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StrictStr,
)
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function


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


def unicode_text(text: str) -> str:
    """JSON can spell half a surrogate pair; no tokenizer can read it."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise PydanticCustomError("unicode", "has half a surrogate pair in it, which is no character")
    return text


Text = Annotated[StrictStr, AfterValidator(unicode_text)]


def between(low: float, high: float) -> Any:
    """A number of the annotated type, not another that could be turned into it, within the range."""
    return Field(strict=True, ge=low, le=high)


class Strict(BaseModel):
    """Refuses fields it doesn't know."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
