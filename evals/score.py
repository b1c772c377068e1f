"""Run one model over the windows of a text, and its base beside it: one forward pass of each per window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from llmlite.errors import InputError
from llmlite.evals.divergence import Divergence, check_tokenizers, common_vocabulary, compare_rows, divergence
from llmlite.evals.engines import Engine
from llmlite.evals.perplexity import Perplexity, Protocol, perplexity, window_means
from llmlite.evals.texts import Text
from llmlite.progress import track


@dataclass(frozen=True)
class Score:
    """What one text gave; ``sha256`` is the text's; ``divergence`` is None without a base."""

    sha256: str
    perplexity: Perplexity
    divergence: Divergence | None


@dataclass(frozen=True)
class Windows:
    """How much of a text is scored: ``window`` tokens each (None: the protocol's), at most ``limit`` of them."""

    protocol: Protocol
    window: int | None = None
    limit: int | None = None

    @property
    def length(self) -> int:
        return self.window or self.protocol.window


def score(engine: Engine, base: Engine | None, text: Text, windows: Windows) -> Score:
    """Perplexity of ``engine`` on a text, and its divergence from ``base`` where there is one.

    The base's tokenizer makes the ids where there is a base.
    """
    if base is not None:
        check_tokenizers(base, engine, text.text)
    judge = base or engine
    rows = windows.protocol.windows(judge.tokenize(text.text), judge.bos, windows.length, windows.limit)
    first = windows.protocol.first(windows.length)
    common = common_vocabulary(base, engine) if base is not None else engine.vocab_size
    nll, base_nll, kl, same = [], [], [], []
    for window in track(rows, text.name, len(rows)):
        for targets, mine, theirs in _chunks(engine, base, window, first):
            nll.append(_losses(mine, targets))
            if theirs is not None:
                base_nll.append(_losses(theirs, targets))
                values, equal = compare_rows(theirs, mine, common)
                kl.append(values)
                same.append(equal)
    losses = np.concatenate(nll)
    _refuse_nonsense(losses, engine)
    apart = None
    if base is not None:
        apart = divergence(np.concatenate(kl), np.concatenate(same), common)
        base_perplexity = float(np.exp(np.concatenate(base_nll).mean()))
        apart = replace(apart, by_window=window_means(np.concatenate(kl), len(rows)), base_perplexity=base_perplexity)
    found = replace(perplexity(losses, len(rows)), by_window=window_means(losses, len(rows)))
    return Score(text.digest, found, apart)


def _losses(log_probs: torch.Tensor, targets: np.ndarray) -> np.ndarray:
    """Nats float64 [rows] of the tokens int64 [rows] that came, from log-probabilities float32 [rows, vocab]."""
    picked = log_probs.gather(1, torch.from_numpy(targets).to(log_probs.device)[:, None])[:, 0]
    return -picked.double().cpu().numpy()


def _chunks(
    engine: Engine, base: Engine | None, window: np.ndarray, first: int
) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor | None]]:
    """The scored tokens of a window int64 [rows], with the rows that predict them in the model and its base."""
    inputs = window[:-1]  # the last token has no successor to score
    theirs = base.log_probs(inputs, first) if base is not None else None
    for start, mine in engine.log_probs(inputs, first):
        targets = window[start + 1 : start + 1 + len(mine)]
        if theirs is None:
            yield targets, mine, None
            continue
        base_start, base_rows = next(theirs)
        assert (base_start, len(base_rows)) == (start, len(mine)), "engines must give the same chunks"
        yield targets, mine, base_rows


def _refuse_nonsense(nll: np.ndarray, engine: Engine) -> None:
    bad = int(np.count_nonzero(~np.isfinite(nll)))
    if bad:
        raise InputError(
            f"{bad:,} of {len(nll):,} predictions of the {engine.name} model are not finite: broken weights"
        )
