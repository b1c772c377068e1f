"""Run one model over the windows of a text, and its base beside it: one forward pass of each per window."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from llmlite.errors import InputError
from llmlite.evals.base import Base, Predictions
from llmlite.evals.divergence import (
    Compared,
    Divergence,
    Suffered,
    common_vocabulary,
    compare_rows,
    divergence,
    worst_tokens,
)
from llmlite.evals.engines import Engine
from llmlite.evals.perplexity import Bucket, Perplexity, Places, Window, Windows, perplexity
from llmlite.evals.texts import Text
from llmlite.progress import track


@dataclass(frozen=True)
class Score:
    """What one text gave; ``sha256`` is the text's; ``divergence`` is None without a base."""

    sha256: str
    perplexity: Perplexity
    divergence: Divergence | None

    def to_json(self) -> dict:
        """Plain data; without a base there is no key for the divergence."""
        return {key: _plain(value) for key, value in asdict(self).items() if value is not None}

    @classmethod
    def from_json(cls, data: dict) -> Score:
        """What `to_json` wrote, also by way of a file; KeyError or TypeError where it is something else."""
        measured, apart = dict(data["perplexity"]), data.get("divergence")
        measured["by_position"] = tuple(Bucket(**bucket) for bucket in measured["by_position"])
        measured["by_window"] = tuple(measured["by_window"])
        if apart is not None:
            apart = dict(apart)
            apart["by_position"] = tuple(Bucket(**bucket) for bucket in apart["by_position"])
            apart["by_window"] = tuple(apart["by_window"])
            apart["worst"] = tuple(Suffered(**token) for token in apart["worst"])
        return cls(data["sha256"], Perplexity(**measured), Divergence(**apart) if apart is not None else None)


def _plain(value: Any) -> Any:
    """Tuples as lists: what a JSON file gives back."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def score(engine: Engine, base: Base | None, text: Text, windows: Windows) -> Score:
    """Perplexity of ``engine`` on a text, and its divergence from ``base`` where there is one.

    The base's tokenizer makes the ids where there is a base. At any time the predictions of 64 positions are in
    memory, or what llama.cpp gives for one decode. `InputError` for a text shorter than a window, for another
    tokenizer or vocabulary, and for predictions that are not finite.
    """
    with base.predictions(engine, text, windows) if base is not None else nullcontext() as theirs:
        cut = windows.cut(engine, text) if theirs is None else theirs.windows
        places = Places.of(cut)
        if theirs is None:
            return Score(text.digest, perplexity(_losses(engine, cut, text), places), None)
        common = common_vocabulary(theirs, engine)
        rows = Compared.joined(list(_compared(engine, theirs, common, text)))
        _refuse_nonsense(rows.own, f"{engine.name} model")
        _refuse_nonsense(rows.base, "base")
    losses = -rows.own.astype(np.float64)
    worst = worst_tokens(rows, places, cut, engine.decode)
    return Score(text.digest, perplexity(losses, places), divergence(rows, places, common, worst))


def _losses(engine: Engine, windows: Sequence[Window], text: Text) -> np.ndarray:
    """nll float64 [n] of every scored token."""
    out = []
    for window in track(windows, text.name, len(windows)):
        for start, rows in engine.log_probs(window.tokens[:-1], window.first):
            picked = rows.gather(1, _targets(window, start, rows)[:, None])[:, 0]
            out.append(-picked.double().cpu().numpy())
    losses = np.concatenate(out)
    _refuse_nonsense(losses, f"{engine.name} model")
    return losses


def _compared(engine: Engine, base: Predictions, common: int, text: Text) -> Iterator[Compared]:
    for number, window in enumerate(track(base.windows, text.name, len(base.windows))):
        theirs = base.rows(number)
        for start, mine in engine.log_probs(window.tokens[:-1], window.first):
            base_start, base_rows = next(theirs)
            assert (base_start, len(base_rows)) == (start, len(mine)), "engines must give the same chunks"
            yield compare_rows(base_rows, mine, _targets(window, start, base_rows), common)


def _targets(window: Window, start: int, rows: torch.Tensor) -> torch.Tensor:
    """The tokens int64 [rows] that positions ``start``, ... predict."""
    return torch.from_numpy(window.tokens[start + 1 : start + 1 + len(rows)]).to(rows.device)


def _refuse_nonsense(values: np.ndarray, whose: str) -> None:
    bad = int(np.count_nonzero(~np.isfinite(values)))
    if bad:
        raise InputError(f"{bad:,} of {len(values):,} predictions of the {whose} are not finite: broken weights")
