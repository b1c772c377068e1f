"""How a server is to be run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmlite.errors import InputError


@dataclass(frozen=True)
class ServeSettings:
    """The settings of `llmlite serve`; each field's help is the command line's."""

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 lets others in"})
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 takes a free one"})
    name: str | None = field(default=None, metadata={"help": "model name that clients use (default: the artifact's)"})
    context: int | None = field(
        default=None, metadata={"help": "tokens that prompt and reply may have together (default: as trained)"}
    )
    parallel: int = field(default=1, metadata={"help": "requests that run in turns; each has a context of its own"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: all that may be used)"})
    max_queue: int = field(default=64, metadata={"help": "sequences that may wait; more get status 429"})
    max_body: int = field(default=16 * 2**20, metadata={"help": "largest request body in bytes; more gets status 413"})
    idle_unload: float | None = field(
        default=None, metadata={"help": "seconds after which a model that nobody uses is unloaded (default: never)"}
    )
    api_key_file: Path | None = field(
        default=None, metadata={"help": "file with one API key a line; without it no key is asked for"}
    )

    engine: Literal["auto", "upstream", "vllm"] = field(
        default="auto",
        metadata={
            "help": "what runs the model: auto (an engine in this process, or the server behind a URL), upstream "
            "(the server behind a URL), vllm (a vLLM that is started for it)"
        },
    )
    upstream_key_file: Path | None = field(
        default=None, metadata={"help": "file with the API key that the server behind a URL asks for"}
    )
    upstream_timeout: float = field(
        default=600.0, metadata={"help": "seconds for which a server behind this one may send nothing"}
    )

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise InputError(f"port {self.port}: must lie between 0 and 65535")
        if self.parallel > 64:
            raise InputError(f"parallel {self.parallel}: must be at most 64")
        for name, value in [
            ("context", self.context), ("parallel", self.parallel), ("threads", self.threads),
            ("max_queue", self.max_queue), ("max_body", self.max_body),
        ]:  # fmt: skip
            if value is not None and value < 1:
                raise InputError(f"{name} {value}: must be at least 1")
        if not self.upstream_timeout > 0:
            raise InputError(f"upstream_timeout {self.upstream_timeout}: must be more than 0")

    def upstream_key(self) -> str | None:
        """The key in ``upstream_key_file``; None without one. Raises `InputError` unless it is one line."""
        if self.upstream_key_file is None:
            return None
        try:
            lines = self.upstream_key_file.read_text("ascii").split()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.upstream_key_file}: can't be read as a file with an API key ({error})") from None
        if len(lines) != 1:
            raise InputError(f"{self.upstream_key_file}: must hold one API key and nothing else")
        return lines[0]

    def api_keys(self) -> frozenset[str]:
        """The keys of ``api_key_file``; empty when none is asked for. Raises `InputError` for an empty file."""
        if self.api_key_file is None:
            return frozenset()
        try:
            keys = frozenset(line.strip() for line in self.api_key_file.read_text().splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.api_key_file}: can't be read as a file of API keys ({error})") from None
        if not keys:
            raise InputError(f"{self.api_key_file}: holds no API key; write one on each line")
        return keys
