"""Chats -> rows of token ids that say where the answers are, several chats in a row.

The text is what the model's own chat template makes of the messages, so training sees what serving will send. A token
counts in the loss if it lies in an answer, with the mark that ends it.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError

from llmlite.calibrate.corpus import Corpus, Message
from llmlite.errors import InputError, first_line
from llmlite.progress import track

ANSWER = "assistant"
IGNORED = -100  # the label of a token without loss
HELD_OUT_MOST = 256  # conversations; more would only make each look at them slower


@dataclass(frozen=True)
class Tokens:
    """Token ids of one conversation, and for each whether its prediction counts."""

    ids: tuple[int, ...]
    counts: tuple[bool, ...]


@dataclass(frozen=True)
class Counts:
    """What became of the conversations of the data."""

    given: int
    repeated: int
    without_answer: int
    too_long: int
    cut: int
    used: int

    def notes(self, length: int) -> list[str]:
        """A sentence for each kind that is not used as it is."""
        told = [
            (self.repeated, "are in the data more than once: the others were left out"),
            (self.without_answer, "have an empty answer or none, and were left out"),
            (self.too_long, f"are longer than --length {length} up to their first answer, and were left out"),
            (self.cut, f"are longer than --length {length}, and were cut after an answer"),
        ]
        return [f"{count} of {self.given} conversations {what}" for count, what in told if count]


@dataclass(frozen=True)
class Row:
    """Conversations one behind the other: ids, positions within each, and labels (`IGNORED` where nothing counts).

    The label of a position is the token that is to be predicted there, which is the next one.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def counted(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def tokenized(corpora: Sequence[Corpus], tokenizer: Any, length: int) -> tuple[list[Tokens], Counts]:
    """All conversations that can be trained on, at most ``length`` tokens each.

    `InputError` where the data has plain text, where the tokenizer has no chat template or it refuses a conversation,
    and where none is left.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            "the model's tokenizer has no chat template, and chats can't be written without; use a chat model"
        )
    if not tokenizer.is_fast:
        raise InputError("the model's tokenizer is not of the fast kind, which alone tells where a token's text lies")
    chats: list[tuple[Message, ...]] = []
    for corpus in corpora:
        if any(document.messages is None for document in corpus.documents):
            raise InputError(f"{corpus.source}: holds plain text; chats or instructions with answers are right")
        chats += [document.messages for document in corpus.documents if document.messages is not None]
    unique = list({tuple(tuple(sorted(message.items())) for message in chat): chat for chat in chats}.values())
    answered = [trimmed for chat in unique if (trimmed := _up_to_last_answer(chat))]
    found, cut = [], 0
    for chat in track(answered, "tokens of the data"):
        tokens, whole = _fitting(chat, tokenizer, length)
        found += tokens
        cut += bool(tokens) and not whole
    counts = Counts(
        given=len(chats), repeated=len(chats) - len(unique), without_answer=len(unique) - len(answered),
        too_long=len(answered) - len(found), cut=cut, used=len(found),
    )  # fmt: skip
    if not found:
        raise InputError(
            "; ".join(["the data has no conversation to train on", *counts.notes(length)])
            + "; conversations with answers, and a --length that holds them, are right"
        )
    return found, counts


def _up_to_last_answer(chat: tuple[Message, ...]) -> tuple[Message, ...]:
    """The conversation without what follows its last answer; nothing where an answer is empty or none is there."""
    places = _answers(chat)
    if not places or any(not chat[place]["content"].strip() for place in places):
        return ()
    return chat[: places[-1] + 1]


def _answers(chat: Sequence[Message]) -> list[int]:
    """Where the answers stand; what opens a chat is a greeting, and answers nothing."""
    return [place for place, message in enumerate(chat) if place and message["role"] == ANSWER]


def _fitting(chat: tuple[Message, ...], tokenizer: Any, length: int) -> tuple[list[Tokens], bool]:
    """The longest beginning of a chat that ends with an answer and has at most ``length`` tokens, and if it is all."""
    ends = [place + 1 for place in _answers(chat)]
    for end in reversed(ends):
        tokens = conversation_tokens(chat[:end], tokenizer)
        if len(tokens.ids) <= length:
            return [tokens], end == len(chat)
    return [], False


def conversation_tokens(chat: Sequence[Message], tokenizer: Any) -> Tokens:
    """The tokens of a chat that ends with an answer.

    An answer is what the template puts behind the prompt of its turn. Where the template writes earlier turns
    otherwise once a later one is there (as those that drop earlier reasoning do), only the last answer counts.
    """
    text = _written(chat, tokenizer)
    spans = []
    for place in _answers(chat):
        prompt, up_to = _written(chat[:place], tokenizer, True), _written(chat[: place + 1], tokenizer)
        last = place == len(chat) - 1
        if last and not up_to.startswith(prompt):
            raise InputError(
                "the model's chat template does not put an answer behind the prompt it makes for it, so answers can't "
                "be told from what they answer"
            )
        if up_to.startswith(prompt) and text.startswith(up_to):
            spans.append((len(prompt), len(up_to.rstrip())))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    counts = _inside(encoded["offset_mapping"], spans)
    return Tokens(tuple(encoded["input_ids"]), counts)


def _written(chat: Sequence[Message], tokenizer: Any, prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template([dict(m) for m in chat], tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        raise InputError(
            f"a conversation of the data does not go through the model's chat template ({first_line(error)})"
        ) from None


def _inside(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> tuple[bool, ...]:
    """For each token's (first, behind the last) character whether it lies within one of the rising ``spans``."""
    out, rest = [], list(spans)
    for start, stop in offsets:
        while rest and start >= rest[0][1]:
            rest.pop(0)
        out.append(bool(rest) and start >= rest[0][0] and stop <= rest[0][1])
    return tuple(out)


def held_out(conversations: Sequence[Tokens], share: float, seed: int) -> tuple[list[Tokens], list[Tokens]]:
    """Those to train on and those that judge, both in an order by ``seed``; `InputError` where one has none."""
    if not 0 < share < 1:
        raise InputError(f"--held-out {share}: a share above 0 and below 1 is right")
    count = min(max(round(len(conversations) * share), 1), HELD_OUT_MOST)
    if len(conversations) <= count:
        raise InputError(
            f"the data has {len(conversations)} usable conversations, so none is left to train on beside those that "
            f"judge; at least {count + 1} are right"
        )
    order = list(range(len(conversations)))
    random.Random(seed).shuffle(order)
    return [conversations[n] for n in order[count:]], [conversations[n] for n in order[:count]]


def packed_rows(conversations: Sequence[Tokens], length: int, pack: bool) -> list[Row]:
    """Rows of at most ``length`` tokens: each in the fullest that it fits with ``pack``, else in one of its own.

    In the order that they have: packed by length, a row of long ones and one of short ones would pull apart.
    """
    if not pack:
        return [_row([tokens]) for tokens in conversations]
    rows: list[list[Tokens]] = []
    room: list[tuple[int, int]] = []  # free tokens and number of each row, rising
    for tokens in conversations:
        size = len(tokens.ids)
        place = bisect_left(room, (size, 0))
        if place == len(room):
            rows.append([])
            left, number = length, len(rows) - 1
        else:
            left, number = room.pop(place)
        rows[number].append(tokens)
        insort(room, (left - size, number))
    return [_row(row) for row in rows]


def _row(conversations: Sequence[Tokens]) -> Row:
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for tokens in conversations:
        ids += tokens.ids
        positions += range(len(tokens.ids))
        following = zip(tokens.ids[1:], tokens.counts[1:], strict=True)
        labels += [*(token if counts else IGNORED for token, counts in following), IGNORED]
    return Row(tuple(ids), tuple(positions), tuple(labels))


def batch(rows: Sequence[Row], device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, positions and labels, int64 [rows, longest]; what fills a row up is a conversation of its own, no label."""
    longest = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    positions, labels = torch.arange(longest).repeat(len(rows), 1), torch.full_like(ids, IGNORED)
    for number, row in enumerate(rows):
        size = len(row.ids)
        ids[number, :size] = torch.tensor(row.ids)
        labels[number, :size] = torch.tensor(row.labels)
        positions[number, size:] -= size
        positions[number, :size] = torch.tensor(row.positions)
    return ids.to(device), positions.to(device), labels.to(device)
