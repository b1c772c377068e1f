"""Ask every question of every context, of the artifact and then of what it is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmlite.errors import InputError
from llmlite.evals.chat import chat_template
from llmlite.evals.engines import open_engine
from llmlite.evals.generate import Reader, greedy, reader_of, score_answer
from llmlite.evals.kv import KvTypes
from llmlite.evals.longcontext.haystack import Context, Prompt, Recipe, long_text, make_context
from llmlite.evals.longcontext.needles import PERPLEXITY, TASKS
from llmlite.evals.longcontext.result import Answer, LongContext, losses_by_position
from llmlite.evals.texts import Text
from llmlite.progress import track

SPARE_ANSWER = 8  # tokens that a written answer may be longer than the right one


@dataclass(frozen=True)
class LongContextSettings:
    """``lengths`` in tokens, ``samples`` contexts of each, ``questions`` of each task in each context.

    ``text``: what the facts are hidden in and perplexity is measured on, None for sentences made from the seed;
    ``kv``: what the artifact's cache stores.
    """

    lengths: tuple[int, ...]
    tasks: tuple[str, ...] = (*TASKS, PERPLEXITY)
    samples: int = 1
    questions: int = 4
    seed: int = 0
    text: Text | None = None
    kv: KvTypes | None = None

    def check(self) -> None:
        """`InputError` for what can't be measured."""
        for name in self.tasks:
            if name not in (*TASKS, PERPLEXITY):
                raise InputError(f"long context: {name!r} is no task; known are {', '.join((*TASKS, PERPLEXITY))}")
        for name, value in (("samples", self.samples), ("questions", self.questions), ("lengths", min(self.lengths))):
            if value < 1:
                raise InputError(f"long context: {name} is {value}; 1 or more is right")
        if self.questions > 32:
            raise InputError(f"long context: {self.questions} questions of a task; 32 at most is right")
        if self.seed < 0:
            raise InputError(f"long context: seed is {self.seed}; 0 or more is right")

    def gave(self, found: LongContext) -> bool:
        """Whether ``found`` is what these settings ask for, of whatever model."""
        asked = tuple(name for name in TASKS if name in self.tasks)
        length, digest = len(self.lengths), self.text.digest if self.text else None
        return (
            (found.lengths, found.seed, found.text_sha256) == (self.lengths, self.seed, digest)
            and found.kv == (str(self.kv) if self.kv else None)
            and found.tasks == asked
            and len(found.answers) == len(asked) * length * self.samples * self.questions
            and {answer.sample for answer in found.answers} == set(range(self.samples if asked else 0))
            and set(found.positions) == (set(self.lengths) if PERPLEXITY in self.tasks else set())
        )

    @property
    def recipe(self) -> Recipe:
        asked = tuple(name for name in TASKS if name in self.tasks)
        return Recipe(asked, self.questions, self.seed, self.text)


@dataclass(frozen=True)
class Questions:
    """Everything that is asked, as token ids: contexts with their prompts, and a row of text of each length."""

    contexts: tuple[Context, ...]
    texts: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Answers:
    """``losses``: of each row of text, negative log-likelihood float64 [length - 1]."""

    answers: tuple[Answer, ...]
    losses: tuple[np.ndarray, ...]


def run_long_context(
    artifact: str | Path, base: str | None, settings: LongContextSettings, threads: int | None = None
) -> LongContext:
    """Ask the artifact, then the base with its own cache, or else, with ``kv``, the artifact with its usual cache.

    One model is held at a time. Both get the same token ids, which the artifact's tokenizer and chat template
    make. `InputError` for lengths beyond what either model was trained for and for a base that tokenizes otherwise.
    """
    settings.check()
    engine = open_engine(artifact, threads=threads)
    try:
        reader = reader_of(engine, settings.kv, max(settings.lengths))
        asked = make_questions(reader, settings)
        mine = ask(reader, asked)
        chat = chat_template(engine) is not None
        theirs, against = None, None
        if base is None and settings.kv is not None:
            theirs, against = ask(reader_of(engine, None, max(settings.lengths)), asked), "the usual cache"
    finally:
        engine.close()
    if base is not None:
        theirs, against = _ask_base(base, settings, asked, threads), base
    return _result(settings, chat, mine, theirs, against)


