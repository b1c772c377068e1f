"""Judge an artifact: size, perplexity, divergence from its base, memory and speed, as one frozen result."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from llmlite.checkpoint.artifact import GGUF_FILE, read_manifest, write_manifest
from llmlite.errors import InputError
from llmlite.evals.digests import digest_of
from llmlite.evals.engines import engine_version, open_engine
from llmlite.evals.locate import find
from llmlite.evals.memory import Memory
from llmlite.evals.perplexity import PROTOCOLS
from llmlite.evals.probe import probe
from llmlite.evals.score import Score, Windows, score
from llmlite.evals.size import Size, measure_size
from llmlite.evals.speed import Speed
from llmlite.evals.structure import Structure, compare_structure
from llmlite.evals.texts import Text, read_texts

ProtocolName = Literal["llama.cpp", "paper"]


@dataclass(frozen=True)
class EvalSettings:
    """What `evaluate` measures: size always, the rest as asked."""

    base: str | None = field(
        default=None, metadata={"help": "model to compare with: the divergence from it is measured"}
    )
    text: tuple[str, ...] = field(
        default=(), metadata={"help": "text file, .jsonl with a field 'text', or data set owner/name[:config[:split]]"}
    )
    protocol: ProtocolName = field(
        default="llama.cpp",
        metadata={"help": "llama.cpp: windows of 512, second half scored; paper: 2,048, all scored"},
    )
    window: int | None = field(default=None, metadata={"help": "tokens of a window (default: the protocol's)"})
    windows: int | None = field(default=None, metadata={"help": "score only the first N windows of each text"})
    speed: bool = field(default=False, metadata={"help": "measure prompt and generation speed"})
    memory: bool = field(default=False, metadata={"help": "measure weights, cache and peak memory"})
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: every core)"})

    def check(self) -> None:
        """`InputError` for what can't be measured."""
        if self.protocol not in PROTOCOLS:
            raise InputError(f"protocol {self.protocol!r} is unknown; known are {', '.join(PROTOCOLS)}")
        if self.base is not None and not self.text:
            raise InputError("a base without a text: name a text with --text to measure the divergence on")
        for name, value, least in (
            ("window", self.window, 8), ("windows", self.windows, 1), ("threads", self.threads, 1),
        ):  # fmt: skip
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; {least} or more is right")


@dataclass(frozen=True)
class Evaluation:
    """Everything measured of one artifact. ``scores`` has what each text gave, by its name; unmeasured is None."""

    artifact: str
    base: str | None
    engine: str
    version: str
    size: Size
    protocol: str
    window: int
    scores: dict[str, Score]
    memory: Memory | None
    speed: Speed | None
    structure: Structure | None = None
    sha256: str | None = None
    base_sha256: str | None = None

    @property
    def name(self) -> str:
        """Short, for a table: the last part of the artifact's path."""
        return Path(self.artifact).name or self.artifact

    def to_json(self) -> dict:
        """Plain data with the keys that scripts may rely on; what was not measured has no key."""
        out: dict = {
            "artifact": self.artifact,
            "engine": {"name": self.engine, "version": self.version},
            "bytes": self.size.bytes,
            "bits_per_weight": self.size.bits_per_weight,
            "parameters": self.size.parameters,
        }
        if self.sha256 is not None:
            out["sha256"] = self.sha256
        if self.scores:
            out["protocol"] = {"name": self.protocol, "window": self.window}
            out["texts"] = {name: _score_json(scored) for name, scored in self.scores.items()}
        if self.base is not None:
            out["base"] = self.base
            out["base_sha256"] = self.base_sha256
        if self.memory is not None:
            out["memory"] = dataclasses.asdict(self.memory)
        if self.speed is not None:
            out["speed"] = dataclasses.asdict(self.speed)
        if self.structure is not None:
            out["structure"] = self.structure.to_json()
        return out


def _score_json(scored: Score) -> dict:
    parts = dataclasses.asdict(scored, dict_factory=_plain)
    return {key: value for key, value in parts.items() if value is not None}


def _plain(pairs: list) -> dict:
    return {key: [*value] if isinstance(value, tuple) else value for key, value in pairs}


def evaluate(artifact: str | Path, settings: EvalSettings) -> Evaluation:
    """Measure what ``settings`` ask for of an artifact: a directory, a GGUF file or a hub id.

    Memory and speed are measured first, in a process that holds the artifact alone. Raises `InputError` for an
    artifact, a base or a text that can't be used.
    """
    settings.check()
    texts = read_texts(settings.text)
    windows = Windows(PROTOCOLS[settings.protocol], settings.window, settings.windows)
    location = find(artifact)
    base = find(settings.base) if settings.base is not None else None
    size = measure_size(location)
    memory, speed = None, None
    if settings.memory or settings.speed:
        memory, speed = probe(location.path, settings.threads)
    return Evaluation(
        artifact=str(artifact),
        base=settings.base,
        engine=location.engine,
        version=engine_version(location.engine),
        size=size,
        protocol=settings.protocol,
        window=windows.length,
        scores=_scores(artifact, settings, texts, windows) if texts else {},
        memory=memory if settings.memory else None,
        speed=speed if settings.speed else None,
        structure=compare_structure(base, location) if base is not None else None,
        sha256=digest_of(location),
        base_sha256=digest_of(base) if base is not None else None,
    )


def _scores(artifact: str | Path, settings: EvalSettings, texts: list[Text], windows: Windows) -> dict[str, Score]:
    with ExitStack() as opened:
        engine = open_engine(artifact, threads=settings.threads, context=windows.length)
        opened.callback(engine.close)
        base = None
        if settings.base is not None:
            base = open_engine(settings.base, threads=settings.threads, context=windows.length)
            opened.callback(base.close)
        return {text.name: score(engine, base, text, windows) for text in texts}


def save_in_manifest(artifact: str | Path, evaluation: Evaluation) -> bool:
    """Keep the figures in the artifact's llmlite.json, under ``evals`` and the protocol's name, in a single step.

    Earlier figures by the same protocol are replaced as far as they were measured again. False where there is no
    llmlite.json that describes these weights.
    """
    location = find(artifact)
    manifest = read_manifest(location.directory)
    if manifest is None or (location.engine == "llama.cpp" and location.path.name != GGUF_FILE):
        return False
    evals = manifest.get("evals", {})
    before = evals.get(evaluation.protocol, {})
    if evaluation.scores:  # a score belongs to the base and the window it was measured with
        before = {key: before[key] for key in ("memory", "speed", "sha256") if key in before}
    if before.get("sha256") != evaluation.sha256:  # figures of other weights
        before = {}
    merged = {**before, **evaluation.to_json()}
    write_manifest(location.directory, {**manifest, "evals": {**evals, evaluation.protocol: merged}})
    return True
