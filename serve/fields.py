"""The parts that request models are made of: types that take nothing else for themselves, and refusals by name."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictStr
from pydantic_core import PydanticCustomError


def only(*neutral: object) -> AfterValidator:
    """For a field this server doesn't serve: null and ``neutral`` ask for nothing and pass."""

    def check(value: object) -> object:
        if value is None or any(type(value) is type(same) and value == same for same in neutral):
            return value
        raise PydanticCustomError("unsupported", "this server does not support it")

    return AfterValidator(check)


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
