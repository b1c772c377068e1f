"""How to talk in the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmlite.errors import InputError


@dataclass(frozen=True)
class ChatSettings:
    """The settings of `llmlite chat`; each field's help is the command line's."""

    system: str | None = field(default=None, metadata={"help": "what the model is told before the conversation"})
    model: str | None = field(default=None, metadata={"help": "the model's name there (default: the server's first)"})
    temperature: float | None = field(
        default=None, metadata={"help": "0: always the likeliest token (server's default: 1)"}
    )
    top_p: float | None = field(
        default=None, metadata={"help": "draw from the likeliest tokens of this total probability"}
    )
    max_tokens: int | None = field(
        default=None, metadata={"help": "longest reply (default: what the context has room for)"}
    )
    seed: int | None = field(default=None, metadata={"help": "the same replies again"})
    context: int | None = field(default=None, metadata={"help": "of an artifact: tokens of the conversation"})
    threads: int | None = field(default=None, metadata={"help": "of an artifact: CPU threads"})

    def __post_init__(self) -> None:
        for name, least in (("temperature", 0), ("max_tokens", 1), ("context", 1), ("threads", 1)):
            if (value := vars(self)[name]) is not None and not value >= least:
                raise InputError(f"{name} {value}: must be at least {least}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p}: must lie between 0 and 1")

    @property
    def sampling(self) -> dict[str, float | int]:
        """The fields of a request that were set."""
        names = ("temperature", "top_p", "max_tokens", "seed")
        return {name: vars(self)[name] for name in names if vars(self)[name] is not None}
