"""Put facts at depths of a text of so many of the model's tokens, and make each question's prompt of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from llmlite.errors import InputError
from llmlite.evals.chat import around_question
from llmlite.evals.generate import Reader, common_start
from llmlite.evals.longcontext.filler import sentences, sentences_of
from llmlite.evals.longcontext.needles import TASKS, Question
from llmlite.evals.texts import Text

INTRODUCTION = "Some facts are hidden in the following text. Remember them: questions about them follow.\n\n"
MULTI_KEY_SHARE = 0.3  # of a context's tokens are pairs of UUIDs, so that there are more of them in a longer one
LEAST_WORDS = 4  # tokens of a sentence at least: how many of them may be needed
SPARE = 16  # tokens left for an answer that is longer than the right one


@dataclass(frozen=True)
class Prompt:
    """One question as token ids int64: ``tail`` goes on after the context's ids, ``answer`` after that.

    ``depth``: where its facts stand, 0 for the context's beginning and 1 for its end.
    """

    question: Question
    depth: float
    tail: np.ndarray
    answer: np.ndarray


@dataclass(frozen=True)
class Context:
    """``ids`` int64 [n] are read once; every prompt follows them. ``length``: n with the longest prompt, at most."""

    length: int
    sample: int
    ids: np.ndarray
    prompts: tuple[Prompt, ...]


@dataclass(frozen=True)
class Recipe:
    """What a context is made of: task names, ``questions`` of each, and the text around the facts."""

    tasks: tuple[str, ...]
    questions: int
    seed: int
    text: Text | None


def make_context(reader: Reader, recipe: Recipe, length: int, sample: int) -> Context:
    """The same seed, length, sample and tokenizer give the same ids.

    `InputError` where ``length`` is too short for the facts.
    """
    before, after = around_question(reader.engine)
    head = reader.encode(before + INTRODUCTION)
    bos = reader.engine.bos
    if bos is not None and (len(head) == 0 or head[0] != bos):
        head = np.concatenate([[bos], head])
    placed, asked = _facts(reader, recipe, length, sample)
    made = [(question, depth, *_prompt(reader, question, after)) for question, depth in asked]
    room = max(len(tail) + len(answer) for _, _, tail, answer in made) + SPARE + len(head)
    filler = list(islice(_filler(recipe, sample), length // LEAST_WORDS))
    text = _fitting(lambda text: len(reader.engine.tokenize(text)), placed, filler, length - room)
    if text is None:
        least = room + len(reader.engine.tokenize(_merged(placed, [])))
        raise InputError(
            f"long context: {length:,} tokens are too few for {recipe.questions} questions of "
            f"{', '.join(recipe.tasks)}; {least:,} tokens, fewer questions or fewer tasks are right"
        )
    ids = np.concatenate([head, reader.engine.tokenize(text)])
    return Context(length, sample, ids, tuple(Prompt(*parts) for parts in made))


def _facts(
    reader: Reader, recipe: Recipe, length: int, sample: int
) -> tuple[list[tuple[float, str]], list[tuple[Question, float]]]:
    """(depth, fact) in the order of the text, and (question, depth); each task's facts are spread over the whole."""
    placed: list[tuple[float, str]] = []
    asked = []
    for name in recipe.tasks:
        random = np.random.default_rng([recipe.seed, length, sample, list(TASKS).index(name)])
        needles = TASKS[name](random, recipe.questions, 1.0)
        if name == "multi_key":
            pairs = MULTI_KEY_SHARE * length / len(reader.engine.tokenize(" " + needles.facts[0]))
            needles = TASKS[name](random, recipe.questions, pairs / recipe.questions)
        count = len(needles.facts)
        depths = (np.arange(count) + random.random(count)) / count
        placed += zip(depths.tolist(), needles.facts, strict=True)
        asked += [(question, float(depths[list(question.facts)].mean())) for question in needles.questions]
    return sorted(placed), asked


def _prompt(reader: Reader, question: Question, after: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids of what follows the context up to the answer, and of the answer."""
    if after:
        tail = np.concatenate([reader.engine.tokenize(f"\n\n{question.prompt}"), reader.encode(after)])
        start = question.start
    else:
        tail = np.empty(0, np.int64)
        start = f"\n\nQuestion: {question.prompt}\nAnswer: {question.start}"
    opened = reader.engine.tokenize(start)
    whole = reader.engine.tokenize(start + question.answer)
    shared = common_start(opened, whole)
    return np.concatenate([tail, whole[:shared]]), whole[shared:]


def _filler(recipe: Recipe, sample: int) -> Iterator[str]:
    return sentences(recipe.seed * 1000 + sample) if recipe.text is None else sentences_of(recipe.text.text)


def _fitting(tokens: Callable[[str], int], placed: list[tuple[float, str]], filler: list[str], room: int) -> str | None:
    """The text with as many sentences of the filler as fit into ``room`` tokens, None where not even the facts do.

    The next count to try comes from what a sentence took so far: a few tokenizations instead of many.
    """
    fits, fails = 0, len(filler) + 1
    used = tokens(_merged(placed, []))
    if used > room:
        return None
    each = max(1.0, tokens(" ".join(filler[:100])) / max(1, len(filler[:100])))
    while fails - fits > 1:
        guess = min(max(fits + int((room - used) / each), fits + 1), fails - 1)
        found = tokens(_merged(placed, filler[:guess]))
        if found > room:
            fails, each = guess, each * 1.05
            continue
        each = max(1.0, (found - used) / (guess - fits))
        fits, used = guess, found
        if room - used < each / 2:
            break
    return _merged(placed, filler[:fits])


def _merged(placed: list[tuple[float, str]], filler: list[str]) -> str:
    parts: list[str] = []
    done = 0
    for depth, fact in placed:
        until = round(depth * len(filler))
        parts += [*filler[done:until], fact]
        done = until
    return " ".join([*parts, *filler[done:]])


def long_text(reader: Reader, recipe: Recipe, length: int) -> np.ndarray:
    """``length`` token ids int64 of running text, the beginning-of-text token in front where there is one.

    `InputError` where the text is too short.
    """
    synthetic = islice(sentences(recipe.seed), length // LEAST_WORDS)
    ids = reader.engine.tokenize(recipe.text.text if recipe.text else " ".join(synthetic))
    if reader.engine.bos is not None:
        ids = np.concatenate([[reader.engine.bos], ids])
    if len(ids) < length:
        raise InputError(f"long context: the text has {len(ids):,} tokens, and a length of {length:,} was asked for")
    return ids[:length]
