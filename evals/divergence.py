"""How far an artifact's predictions are from those of the model it was made from.

Kullback-Leibler divergence KL(base || artifact) = sum over the vocabulary of p * (log p - log q), in nats, at
every scored position, both models given identical token ids. Log-probabilities are float32 as computed, the sum
is float64; nothing is rounded or clipped on the way.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from llmlite.errors import InputError
from llmlite.evals.engines import Engine

PROBE_CHARACTERS = 20_000


@dataclass(frozen=True)
class Divergence:
    """Over the scored positions: KL in nats, and the share of them where both models like the same token best.

    ``stderr`` belongs to ``mean_kl``; ``vocabulary``: how many token ids were compared (fewer than a model has
    when one of the two pads its vocabulary; both are then normalized over the common ids); ``base_perplexity``:
    the base's own on these windows; ``by_window``: the mean KL of each.
    """

    mean_kl: float
    stderr: float
    median_kl: float
    p99_kl: float
    p999_kl: float
    max_kl: float
    same_top: float
    vocabulary: int
    base_perplexity: float | None = None
    by_window: tuple[float, ...] = ()


def compare_rows(base: torch.Tensor, artifact: torch.Tensor, common: int) -> tuple[np.ndarray, np.ndarray]:
    """KL float64 [rows] and equality of the best token bool [rows], from log-probabilities float32 [rows, vocab]."""
    p, q = _common(base, common), _common(artifact.to(base.device), common)
    weight = p.exp()
    terms = torch.where(weight > 0, weight * (p - q), 0)  # 0 * log 0 is 0
    same = p.argmax(dim=-1) == q.argmax(dim=-1)
    return terms.sum(dim=-1, dtype=torch.float64).cpu().numpy(), same.cpu().numpy()


def _common(log_probs: torch.Tensor, common: int) -> torch.Tensor:
    return log_probs if log_probs.shape[-1] == common else torch.log_softmax(log_probs[:, :common], dim=-1)


def divergence(kl: np.ndarray, same: np.ndarray, vocabulary: int) -> Divergence:
    """From KL float64 [n] and bool [n], n >= 2; percentiles interpolate linearly."""
    median, p99, p999 = np.quantile(kl, [0.5, 0.99, 0.999])
    return Divergence(
        mean_kl=float(kl.mean()),
        stderr=float(kl.std() / np.sqrt(len(kl) - 1)),
        median_kl=float(median),
        p99_kl=float(p99),
        p999_kl=float(p999),
        max_kl=float(kl.max()),
        same_top=float(same.mean()),
        vocabulary=vocabulary,
    )


def common_vocabulary(base: Engine, artifact: Engine) -> int:
    """How many token ids both models share; `InputError` if more than padding tells them apart."""
    common = min(base.vocab_size, artifact.vocab_size)
    if common < base.known_tokens:
        raise InputError(
            f"the base predicts {base.vocab_size:,} tokens and its tokenizer knows {base.known_tokens:,}, the artifact "
            f"predicts {artifact.vocab_size:,}: not the model it was made from"
        )
    return common


def check_tokenizers(base: Engine, artifact: Engine, text: str) -> None:
    """`InputError` unless both make the same ids of the text's start, the token put in front included."""
    if base.bos != artifact.bos:
        raise InputError(
            f"the base's tokenizer puts {_named(base.bos)} in front of a text, the artifact's {_named(artifact.bos)}: "
            "their predictions can't be compared"
        )
    start = text[:PROBE_CHARACTERS]
    ours, theirs = base.tokenize(start), artifact.tokenize(start)
    if np.array_equal(ours, theirs):
        return
    shorter = min(len(ours), len(theirs))
    unequal = np.flatnonzero(ours[:shorter] != theirs[:shorter])
    where = int(unequal[0]) if len(unequal) else shorter
    raise InputError(f"base and artifact tokenize the text differently from token {where:,} on: not the same tokenizer")


def _named(token: int | None) -> str:
    return "nothing" if token is None else f"token {token}"
