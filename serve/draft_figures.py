"""What a draft model is worth to the model that it guesses for: how many guesses are right, and the wall clock.

Both are measured as they are served, one chat after the other: greedy replies, guesses paced by what they cost.
"""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from llmlite.checkpoint.artifact import read_manifest, write_manifest
from llmlite.errors import InputError, OutsideError
from llmlite.evals.evaluate import EvalSettings
from llmlite.evals.locate import find
from llmlite.progress import note, track
from llmlite.serve.engines import open_artifact
from llmlite.serve.generation import Delta, Work
from llmlite.serve.sampling import Sampling
from llmlite.serve.scheduler import Scheduler, SchedulerSettings
from llmlite.serve.settings import ServeSettings

QUESTIONS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a fox who learns to swim.",
    "List five ways to save water at home, with a sentence on each.",
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
)


@dataclass(frozen=True)
class DraftFigures:
    """``acceptance``: of the guesses tried, the share that was right, None where none was; ``drafted``: tokens tried.

    ``alone`` and ``drafted_for``: generated tokens per second of the teacher without and with the draft; ``speed``:
    their ratio, above 1 where the draft pays; ``tokens`` of the replies, in each of both.
    """

    teacher: str
    draft: str
    acceptance: float | None
    drafted: int
    alone: float
    drafted_for: float
    speed: float
    tokens: int
    prompts: int

    def to_json(self) -> dict[str, Any]:
        """The facts as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        share = "no guess was tried" if self.acceptance is None else f"{self.acceptance:.1%} of its guesses are right"
        return (
            f"{self.draft} drafts for {self.teacher}: {share}, {self.drafted_for:.1f} tokens per second in place of "
            f"{self.alone:.1f}, {self.speed:.2f} of the speed"
        )


def measure_draft(
    teacher: str | Path,
    draft: str | Path,
    chats: Sequence[Sequence[dict[str, str]]] | None = None,
    tokens: int = 128,
    threads: int | None = None,
) -> DraftFigures:
    """Reply to each chat (messages with role and content; some of our own where None) without and with the draft.

    Both models are GGUF artifacts or files of one vocabulary; replies have at most ``tokens`` tokens. The engines take
    turns, chat by chat, so that what else the machine does falls on both alike. `InputError` for a draft that can't
    guess for this teacher.
    """
    if find(teacher).engine != "llama.cpp":
        raise InputError(f"{teacher}: a draft model guesses for a GGUF file; name one, or a folder with one")
    given = list(chats or [[{"role": "user", "content": text}] for text in QUESTIONS])
    plain = ServeSettings(port=0, parallel=1, threads=threads)
    sides = {"alone": _Side(teacher, plain)}
    try:
        sides["drafted"] = _Side(teacher, replace(plain, draft=str(draft)))
        spent = dict.fromkeys(sides, 0.0)
        made = dict.fromkeys(sides, 0)
        sides["alone"].warm()
        sides["drafted"].warm()
        tried, right = sides["drafted"].guesses()
        for number, messages in enumerate(track(given, "draft")):
            for name in list(sides) if number % 2 else list(sides)[::-1]:
                seconds, count = sides[name].reply(list(messages), tokens)
                spent[name] += seconds
                made[name] += count
        tried, right = (now - then for now, then in zip(sides["drafted"].guesses(), (tried, right), strict=True))
    finally:
        for side in sides.values():
            side.close()
    if not all(made.values()):
        raise InputError(f"{teacher}: every reply ended at its first token, so there is nothing to measure")
    rates = {name: made[name] / spent[name] for name in sides}
    acceptance = round(right / tried, 4) if tried else None
    speed = round(rates["drafted"] / rates["alone"], 4)
    alone, drafted = round(rates["alone"], 2), round(rates["drafted"], 2)
    named = (str(teacher), str(draft))
    return DraftFigures(*named, acceptance, tried, alone, drafted, speed, made["drafted"], len(given))


def save_draft_figures(draft: str | Path, figures: DraftFigures) -> bool:
    """Keep the figures in the draft's llmlite.json, under ``draft_for`` and the teacher's name; False without one."""
    directory = find(draft).directory
    manifest = read_manifest(directory)
    if manifest is None:
        note(f"{draft} has no llmlite.json, so the figures are not kept")
        return False
    known: dict[str, Any] = manifest.get("draft_for", {})
    facts = {name: value for name, value in asdict(figures).items() if name not in ("teacher", "draft")}
    write_manifest(directory, {**manifest, "draft_for": {**known, figures.teacher: facts}})
    return True


def eval_draft(draft: str, teacher: str, options: Mapping[str, Any]) -> DraftFigures:
    """What `llmlite eval DRAFT --draft-for TEACHER` does; `InputError` for any of its other options but threads."""
    known = [item.name for item in fields(EvalSettings)] + ["recipe", "picture"]
    others = [name for name in known if options.get(name) is not None and name != "threads"]
    if others:
        raise InputError(f"--draft-for: --{others[0].replace('_', '-')} does not go with it; --threads does")
    figures = measure_draft(teacher, draft, threads=options.get("threads"))
    save_draft_figures(draft, figures)
    return figures


class _Side:
    """The teacher behind a scheduler of its own, as it is served."""

    def __init__(self, teacher: str | Path, settings: ServeSettings):
        self._opened = open_artifact(teacher, settings)
        self._scheduler = Scheduler(self._opened.engine, SchedulerSettings(), self._opened.draft)
        self._scheduler.start()

    def warm(self) -> None:
        """Let the scheduler learn what prompts and steps cost, which guesses wait for."""
        self.reply([{"role": "user", "content": QUESTIONS[0] * 4}], 16)

    def reply(self, messages: list[dict[str, Any]], tokens: int) -> tuple[float, int]:
        """Seconds from the first token to the last one of a greedy reply, and how many tokens these are."""
        engine = self._opened.engine
        prompt = engine.encode_chat(messages)
        deltas: queue.SimpleQueue[Delta | Exception] = queue.SimpleQueue()
        work = Work(prompt, min(tokens, engine.context - len(prompt)), Sampling(temperature=0.0))
        self._scheduler.submit([work], [deltas.put])
        begun, first = None, 0
        while True:
            delta = deltas.get()
            if isinstance(delta, Exception):
                raise OutsideError(f"the engine failed: {delta}")
            if begun is None:
                begun, first = time.perf_counter(), delta.generated
            if delta.finish:
                return time.perf_counter() - begun, delta.generated - first

    def guesses(self) -> tuple[int, int]:
        """How many were tried so far, and how many were right."""
        stats = self._scheduler.stats
        return stats.drafted_tokens, stats.accepted_tokens

    def close(self) -> None:
        self._scheduler.stop()
        self._opened.engine.close_model()
        if self._opened.draft is not None:
            self._opened.draft.close()
