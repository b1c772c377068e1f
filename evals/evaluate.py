"""Judge an artifact: size, perplexity, divergence from its base, memory and speed, as one frozen result."""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from llmlite.errors import InputError
from llmlite.evals.base import LazyBase, default_directory
from llmlite.evals.budget import Fit, measure_fit
from llmlite.evals.digests import digest_of
from llmlite.evals.engines import engine_version, open_engine
from llmlite.evals.generate import reader_of
from llmlite.evals.kept import Store
from llmlite.evals.kv import parse_kv
from llmlite.evals.lightness import Lightness, gather, lightness
from llmlite.evals.locate import Location, find
from llmlite.evals.longcontext.needles import PERPLEXITY, TASKS
from llmlite.evals.longcontext.result import LongContext
from llmlite.evals.longcontext.run import LongContextSettings, run_long_context
from llmlite.evals.measured import Conditions, earlier_long_context, earlier_scores, save_figures
from llmlite.evals.memory import Memory
from llmlite.evals.perplexity import PROTOCOLS, Windows
from llmlite.evals.probe import probe
from llmlite.evals.score import Score, score
from llmlite.evals.shape import model_shape
from llmlite.evals.size import Size, measure_size
from llmlite.evals.speed import CONTEXTS, REPEATS, Speed
from llmlite.evals.structure import Structure, compare_structure
from llmlite.evals.tasks.run import TaskScore, TaskSettings, find_tasks, run_tasks
from llmlite.evals.texts import Text, read_text, read_texts
from llmlite.plan.budget import parse_size
from llmlite.progress import note

LONG_CONTEXT_TASKS = (*TASKS, PERPLEXITY)
ProtocolName = Literal["llama.cpp", "paper", "sliding"]


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
        metadata={
            "help": "llama.cpp: windows of 512, second half scored; paper: 2,048, all scored; "
            "sliding: 1,024, every token scored once"
        },
    )
    window: int | None = field(default=None, metadata={"help": "tokens of a window (default: the protocol's)"})
    windows: int | None = field(default=None, metadata={"help": "score only the first N windows of each text"})
    stride: int | None = field(
        default=None, metadata={"help": "sliding: tokens from one window to the next (default: half a window)"}
    )
    cache: Path | None = field(
        default=None,
        metadata={"help": "directory that keeps the base's predictions (default: llmlite/base in the user's cache)"},
    )
    no_cache: bool = field(default=False, metadata={"help": "keep nothing of the base: both models run"})
    again: bool = field(
        default=False, metadata={"help": "measure anew what llmlite.json holds already of this artifact and text"}
    )
    speed: bool = field(default=False, metadata={"help": "measure prompt and generation speed"})
    memory: bool = field(default=False, metadata={"help": "measure weights, cache and peak memory"})
    tasks: tuple[str, ...] = field(
        default=(), metadata={"help": "lm-evaluation-harness tasks: names, YAML files or folders of them"}
    )
    task_limit: int | None = field(default=None, metadata={"help": "ask only the first N questions of each task"})
    task_shots: int | None = field(default=None, metadata={"help": "examples in front of each question"})
    task_chat: bool = field(default=False, metadata={"help": "put tasks into the model's chat template"})
    long_context: tuple[int, ...] = field(
        default=(), metadata={"help": "tokens of contexts with hidden facts that questions are asked about"}
    )
    long_context_tasks: tuple[str, ...] = field(
        default=LONG_CONTEXT_TASKS, metadata={"help": f"of {', '.join(LONG_CONTEXT_TASKS)} (default: all)"}
    )
    long_context_questions: int = field(default=4, metadata={"help": "questions of each task on each context"})
    long_context_samples: int = field(default=1, metadata={"help": "contexts of each length"})
    long_context_text: str | None = field(
        default=None, metadata={"help": "text to hide the facts in (default: sentences made from the seed)"}
    )
    long_context_seed: int = field(default=0, metadata={"help": "of the facts and sentences that are made up"})
    kv: str | None = field(
        default=None, metadata={"help": "K:V, types of the cache for tasks and long contexts, such as q8_0:q4_0"}
    )
    contexts: tuple[int, ...] = field(
        default=CONTEXTS, metadata={"help": "prompt lengths to measure speed and memory at"}
    )
    budget: str | None = field(
        default=None, metadata={"help": "memory it must run in, as in 8GiB: the limit is real, and the longest "
                                "prompt that fits is looked for"}
    )  # fmt: skip
    lightness: bool = field(
        default=False,
        metadata={
            "help": "judge whether it is light enough for phone, edge, 8 GB GPU and server; measures memory and speed"
        },
    )
    threads: int | None = field(default=None, metadata={"help": "CPU threads (default: every core)"})

    def check(self) -> None:
        """`InputError` for what can't be measured."""
        if self.protocol not in PROTOCOLS:
            raise InputError(f"protocol {self.protocol!r} is unknown; known are {', '.join(PROTOCOLS)}")
        self._check_base()
        if self.cache is not None and self.no_cache:
            raise InputError("--cache and --no-cache together: one of them is right")
        if self.budget is not None:
            parse_size(self.budget)
        if not self.contexts:
            raise InputError("no contexts: one length of a prompt or more is right, as in --contexts 1 512")
        for name, value, least in (
            ("contexts", min(self.contexts), 1),
            ("window", self.window, 8), ("windows", self.windows, 1), ("threads", self.threads, 1),
            ("stride", self.stride, 1), ("task_limit", self.task_limit, 1), ("task_shots", self.task_shots, 0),
        ):  # fmt: skip
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; {least} or more is right")
        if self.stride is not None:
            length = self.scored.length
            if self.scored.step is None:
                raise InputError(f"a stride belongs to protocol sliding, not to {self.protocol}")
            if self.stride >= length:
                raise InputError(f"stride is {self.stride}; less than the window's {length} tokens is right")
        if self.kv is not None:
            parse_kv(self.kv)
            if not self.tasks and not self.long_context:
                raise InputError("kv without tasks or long_context: nothing else here is measured through that cache")
        long_context_settings(self)

    def _check_base(self) -> None:
        if self.base is not None and not self.text and not self.long_context:
            raise InputError("a base without a text: name a text with --text to measure the divergence on")

    @property
    def scored(self) -> Windows:
        """What is scored of each text."""
        return Windows(PROTOCOLS[self.protocol], self.window, self.windows, self.stride)