def _ask_base(base: str, settings: LongContextSettings, asked: Questions, threads: int | None) -> Answers:
    engine = open_engine(base, threads=threads)
    try:
        reader = reader_of(engine, None, max(settings.lengths))
        for context, same in zip(asked.contexts, make_questions(reader, settings).contexts, strict=True):
            for one, other in zip(context.prompts, same.prompts, strict=True):
                if not np.array_equal(one.answer, other.answer):
                    raise InputError("base and artifact tokenize an answer differently: not the same tokenizer")
        return ask(reader, asked)
    finally:
        engine.close()


def make_questions(reader: Reader, settings: LongContextSettings) -> Questions:
    """The same for the same settings and tokenizer."""
    longest = max(settings.lengths)
    if longest > reader.longest:
        raise InputError(f"long context: {longest:,} tokens, and this model was trained for {reader.longest:,}")
    recipe = settings.recipe
    pairs = [(length, sample) for length in settings.lengths for sample in range(settings.samples)]
    contexts = [make_context(reader, recipe, length, sample) for length, sample in pairs] if recipe.tasks else []
    texts = [long_text(reader, recipe, length) for length in settings.lengths] if PERPLEXITY in settings.tasks else []
    return Questions(tuple(contexts), tuple(texts))


def ask(reader: Reader, asked: Questions) -> Answers:
    """Each context is read once, then every prompt of it is answered."""
    answers = []
    for context in asked.contexts:
        reader.hold(context.ids)
        for prompt in track(context.prompts, f"questions on {len(context.ids):,} tokens", len(context.prompts)):
            answers.append(_answer(reader, context, prompt))
    losses = [reader.losses(ids) for ids in track(asked.texts, "long text", len(asked.texts))]
    return Answers(tuple(answers), tuple(losses))


def _answer(reader: Reader, context: Context, prompt: Prompt) -> Answer:
    opened = np.concatenate([context.ids, prompt.tail])
    found = reader.predict(np.concatenate([opened, prompt.answer[:-1]]), len(prompt.answer))
    logprob, likeliest = score_answer(found, prompt.answer)
    expected = prompt.question.expected
    match = 1.0
    if not likeliest:
        # Up to its first wrong token the greedy answer is the right one: it is written from there on.
        best = found.argmax(dim=-1).numpy()
        wrong = int(np.flatnonzero(best != prompt.answer)[0])
        said = "" if int(best[wrong]) in reader.ends else _written(reader, opened, best[: wrong + 1], prompt)
        said = said or reader.decode(prompt.answer[:wrong].tolist())
        match = float(np.mean([word in said for word in expected]))
    return Answer(
        prompt.question.task, context.length, context.sample, prompt.depth, match, logprob, len(prompt.answer)
    )


def _written(reader: Reader, opened: np.ndarray, begun: np.ndarray, prompt: Prompt) -> str:
    limit = len(prompt.answer) + SPARE_ANSWER - len(begun)
    text = reader.decode(begun.tolist()) + greedy(reader, np.concatenate([opened, begun]), limit, ["\n"])
    return text.split("\n")[0]


def _result(
    settings: LongContextSettings, chat: bool, mine: Answers, theirs: Answers | None, against: str | None
) -> LongContext:
    positions = {
        length: losses_by_position(losses, theirs.losses[n] if theirs else None)
        for n, (length, losses) in enumerate(zip(settings.lengths, mine.losses, strict=False))
    }
    return LongContext(
        lengths=settings.lengths,
        seed=settings.seed,
        text=settings.text.name if settings.text else "synthetic",
        text_sha256=settings.text.digest if settings.text else None,
        kv=str(settings.kv) if settings.kv else None,
        chat=chat,
        against=against,
        answers=mine.answers,
        theirs=theirs.answers if theirs else (),
        positions=positions,
    )
