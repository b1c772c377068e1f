"""A small model that guesses what a larger one of the same vocabulary says next, run by llama.cpp.

It has a context of its own with one sequence for each slot. What it holds is brought in step with what was drawn when
guesses are next asked for, a bounded number of tokens at a time; the guesses of all sequences are made together.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llmlite.errors import InputError
from llmlite.evals.llama import Llama, LlamaSettings
from llmlite.serve.engines.base import EngineBroken
from llmlite.serve.prefixes import common_length

BATCH = 256
"""Tokens of one decode, and most tokens with which it catches up before it lets the larger model go on."""

SURE = 0.4
"""Guesses end where the likeliest token has less than this probability: it would seldom be the one that is drawn."""


@dataclass(eq=False)
class _Place:
    number: int
    held: list[int] = field(default_factory=list)
    agreed: int = 0  # so many of them are known to be the owner's, too
    owner: DraftSequence | None = None


class DraftSequence:
    """The guesses of one sequence: see `Drafter`."""

    def __init__(self, model: DraftModel, prompt: list[int]) -> None:
        self.tokens = list(prompt)
        self.guesses: list[int] = []
        self.place: _Place | None = None
        self._model = model

    def ask(self, most: int) -> None:
        self.guesses = []
        if most and len(self.tokens) + most <= self._model.context:
            self._model.asked.append((self, most))

    def propose(self) -> list[int]:
        return self.guesses

    def accept(self, token: int) -> None:
        self.tokens.append(token)

    def close(self) -> None:
        if self.place is not None:
            self.place.owner = None
            self.place = None


class DraftModel:
    """``slots`` sequences of up to ``context`` tokens. Used on the engine thread alone.

    ``seconds``: what a guess has cost, a moving average; 0 until there was one.
    """

    def __init__(self, file: Path, context: int, slots: int, threads: int | None) -> None:
        self.file = file
        dry = Llama(file, LlamaSettings(context=BATCH, dry=True))
        trained = dry.api.llama_model_n_ctx_train(dry.model)
        dry.close()
        self.context = min(context, trained)
        settings = LlamaSettings(self.context * slots, slots, batch=BATCH, outputs=slots, threads=threads)
        self.llama = Llama(file, settings)
        self.asked: list[tuple[DraftSequence, int]] = []
        self.seconds = 0.0
        self._places = [_Place(number) for number in range(slots)]
        self._memory = self.llama.api.llama_get_memory(self.llama.context)

    def open(self, prompt: list[int]) -> DraftSequence:
        """Guesses for a sequence that begins with ``prompt``; nothing is computed before they are asked for."""
        return DraftSequence(self, prompt)

    def run(self) -> None:
        """Make the guesses that sequences have asked for since the last call."""
        asked, self.asked = self.asked, []
        if not asked:
            return
        self._settle([sequence for sequence, _ in asked])
        rows = self._catch_up([sequence for sequence, _ in asked])
        begun, made = time.perf_counter(), 0
        while rows:
            going: list[DraftSequence] = []
            for sequence, most in asked:
                if sequence in rows and self._guess(sequence, rows[sequence]) and len(sequence.guesses) < most:
                    going.append(sequence)
            made += len(rows)
            rows = self._decode([(sequence, sequence.guesses[-1:]) for sequence in going])
        if made:
            cost = (time.perf_counter() - begun) / made
            self.seconds = cost if self.seconds == 0 else 0.8 * self.seconds + 0.2 * cost

    def close(self) -> None:
        """Free the weights."""
        self.llama.close()

    def _settle(self, sequences: list[DraftSequence]) -> None:
        """Give those that have none a place: a free one, best with their beginning in it; else one that did not ask."""
        for sequence in sequences:
            if sequence.place is not None:
                continue
            free = [place for place in self._places if place.owner is None]
            free = free or [place for place in self._places if place.owner not in sequences]
            if not free:
                continue
            place = max(free, key=lambda place: common_length(place.held, sequence.tokens))
            if place.owner is not None:
                place.owner.place = None
            place.owner, sequence.place = sequence, place
            place.agreed = common_length(place.held, sequence.tokens)

    def _catch_up(self, sequences: list[DraftSequence]) -> dict[DraftSequence, np.ndarray]:
        """Run what was drawn since; logits of those that are in step by that."""
        room, pieces, ready = BATCH, [], set()
        for number, sequence in enumerate(sequences):
            if sequence.place is None:
                continue
            place = sequence.place
            common = _agreed(place, sequence.tokens)
            if common < len(place.held):
                if not self.llama.api.llama_memory_seq_rm(self._memory, place.number, common, -1):
                    raise EngineBroken(f"llama.cpp could not take back sequence {place.number} of the draft model")
                del place.held[common:]
            missing = sequence.tokens[common:]
            share = missing[: room // (len(sequences) - number)]
            if share:
                pieces.append((sequence, share))
                room -= len(share)
                if len(share) == len(missing):
                    ready.add(sequence)
        rows = self._decode(pieces)
        return {sequence: row for sequence, row in rows.items() if sequence in ready}

    def _guess(self, sequence: DraftSequence, logits: np.ndarray) -> bool:
        """Take the likeliest token for a guess, unless it is not sure enough."""
        token = int(np.argmax(logits))
        if 1 / np.exp(logits - logits[token]).sum() < SURE:
            return False
        sequence.guesses.append(token)
        return True

    def _decode(self, pieces: list[tuple[DraftSequence, list[int]]]) -> dict[DraftSequence, np.ndarray]:
        """Append tokens; the logits of the last one of each, float32 [vocab], valid until the next call."""
        if not pieces:
            return {}
        pieces = sorted(pieces, key=lambda pair: _place(pair[0]).number)
        batch, end = self.llama.batch, 0
        for sequence, tokens in pieces:
            place, begin, end = _place(sequence), end, end + len(tokens)
            batch.token[begin:end] = tokens
            batch.position[begin:end] = np.arange(len(place.held), len(place.held) + len(tokens))
            batch.sequence[begin:end] = place.number
            batch.wanted[begin:end] = 0
            batch.wanted[end - 1] = 1
        batch.struct.n_tokens = end
        if status := self.llama.api.llama_decode(self.llama.context, batch.struct):
            raise EngineBroken(f"llama.cpp failed while the draft model computed (llama_decode gave {status})")
        for sequence, tokens in pieces:
            _place(sequence).held += tokens
        pointer = self.llama.api.llama_get_logits(self.llama.context)
        rows = np.ctypeslib.as_array(pointer, shape=(len(pieces), self.llama.vocab_size))
        return {sequence: row for (sequence, _), row in zip(pieces, rows, strict=True)}


def open_draft(file: Path, target: Llama, context: int, slots: int, threads: int | None) -> DraftModel:
    """A draft model for ``target``. Raises `InputError` for one that has another vocabulary or can't be cut."""
    draft = DraftModel(file, context, slots, threads)
    api, model = draft.llama.api, draft.llama.model
    try:
        if not api.llama_model_has_decoder(model) or api.llama_model_has_encoder(model):
            raise InputError(f"draft {file}: is not a decoder language model")
        if api.llama_model_is_recurrent(model) or api.llama_model_is_hybrid(model):
            raise InputError(f"draft {file}: has a recurrent state, from which guesses can't be taken back")
        _check_vocabulary(draft.llama, target)
    except InputError:
        draft.close()
        raise
    return draft


def _check_vocabulary(draft: Llama, target: Llama) -> None:
    counts = draft.known_tokens(), target.known_tokens()
    if counts[0] != counts[1] or draft.vocab_size > target.vocab_size:
        raise InputError(
            f"draft {draft.file}: has {counts[0]:,} tokens, the model {counts[1]:,}: a draft needs the same vocabulary"
        )
    for token in range(counts[0]):
        theirs, ours = draft.piece(token, special=True), target.piece(token, special=True)
        if theirs != ours:
            raise InputError(
                f"draft {draft.file}: token {token} is {theirs!r}, the model's is {ours!r}: a draft needs the same "
                "vocabulary"
            )


def _agreed(place: _Place, tokens: list[int]) -> int:
    """How many of the first ``tokens``, but for the last one, the place holds."""
    most = min(len(place.held), len(tokens) - 1)
    length = min(place.agreed, most)
    while length < most and place.held[length] == tokens[length]:
        length += 1
    place.agreed = length
    return length


def _place(sequence: DraftSequence) -> _Place:
    assert sequence.place is not None
    return sequence.place