@dataclass(frozen=True)
class Evaluation:
    """Everything measured of one artifact. ``scores`` has what each text gave, by its name; unmeasured is None.

    ``structure``: what must be equal in both, None without a base. ``sha256`` and ``base_sha256``: the digests of
    artifact and base (see `digests.digest_of`). ``reused``: the texts whose scores are those of an earlier run, kept in
    llmlite.json.
    """

    artifact: str
    base: str | None
    engine: str
    version: str
    size: Size
    windows: Windows
    scores: dict[str, Score]
    memory: Memory | None
    speed: Speed | None
    structure: Structure | None = None
    sha256: str | None = None
    base_sha256: str | None = None
    reused: tuple[str, ...] = ()
    tasks: dict[str, TaskScore] = field(default_factory=dict)
    long_context: LongContext | None = None
    fit: Fit | None = None
    lightness: Lightness | None = None

    @property
    def name(self) -> str:
        """Short, for a table: the last part of the artifact's path."""
        return Path(self.artifact).name or self.artifact

    @property
    def protocol(self) -> str:
        return self.windows.protocol.name

    @property
    def window(self) -> int:
        return self.windows.length

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
            out["protocol"] = self.windows.to_json()
            out["texts"] = {name: scored.to_json() for name, scored in self.scores.items()}
        if self.base is not None:
            out["base"] = self.base
            out["base_sha256"] = self.base_sha256
        if self.memory is not None:
            out["memory"] = self.memory.to_json()
        if self.speed is not None:
            out["speed"] = self.speed.to_json()
        if self.structure is not None:
            out["structure"] = self.structure.to_json()
        if self.tasks:
            out["tasks"] = {name: scored.to_json() for name, scored in self.tasks.items()}
        if self.long_context is not None:
            out["long_context"] = self.long_context.to_json()
        if self.fit is not None:
            out["budget"] = dataclasses.asdict(self.fit)
        if self.lightness is not None:
            out["lightness"] = self.lightness.to_json()
        return out


