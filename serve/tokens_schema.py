"""The requests of /tokenize and /detokenize, as llama-server and vLLM have them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, StrictBool, StrictInt, model_validator
from pydantic_core import PydanticCustomError

from llmlite.serve.schema import Message, Strict, Text, only


class TokenizeRequest(Strict):
    """POST /tokenize: a text (``content``) or a conversation (``messages``).

    ``add_special`` puts the token in front that the model wants at the beginning of a text; a conversation has what
    its template gives it. ``with_pieces`` tells each token's text, too.
    """

    model: Annotated[Text | None, Field(description="the first model, where none is named")] = None
    content: Text | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    add_special: StrictBool | None = None
    with_pieces: StrictBool | None = None
    parse_special: Annotated[Any, only(True)] = None
    add_generation_prompt: Annotated[Any, only(True)] = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.content is None) == (self.messages is None):
            raise PydanticCustomError("content", "give either content or messages", {"param": "content"})
        if self.add_special is not None and self.messages is not None:
            raise PydanticCustomError("add_special", "only allowed with content", {"param": "add_special"})
        return self


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Annotated[Text | None, Field(description="the first model, where none is named")] = None
    tokens: list[StrictInt]
