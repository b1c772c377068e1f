"""The request of OpenAI's embeddings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from llmlite.serve.schema import Prompt, Strict, Text, between

MAX_INPUTS = 2048


class EmbeddingsRequest(Strict):
    """POST /v1/embeddings. ``dimensions``: only so many of the first ones, brought to length 1 again."""

    model: Text
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, between(1, 2**31)] | None = None
    user: Annotated[Text | None, Field(description="an identifier; never changes an answer")] = None

    @model_validator(mode="after")
    def _some(self) -> EmbeddingsRequest:
        if not 1 <= len(self.inputs()) <= MAX_INPUTS:
            raise PydanticCustomError("input", f"takes 1 to {MAX_INPUTS} texts", {"param": "input"})
        return self

    def inputs(self) -> list[str | list[int]]:
        """The texts one by one, each as text or as token ids."""
        if isinstance(self.input, str):
            return [self.input]
        if self.input and isinstance(self.input[0], int):
            return [self.input]  # type: ignore[list-item]
        return list(self.input)  # type: ignore[arg-type]
