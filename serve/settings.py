"""How a server is to be run."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmlite.errors import InputError
from llmlite.evals.kv import KvTypes, parse_kv
from llmlite.plan.budget import parse_size

ORIGIN = re.compile(r"https?://[^/\s@]+|\*")


@dataclass(frozen=True)
class ServeSettings:
    """The settings of `llmlite serve`; each field's help is the command line's."""

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on; 0.0.0.0 lets others in"})
    port: int = field(default=8000, metadata={"help": "port to listen on; 0 takes a free one"})
    tls_cert: Path | None = field(
        default=None, metadata={"help": "certificate chain in PEM: serves HTTPS; needs --tls-key"}
    )
    tls_key: Path | None = field(default=None, metadata={"help": "private key of the certificate in PEM"})

    name: str | None = field(default=None, metadata={"help": "model name that clients use (default: the artifact's)"})
    also: tuple[str, ...] = field(
        default=(), metadata={"help": "more models, each as NAME=ARTIFACT; each is loaded when first asked for"}
    )
    lora: tuple[str, ...] = field(
        default=(), metadata={"help": "low-rank adapters of the first model, each as NAME=FILE"}
    )
    idle_unload: float | None = field(
        default=None, metadata={"help": "seconds after which a model that nobody uses is unloaded"}
    )

    context: int | None = field(
        default=None, metadata={"help": "tokens that prompt and reply may have together (default: as trained)"}
    )
    rope_scaling: Literal["none", "linear", "yarn"] = field(
        default="none", metadata={"help": "how positions are scaled, beyond what the model itself says"}
    )
    rope_scale: float | None = field(
        default=None, metadata={"help": "how many times longer than trained the context gets by rope scaling"}
    )
    kv: str | None = field(
        default=None,
        metadata={
            "help": "types of the key and value cache, K:V or one for both, as in q8_0:q4_0 (default: f16; of "
            "safetensors, the type the model computes in)"
        },
    )
    cells: int | None = field(
        default=None, metadata={"help": "tokens that all contexts have room for (default: context times parallel)"}
    )
    parallel: int = field(default=4, metadata={"help": "sequences that run side by side"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: all that may be used)"})
    exact: bool = field(
        default=False,
        metadata={"help": "one sequence in each decode: replies are bit-identical, alone or in a crowd; slower"},
    )
    draft: str = field(
        default="off",
        metadata={"help": "speculative decoding: a smaller artifact of the same vocabulary, lookup or off"},
    )

    cache_ram: str = field(default="2GiB", metadata={"help": "host memory for prefixes that left their slot"})
    cache_dir: Path | None = field(
        default=None, metadata={"help": "folder in which prefixes outlive a restart (default: none)"}
    )
    cache_disk: str = field(default="10GiB", metadata={"help": "room for prefixes in the cache folder"})

    max_queue: int = field(default=64, metadata={"help": "sequences that may wait; more get status 429"})
    max_body: int = field(default=8 * 2**20, metadata={"help": "largest request body in bytes; more gets status 413"})
    max_text: int = field(
        default=2 * 2**20, metadata={"help": "largest single text in a body in bytes; more gets status 413"}
    )
    max_connections: int = field(default=500, metadata={"help": "connections at a time; more get status 503"})
    request_timeout: float | None = field(
        default=None, metadata={"help": "seconds that a request may take, waiting included (default: no limit)"}
    )
    drain_seconds: float = field(
        default=60.0, metadata={"help": "seconds that running requests may go on after SIGTERM"}
    )

    api_key_file: Path | None = field(
        default=None,
        metadata={
            "help": "file of API keys as `llmlite key` writes it, read again on SIGHUP; without it no key is asked for"
        },
    )
    insecure: bool = field(
        default=False,
        metadata={"help": "let everyone in who reaches the address: no key on an address other than loopback"},
    )
    cors: tuple[str, ...] = field(
        default=(), metadata={"help": "origins whose pages may use this server, as in https://chat.example; * for all"}
    )
    log_level: Literal["debug", "info", "warning", "error"] = field(
        default="info", metadata={"help": "least level that is logged"}
    )
    log_prompts: bool = field(default=False, metadata={"help": "also log what was asked: the body of each request"})

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
        for name in ("context", "cells", "parallel", "threads", "max_queue", "max_body", "max_text", "max_connections"):
            if (count := vars(self)[name]) is not None and count < 1:
                raise InputError(f"{name} {count}: must be at least 1")
        for name in ("idle_unload", "request_timeout", "rope_scale", "upstream_timeout"):
            if (value := vars(self)[name]) is not None and not 0 < value < float("inf"):
                raise InputError(f"{name} {value}: must be more than 0")
        if not 0 <= self.drain_seconds < float("inf"):
            raise InputError(f"drain_seconds {self.drain_seconds}: must be 0 or more")
        self._check_doors()
        self._check_models()
        self._check_cache()

    def _check_doors(self) -> None:
        if not (self.loopback or self.insecure or self.api_key_file):
            raise InputError(
                f"host {self.host}: would let everyone in who reaches it: make a key with `llmlite key NAME -o FILE` "
                "and give --api-key-file FILE, or say --insecure"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise InputError("tls_cert and tls_key: one needs the other")
        for origin in self.cors:
            if not ORIGIN.fullmatch(origin):
                raise InputError(
                    f"cors {origin!r}: is no origin; scheme, host and port are right, as in https://a.example"
                )

    def _check_models(self) -> None:
        names = [name for name, _ in self.other_models]
        names += [name for name, _ in pairs("lora", self.lora)]
        names += [self.name] if self.name else []
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise InputError(f"{twice[0]!r} names two models or adapters: each needs a name of its own")
        if self.rope_scale is not None and self.rope_scaling == "none":
            raise InputError("rope_scale: needs --rope-scaling linear or yarn")
        if self.cells is not None and self.context is not None and self.cells < self.context:
            raise InputError(f"cells {self.cells}: must be at least the context, {self.context}")
        if not self.draft:
            raise InputError("draft: an artifact, lookup or off is right")
        if self.exact and self.draft != "off":
            raise InputError(f"draft {self.draft}: does not go with exact, where one token is run at a time")

    def _check_cache(self) -> None:
        _ = self.kv_types, self.cache_ram_bytes, self.cache_disk_bytes
        if self.cache_dir is not None and self.cache_dir.exists() and not self.cache_dir.is_dir():
            raise InputError(f"cache_dir {self.cache_dir}: is no folder")

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

    @property
    def loopback(self) -> bool:
        """Only this machine reaches the address."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def kv_types(self) -> KvTypes:
        return parse_kv(self.kv or "f16")

    @property
    def cache_ram_bytes(self) -> int:
        """Most bytes of prefixes in host memory."""
        return _size("cache_ram", self.cache_ram)

    @property
    def cache_disk_bytes(self) -> int:
        return _size("cache_disk", self.cache_disk)

    @property
    def other_models(self) -> list[tuple[str, str]]:
        """Name and artifact of each model but the first."""
        return pairs("also", self.also)

    @property
    def adapters(self) -> list[tuple[str, Path]]:
        """Name and file of each low-rank adapter of the first model."""
        return [(name, Path(file)) for name, file in pairs("lora", self.lora)]


@dataclass(frozen=True)
class KeySettings:
    """The settings of `llmlite key`; each field's help is the command line's."""

    requests_per_minute: int | None = field(default=None, metadata={"help": "requests a minute (default: no limit)"})
    tokens_per_minute: int | None = field(
        default=None, metadata={"help": "tokens a minute, of prompts and replies (default: no limit)"}
    )
    concurrent: int | None = field(default=None, metadata={"help": "requests at a time (default: no limit)"})
    from_stdin: bool = field(default=False, metadata={"help": "read the key from standard input instead of making one"})

    def __post_init__(self) -> None:
        for name in ("requests_per_minute", "tokens_per_minute", "concurrent"):
            if (count := vars(self)[name]) is not None and not 0 < count < 10**12:
                raise InputError(f"{name} {count}: must be at least 1")


def pairs(option_name: str, given: Sequence[str]) -> list[tuple[str, str]]:
    """Each NAME=PLACE taken apart; `InputError` for what isn't one."""
    out = []
    for text in given:
        name, _, place = text.partition("=")
        if not name or not place:
            raise InputError(f"{option_name} {text!r}: NAME=PLACE is right")
        out.append((name, place))
    return out


def _size(name: str, text: str) -> int:
    try:
        return parse_size(text)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
