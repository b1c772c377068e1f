"""Documents -> rows of token ids, all of one length."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from llmlite.calibrate.corpus import Corpus, Document
from llmlite.errors import InputError, first_line

CHOICE = 4  # rows are drawn from this many times as much text as is needed: tokenizing more is slow


@dataclass(frozen=True)
class Rows:
    """``ids`` int64 [rows, length]; ``sources`` tells how many rows each corpus gave, and its digest."""

    ids: np.ndarray
    sources: tuple[dict[str, Any], ...]


def token_rows(corpora: list[Corpus], tokenizer: Any, tokens: int, length: int, seed: int) -> Rows:
    """About ``tokens`` tokens in rows of ``length``, shared between the corpora by their weights.

    Rows are cut at random places from a corpus's documents put one behind the other, each with the special
    tokens that the tokenizer gives a text, and chats through its template; none overlaps another. What a corpus is
    too short to give comes from the others, and only where all are used up are the rows fewer than asked for.
    Raises `InputError` where there is not one full row, where there are fewer rows than texts of the user's own, and
    for chats where the tokenizer has no chat template.
    """
    wanted = tokens // length
    if wanted < sum(not corpus.packaged for corpus in corpora):
        raise InputError(
            f"{tokens} calibration tokens are {wanted} rows of {length}, less than one for each text given"
        )
    streams = [
        _Stream(corpus, tokenizer, length, random.Random(f"{seed}:{number}")) for number, corpus in enumerate(corpora)
    ]
    parts = [stream.draw(share) for stream, share in zip(streams, _shares(streams, wanted), strict=True)]
    ids = np.concatenate(parts)
    if not len(ids):
        raise InputError(f"the calibration text is too short: it has less than one row of {length} tokens")
    sources = tuple(
        {"source": corpus.source, "sha256": corpus.sha256, "rows": len(rows), "tokens": rows.size}
        for corpus, rows in zip(corpora, parts, strict=True)
    )
    return Rows(ids, sources)


def _shares(streams: list[_Stream], wanted: int) -> list[int]:
    """Rows of each stream, ``wanted`` in all where they have so many.

    Each row goes to the stream that is furthest behind its weight, among those that have another: the
    Webster method of apportionment, which gives equal weights equal numbers.
    """
    given = [0] * len(streams)
    for _ in range(wanted):
        able = [n for n, stream in enumerate(streams) if stream.has(given[n] + 1)]
        if not able:
            break
        given[min(able, key=lambda n: (given[n] + 0.5) / streams[n].corpus.weight)] += 1
    return given


class _Stream:
    """A corpus's documents in random order, tokenized one behind the other as far as rows are asked for."""

    def __init__(self, corpus: Corpus, tokenizer: Any, length: int, chance: random.Random):
        if tokenizer.chat_template is None and any(d.messages for d in corpus.documents):
            raise InputError(
                f"{corpus.source}: holds chats and the model's tokenizer has no chat template; give plain text instead"
            )
        self.corpus, self._tokenizer, self._length, self._chance = corpus, tokenizer, length, chance
        self._ids: list[int] = []
        documents = list(corpus.documents)
        chance.shuffle(documents)
        self._documents = iter(documents)

    def has(self, rows: int) -> bool:
        """Whether the corpus has so many rows."""
        while len(self._ids) < rows * self._length:
            document = next(self._documents, None)
            if document is None:
                return False
            try:
                self._ids += encode(document, self._tokenizer)
            except TemplateError as error:
                raise InputError(
                    f"{self.corpus.source}: a chat does not go through the model's chat template ({first_line(error)})"
                ) from None
        return True

    def draw(self, rows: int) -> np.ndarray:
        """``rows`` rows, int64 [rows, length], in the order of the text; the corpus must have them."""
        self.has(rows * CHOICE)
        chosen = sorted(self._chance.sample(range(len(self._ids) // self._length), rows))
        starts = [number * self._length for number in chosen]
        pieces = [self._ids[start : start + self._length] for start in starts]
        return np.array(pieces, dtype=np.int64).reshape(-1, self._length)


def encode(document: Document, tokenizer: Any) -> list[int]:
    """Token ids of a document: text with the tokenizer's special tokens, a chat through its template."""
    if document.messages is None:
        return tokenizer(document.text, verbose=False).input_ids
    return tokenizer.apply_chat_template(list(document.messages), tokenize=True, return_dict=False)