def evaluate(artifact: str | Path, settings: EvalSettings) -> Evaluation:
    """Measure what ``settings`` ask for of an artifact: a directory, a GGUF file or a hub id.

    Scores and answers on long contexts that the artifact's llmlite.json holds are not measured again if everything
    that they depend on is the same: artifact, base, text, engine and version, for scores protocol, window, stride and
    number of windows, for answers what was asked. Tasks are always run, memory and speed always measured, those first
    of all, in a process that holds the artifact alone. Raises `InputError` for an artifact, a
    base or a text that can't be used.
    """
    settings.check()
    texts = read_texts(settings.text)
    if settings.tasks:
        find_tasks(settings.tasks)  # refuses unknown ones before hours of other work
    location = find(artifact)
    base = _base(settings) if settings.base is not None else None
    size = measure_size(location)
    memory, speed = None, None
    wants_memory, wants_speed = settings.memory or settings.lightness, settings.speed or settings.lightness
    if wants_memory or wants_speed:
        repeats = REPEATS if wants_speed else 0
        memory, speed = probe(location.path, settings.threads, repeats, settings.contexts)
    fit = None
    if settings.budget is not None:
        longest = max(settings.contexts)
        fit = measure_fit(location, parse_size(settings.budget), longest, settings.threads)
    conditions = Conditions(
        sha256=digest_of(location),
        base_sha256=base.digest if base is not None else None,
        engine={"name": location.engine, "version": engine_version(location.engine)},
        protocol=settings.scored.to_json(),
    )
    known = {} if settings.again else earlier_scores(location, conditions, texts)
    if known:
        note(f"not measured again, as nothing has changed: {', '.join(known)} (--again measures anew)")
    scores = {**known, **_scores(location, base, settings, [text for text in texts if text.name not in known])}
    judged = None
    if settings.lightness:
        judged = lightness(gather(size, model_shape(location), memory, speed, scores))
    return Evaluation(
        artifact=str(artifact),
        base=settings.base,
        engine=location.engine,
        version=conditions.engine["version"],
        size=size,
        windows=settings.scored,
        scores={text.name: scores[text.name] for text in texts},
        memory=memory if wants_memory else None,
        speed=speed if wants_speed else None,
        structure=compare_structure(find(settings.base), location) if settings.base is not None else None,
        sha256=conditions.sha256,
        base_sha256=conditions.base_sha256,
        reused=tuple(known),
        tasks=_tasks(artifact, settings),
        long_context=_long_context(location, settings, conditions),
        fit=fit,
        lightness=judged,
    )


def _base(settings: EvalSettings) -> LazyBase:
    assert settings.base is not None
    store = None if settings.no_cache else Store(settings.cache or default_directory())
    return LazyBase(settings.base, store, threads=settings.threads, context=settings.scored.length)


def _scores(location: Location, base: LazyBase | None, settings: EvalSettings, texts: list[Text]) -> dict[str, Score]:
    if not texts:
        return {}
    if settings.threads is not None:  # of what compares the two; llama.cpp's are its own
        torch.set_num_threads(settings.threads)
    with ExitStack() as opened:
        if base is not None:
            opened.callback(base.close)
        engine = open_engine(location.path, threads=settings.threads, context=settings.scored.length)
        opened.callback(engine.close)
        return {text.name: score(engine, base, text, settings.scored) for text in texts}


def _tasks(artifact: str | Path, settings: EvalSettings) -> dict[str, TaskScore]:
    if not settings.tasks:
        return {}
    engine = open_engine(artifact, threads=settings.threads)
    try:
        wanted = TaskSettings(settings.tasks, settings.task_limit, settings.task_shots, settings.task_chat)
        found = run_tasks(reader_of(engine, parse_kv(settings.kv) if settings.kv else None), wanted)
        return {name: dataclasses.replace(scored, kv=settings.kv) for name, scored in found.items()}
    finally:
        engine.close()


def long_context_settings(settings: EvalSettings) -> LongContextSettings | None:
    """What is asked on long contexts, checked; None where nothing is."""
    if not settings.long_context:
        return None
    wanted = LongContextSettings(
        lengths=settings.long_context,
        tasks=settings.long_context_tasks,
        samples=settings.long_context_samples,
        questions=settings.long_context_questions,
        seed=settings.long_context_seed,
        text=read_text(settings.long_context_text) if settings.long_context_text else None,
        kv=parse_kv(settings.kv) if settings.kv else None,
    )
    wanted.check()
    return wanted


def _long_context(location: Location, settings: EvalSettings, conditions: Conditions) -> LongContext | None:
    wanted = long_context_settings(settings)
    if wanted is None:
        return None
    known = None if settings.again else earlier_long_context(location, conditions, wanted)
    if known is not None:
        note("not asked again, as nothing has changed: long contexts (--again asks anew)")
        return known
    found = run_long_context(location.path, settings.base, wanted, settings.threads)
    return dataclasses.replace(found, against_sha256=conditions.base_sha256)


def save_in_manifest(artifact: str | Path, evaluation: Evaluation) -> bool:
    """Keep the figures in the artifact's llmlite.json, under ``evals`` and the protocol's name, in a single step.

    What is there already of the same artifact stays as far as it was not measured again: other tasks, memory,
    speed, other texts scored under the same conditions, and keys that others put there. Figures of another version of
    the engine go. False where there is no llmlite.json that describes these weights.
    """
    return save_figures(find(artifact), evaluation.protocol, evaluation.to_json())
