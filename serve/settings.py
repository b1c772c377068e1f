"""How a server is to be run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from llmlite.errors import InputError
from llmlite.evals.kv import KvTypes, parse_kv
from llmlite.plan.budget import parse_size


@dataclass(frozen=True)
class ServeSettings:
    """The settings of `llmlite serve`; each field's help is the command line's."""

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 lets others in"})
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 takes a free one"})
    name: str | None = field(default=None, metadata={"help": "model name that clients use (default: the artifact's)"})
    context: int | None = field(
        default=None, metadata={"help": "tokens that prompt and reply may have together (default: as trained)"}
    )
    kv: str | None = field(
        default=None,
        metadata={"help": "types of the key and value cache, K:V or one for both (default: f16; safetensors: its own)"},
    )
    cells: int | None = field(
        default=None, metadata={"help": "tokens that all contexts have room for (default: context times parallel)"}
    )
    parallel: int = field(default=1, metadata={"help": "sequences that run side by side"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: all that may be used)"})
    exact: bool = field(
        default=False,
        metadata={"help": "one sequence in each decode: replies are bit-identical, alone or in a crowd; slower"},
    )
    lora: tuple[str, ...] = field(default=(), metadata={"help": "low-rank adapters, each as NAME=FILE"})
    cache_ram: str | None = field(
        default=None, metadata={"help": "memory for prefixes that left the cells, as in 2GiB (default: none)"}
    )
    cache_dir: Path | None = field(
        default=None, metadata={"help": "folder in which prefixes outlive a restart (default: none)"}
    )
    cache_disk: str = field(default="10GiB", metadata={"help": "room for prefixes in the cache folder"})
    max_queue: int = field(default=64, metadata={"help": "sequences that may wait; more get status 429"})
    max_body: int = field(default=16 * 2**20, metadata={"help": "largest request body in bytes; more gets status 413"})
    idle_unload: float | None = field(
        default=None, metadata={"help": "seconds after which a model that nobody uses is unloaded (default: never)"}
    )
    api_key_file: Path | None = field(
        default=None, metadata={"help": "file with one API key a line; without it no key is asked for"}
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

    @property
    def kv_types(self) -> KvTypes:
        return parse_kv(self.kv or "f16")

    @property
    def cache_ram_bytes(self) -> int:
        """0: no cache in memory."""
        return 0 if self.cache_ram is None else parse_size(self.cache_ram)

    @property
    def cache_disk_bytes(self) -> int:
        return parse_size(self.cache_disk)

    @property
    def adapters(self) -> list[tuple[str, Path]]:
        """Name and file of each low-rank adapter of the first model."""
        return [(name, Path(file)) for name, _, file in (text.partition("=") for text in self.lora)]

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
