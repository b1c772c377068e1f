"""How far an artifact's predictions are from those of the model it was made from.

Kullback-Leibler divergence KL(base || artifact) = sum over the vocabulary of p * (ln p - ln q), in nats, at
every scored position, both models given identical token ids. Log-probabilities are float32 as computed (or as
`kept` gives them back: its text says what that adds), a position's sum is float32 over all tokens, none of them
left out, and means over positions are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from llmlite.errors import InputError
from llmlite.evals.perplexity import Bucket, Places, Window
from llmlite.evals.rows import best_token, log_softmax

PROBE_CHARACTERS = 20_000
WORST = 20  # tokens that are named
AROUND = 12  # tokens of context shown before such a token
AFTER = 4  # and after it


class Vocabulary(Protocol):
    """What is compared of two models before their predictions are; see `engines.Engine`."""

    vocab_size: int
    known_tokens: int
    bos: int | None

    def tokenize(self, text: str) -> np.ndarray: ...


@dataclass(frozen=True)
class Suffered:
    """A token whose prediction changed much: ``kl`` there, its text between what stood ``before`` and ``after`` it.

    ``index``: its place among the text's token ids; ``probability``: what the artifact gave it, ``base_probability``
    what the base gave it; ``top`` and ``base_top``: the token that each liked best, with its probability.
    """

    index: int
    kl: float
    before: str
    text: str
    after: str
    probability: float
    base_probability: float
    top: str
    top_probability: float
    base_top: str
    base_top_probability: float


@dataclass(frozen=True)
class Divergence:
    """Over the scored positions: KL in nats, and the share of them where both models like the same token best.

    ``stderr`` belongs to ``mean_kl``; ``mean_delta_p`` and ``rms_delta_p``: mean and root mean square of the change
    of the correct token's probability, artifact less base, as a share of 1; ``base_perplexity``: the base's own on
    these windows; ``vocabulary``: how many token ids were compared (fewer than a model has when one of the two pads
    its vocabulary; both are then normalized over the common ids); ``by_position``: mean KL of ranges of positions;
    ``by_window``: of each window; ``worst``: the tokens with the largest KL.
    """

    mean_kl: float
    stderr: float
    median_kl: float
    p95_kl: float
    p99_kl: float
    p999_kl: float
    max_kl: float
    same_top: float
    mean_delta_p: float
    rms_delta_p: float
    base_perplexity: float
    vocabulary: int
    by_position: tuple[Bucket, ...]
    by_window: tuple[float, ...]
    worst: tuple[Suffered, ...]


@dataclass(frozen=True)
class Compared:
    """What is kept of positions: numpy arrays [n]. ``kl`` float64; the rest is float32 or int64.

    ``own``: log-probability of the correct token by the artifact as it stands; ``base``, ``artifact``: by both over the
    common ids; ``tops``, ``base_tops``: the best token's id; ``best``, ``base_best``: its log-probability.
    """

    kl: np.ndarray
    own: np.ndarray
    artifact: np.ndarray
    base: np.ndarray
    tops: np.ndarray
    base_tops: np.ndarray
    best: np.ndarray
    base_best: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Compared]) -> Compared:
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in cls.__dataclass_fields__))


def compare_rows(base: torch.Tensor, artifact: torch.Tensor, targets: torch.Tensor, common: int) -> Compared:
    """Compare log-probabilities float32 [rows, vocab] of both over the first ``common`` ids.

    ``targets`` int64 [rows]: the correct tokens, all below ``common``.
    """
    artifact = artifact.to(base.device)
    p, q = _common(base, common), _common(artifact, common)
    (best, top), (base_best, base_top) = best_token(q), best_token(p)
    wanted = targets.to(base.device)[:, None]
    own = artifact.gather(1, wanted)[:, 0]
    figures = (_kl(p, q), own, q.gather(1, wanted)[:, 0], p.gather(1, wanted)[:, 0], top, base_top, best, base_best)
    kl, *rest = (figure.cpu().numpy() for figure in figures)
    return Compared(kl.astype(np.float64), *rest)


def _kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """float32 [rows]."""
    weight = p.exp()
    kl = torch.linalg.vecdot(weight, p - q)
    if not bool(torch.isfinite(kl).all()):  # 0 * ln 0 is 0
        kl = torch.where(weight > 0, weight * (p - q), 0).sum(dim=-1)
    return kl


def _common(log_probs: torch.Tensor, common: int) -> torch.Tensor:
    return log_probs if log_probs.shape[-1] == common else log_softmax(log_probs[:, :common])


def divergence(rows: Compared, places: Places, vocabulary: int, worst: tuple[Suffered, ...] = ()) -> Divergence:
    """From n >= 2 positions in the order of ``places``; percentiles interpolate linearly."""
    kl = rows.kl
    median, p95, p99, p999 = np.quantile(kl, [0.5, 0.95, 0.99, 0.999])
    moved = np.exp(rows.artifact.astype(np.float64)) - np.exp(rows.base.astype(np.float64))
    return Divergence(
        mean_kl=float(kl.mean()),
        stderr=float(kl.std() / np.sqrt(len(kl) - 1)),
        median_kl=float(median),
        p95_kl=float(p95),
        p99_kl=float(p99),
        p999_kl=float(p999),
        max_kl=float(kl.max()),
        same_top=float((rows.tops == rows.base_tops).mean()),
        mean_delta_p=float(moved.mean()),
        rms_delta_p=float(np.sqrt((moved**2).mean())),
        base_perplexity=float(np.exp(-rows.base.mean(dtype=np.float64))),
        vocabulary=vocabulary,
        by_position=places.by_position(kl),
        by_window=places.by_window(kl),
        worst=worst,
    )


def worst_tokens(
    rows: Compared, places: Places, windows: Sequence[Window], decode: Callable[[np.ndarray], str]
) -> tuple[Suffered, ...]:
    """The `WORST` tokens with the largest KL, the largest first; ``decode`` makes text of token ids int64 [n]."""
    out = []
    for n in np.argsort(-rows.kl, kind="stable")[:WORST].tolist():
        tokens, place = windows[places.window[n]].tokens, int(places.position[n])
        out.append(
            Suffered(
                index=int(places.index[n]),
                kl=float(rows.kl[n]),
                before=decode(tokens[max(place - AROUND, 0) : place]),
                text=decode(tokens[place : place + 1]),
                after=decode(tokens[place + 1 : place + 1 + AFTER]),
                probability=float(np.exp(rows.artifact[n])),
                base_probability=float(np.exp(rows.base[n])),
                top=decode(rows.tops[n : n + 1]),
                top_probability=float(np.exp(rows.best[n])),
                base_top=decode(rows.base_tops[n : n + 1]),
                base_top_probability=float(np.exp(rows.base_best[n])),
            )
        )
    return tuple(out)


def common_vocabulary(base: Vocabulary, artifact: Vocabulary) -> int:
    """How many token ids both models share; `InputError` if more than padding tells them apart."""
    common = min(base.vocab_size, artifact.vocab_size)
    if common < max(base.known_tokens, artifact.known_tokens):
        raise InputError(
            f"the base predicts {base.vocab_size:,} tokens and its tokenizer knows {base.known_tokens:,}, the artifact "
            f"predicts {artifact.vocab_size:,} and knows {artifact.known_tokens:,}: not the model it was made from"
        )
    return common


def check_tokenizers(base: Vocabulary, artifact: Vocabulary, text: str) -> None:
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
