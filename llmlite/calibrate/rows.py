"""Documents -> rows of token ids, all of one length."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError

from llmlite.calibrate.corpus import Corpus, Document
from llmlite.errors import InputError, first_line


@dataclass(frozen=True)
class Rows:
    """``ids`` int64 [rows, length]; ``sources`` tells how many rows each corpus gave, and its digest."""

    ids: np.ndarray
    sources: tuple[dict[str, Any], ...]


def token_rows(corpora: list[Corpus], tokenizer: Any, tokens: int, length: int, seed: int) -> Rows:
    """About ``tokens`` tokens in rows of ``length``, an equal share from each corpus.

    Rows are cut at random places from a corpus's documents put one behind the other, each with the special
    tokens that the tokenizer gives a text, and chats through its template; none overlaps another. A corpus too
    short for its share gives what it has. Raises `InputError` where there is not one full row, and for chats where
    the tokenizer has no chat template.
    """
    wanted = tokens // length
    if wanted < len(corpora):
        raise InputError(
            f"{tokens} calibration tokens are {wanted} rows of {length}, less than one for each text given"
        )
    parts: list[np.ndarray] = []
    sources = []
    for number, corpus in enumerate(corpora):
        share = wanted // len(corpora) + (number < wanted % len(corpora))
        if tokenizer.chat_template is None and any(d.messages for d in corpus.documents):
            raise InputError(
                f"{corpus.source}: holds chats and the model's tokenizer has no chat template; give plain text instead"
            )
        try:
            rows = _cut(corpus, tokenizer, share, length, random.Random(f"{seed}:{number}"))
        except TemplateError as error:
            raise InputError(
                f"{corpus.source}: a chat does not go through the model's chat template ({first_line(error)})"
            ) from None
        parts.append(rows)
        sources.append({"source": corpus.source, "sha256": corpus.sha256, "rows": len(rows), "tokens": rows.size})
    ids = np.concatenate(parts)
    if not len(ids):
        raise InputError(f"the calibration text is too short: it has less than one row of {length} tokens")
    return Rows(ids, tuple(sources))


def _cut(corpus: Corpus, tokenizer: Any, share: int, length: int, chance: random.Random) -> np.ndarray:
    documents = list(corpus.documents)
    chance.shuffle(documents)
    stream: list[int] = []
    enough = share * length * 4  # cut from no more than four times what is needed: tokenizing is slow
    for document in documents:
        stream += encode(document, tokenizer)
        if len(stream) >= enough and len(documents) > 1:
            break
    pieces = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    chosen = sorted(chance.sample(range(len(pieces)), min(share, len(pieces))))
    return np.array([pieces[n] for n in chosen], dtype=np.int64).reshape(-1, length)


def encode(document: Document, tokenizer: Any) -> list[int]:
    """Token ids of a document: text with the tokenizer's special tokens, a chat through its template."""
    if document.messages is None:
        return tokenizer(document.text, verbose=False).input_ids
    return tokenizer.apply_chat_template(list(document.messages), tokenize=True, return_dict=False)
