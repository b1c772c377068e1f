"""How much a change of a weight moves a model's predictions: Kronecker factors of the Fisher information.

For a small change D of one weight the mean divergence KL(before || after) of a token's prediction is half of
vec(D)T F vec(D), with F the Fisher information per token (Martens 2020, section 9.2). As in K-FAC (Martens and Grosse
2015, section 3) F of a linear layer is taken for a product of two factors: one of x, its inputs, and one of g, the
gradients of the summed log-likelihood at its outputs, labels drawn from the model's own predictions. Two things differ:

- Each token's x xT is weighted by the token's |g|**2. The first token of a text often has inputs a thousand times
  larger than all others and gradients near zero; taken apart from each other the two predict a loss that is not there.
- Of E[g gT] the diagonal is kept: the rounding errors of two output channels have next to nothing in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmlite.checkpoint.families import EMBEDDING, HEAD, LAYER, Family
from llmlite.progress import track


@dataclass(frozen=True)
class Curvature:
    """Half the second derivative of the mean divergence in one weight [out, in], in nats per token.

    It is ``rows`` float32 [out] times ``columns`` float32 [in, in]. Of a linear layer: mean squared gradients, and mean
    x xT of the inputs, tokens weighted by their squared gradients. Of an embedding: how often a token comes, and second
    moments of the gradients. ``inputs`` float32 [in]: mean squares of a linear layer's inputs, None for an embedding.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    inputs: torch.Tensor | None = None


BATCH_TOKENS = 512  # run at a time: the logits of these tokens are held three times
Curvatures = dict[str, tuple[Curvature, ...]]


def predicted_loss(curvatures: Sequence[Curvature], weight: torch.Tensor, rounded: torch.Tensor) -> float:
    """The mean divergence in nats per token that ``rounded`` [out, in] in place of ``weight`` should cost.

    A weight that is used twice (an embedding that is the head too) has two curvatures; their losses add up.
    """
    change = (rounded.float() - weight.float()).to(curvatures[0].rows.device)
    return sum(0.5 * float(c.rows.double() @ ((change @ c.columns) * change).sum(1).double()) for c in curvatures)


def fisher(model: Any, family: Family, ids: np.ndarray, draws: int = 1, seed: int = 0) -> Curvatures:
    """The curvatures of every linear weight, the embedding and the head, by name.

    ``model``: a transformers causal model whose weights need no gradient; ``ids`` int64 [rows, length]; ``draws``:
    labels drawn for each position, each costs a backward pass. A tied head's curvature stands under the embedding's
    name. Memory: both factors of all weights.
    """
    device = next(model.parameters()).device
    chance = torch.Generator(device=device).manual_seed(seed)
    batch = max(BATCH_TOKENS // ids.shape[1], 1)
    with _watched(model, family, draws) as sums:
        for start in track(range(0, len(ids), batch), "curvature"):
            part = torch.from_numpy(ids[start : start + batch]).to(device)
            with torch.enable_grad():
                logits = model(input_ids=part, use_cache=False).logits
            likely = torch.softmax(logits.detach().flatten(0, 1).float(), -1)
            for draw in range(draws):
                labels = torch.multinomial(likely, 1, generator=chance)
                slope = likely.clone()  # the gradient of the negative log-likelihood of these labels
                slope.scatter_add_(1, labels, torch.full(labels.shape, -1.0, device=device))
                logits.backward(slope.reshape(logits.shape).to(logits.dtype), retain_graph=draw + 1 < draws)
    return {name: tuple(_mean(total, ids.size) for total in parts) for name, parts in sums.items()}


def _mean(total: Curvature, tokens: int) -> Curvature:
    """From sums over tokens, in place: the factors are large."""
    if total.inputs is None:
        return Curvature(total.rows.div_(tokens), total.columns.div_(tokens))
    weights = total.rows.sum().clamp_min(torch.finfo(torch.float32).tiny)  # what the tokens in columns weigh in all
    return Curvature(total.rows / tokens, total.columns.div_(weights), total.inputs / tokens)


@contextmanager
def _watched(model: Any, family: Family, draws: int) -> Iterator[Curvatures]:
    """While the block runs, forward and backward passes add to what it is given, over tokens."""
    sums: Curvatures = {}
    handles = []

    names = [f"{LAYER}{n}.{name}" for n in range(len(model.model.layers)) for name in family.linears]
    for name in names:
        linear = model.get_submodule(name)
        sums[f"{name}.weight"] = (total := _empty(linear, True),)
        handles.append(linear.register_forward_hook(_linear_hook(total, draws)))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    looked_up, read_out = _empty(embedding, False), _empty(head, True)
    handles.append(embedding.register_forward_hook(_embedding_hook(looked_up, draws)))
    handles.append(head.register_forward_hook(_linear_hook(read_out, draws)))
    tied = head.weight is embedding.weight
    sums.update({EMBEDDING: (looked_up, read_out)} if tied else {EMBEDDING: (looked_up,), HEAD: (read_out,)})
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _empty(module: Any, linear: bool) -> Curvature:
    rows, width = module.weight.shape
    device = module.weight.device
    inputs = torch.zeros(width, device=device) if linear else None
    return Curvature(torch.zeros(rows, device=device), torch.zeros(width, width, device=device), inputs)


def _linear_hook(total: Curvature, draws: int) -> Callable[[Any, tuple, torch.Tensor], None]:
    def add(_module: Any, args: tuple, out: torch.Tensor) -> None:
        x = args[0].detach().reshape(-1, args[0].shape[-1]).float()
        assert total.inputs is not None
        total.inputs.add_(x.square().sum(0))

        def gradient(g: torch.Tensor) -> None:
            squares = g.reshape(-1, g.shape[-1]).float().square()
            total.rows.add_(squares.sum(0), alpha=1 / draws)
            total.columns.addmm_((x * squares.sum(1, keepdim=True)).T, x, alpha=1 / draws)

        out.register_hook(gradient)

    return add


def _embedding_hook(total: Curvature, draws: int) -> Callable[[Any, tuple, torch.Tensor], torch.Tensor]:
    def add(module: Any, args: tuple, out: torch.Tensor) -> torch.Tensor:
        ids = args[0].reshape(-1)
        total.rows.index_add_(0, ids, torch.ones(len(ids), device=ids.device))
        scale = float(getattr(module, "embed_scale", 1.0))  # gemma's embedding multiplies what it looks up

        def gradient(g: torch.Tensor) -> None:
            g = g.reshape(-1, g.shape[-1]).float() * scale
            total.columns.addmm_(g.T, g, alpha=1 / draws)

        out = out.detach().requires_grad_()  # where the backward pass ends
        out.register_hook(gradient)
        return out

    return add
