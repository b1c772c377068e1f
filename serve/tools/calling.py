"""What one request says of tools, settled: which functions may be called, whether one must be, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmlite.serve.tools.formats import CallFormat


@dataclass(frozen=True)
class Function:
    """A function that the model may call; ``field`` is where the request has it. ``strict``: see `prepared`."""

    name: str
    description: str | None
    parameters: dict[str, Any]
    strict: bool
    field: str

    def described(self) -> dict[str, Any]:
        """As templates and prompts show it: OpenAI's function object without ``strict``."""
        described = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {key: value for key, value in described.items() if value is not None}


@dataclass(frozen=True)
class Calling:
    """``told``: the functions that the prompt shows; ``functions``: those of them that may be called.

    ``required``: the answer is calls and nothing else. ``many``: more than one may come.
    """

    format: CallFormat
    told: tuple[Function, ...]
    functions: tuple[Function, ...]
    required: bool
    many: bool

    def tools(self) -> list[dict[str, Any]]:
        """OpenAI's tool objects, for a template that takes them."""
        return [{"type": "function", "function": function.described()} for function in self.told]
