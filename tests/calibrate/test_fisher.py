import numpy as np
import pytest
import torch

from llmlite.calibrate.fisher import fisher, predicted_loss
from llmlite.checkpoint.families import EMBEDDING, FAMILIES, HEAD
from llmlite.quantize.rtn import round_to_nearest
from llmlite.quantize.types import Grid
from tests.tiny import tiny_model

ONE_TOKEN = np.array([[7]])
LAYER = "model.layers.1."


def log_probs(model, ids: np.ndarray) -> torch.Tensor:
    with torch.no_grad():
        return torch.log_softmax(model(input_ids=torch.from_numpy(ids)).logits.double(), -1)


def measured(model, name: str, changed: torch.Tensor, ids: np.ndarray) -> float:
    """The mean divergence with one weight changed, in nats per token."""
    weight = model.get_parameter(name)
    before, kept = log_probs(model, ids), weight.data
    weight.data = changed
    after = log_probs(model, ids)
    weight.data = kept
    return float((before.exp() * (before - after)).sum(-1).mean())


def frozen(family: str = "llama", **changes):
    return tiny_model(family, **changes).requires_grad_(False)


@pytest.mark.parametrize(
    ("family", "tied", "name"),
    [
        ("llama", False, f"{LAYER}mlp.down_proj.weight"),
        ("llama", False, f"{LAYER}self_attn.v_proj.weight"),
        ("llama", False, f"{LAYER}self_attn.o_proj.weight"),
        ("llama", False, EMBEDDING),
        ("llama", False, HEAD),
        ("llama", True, EMBEDDING),
        ("gemma3_text", False, EMBEDDING),
    ],
)
def test_a_small_change_of_one_row_costs_what_is_predicted(family: str, tied: bool, name: str):
    # With one token and one row nothing is approximated: both factors are exact but for the drawn labels.
    model = frozen(family, num_hidden_layers=2, tie_word_embeddings=tied)
    if family == "gemma3_text":
        model.model.embed_tokens.weight.data *= 0.3
    curvatures = fisher(model, FAMILIES["gemma3" if "gemma" in family else family], ONE_TOKEN.repeat(3000, axis=0))
    weight = model.get_parameter(name).data
    row = 7 if name == EMBEDDING else int(log_probs(model, ONE_TOKEN).argmax()) if name == HEAD else 5
    changed = weight.clone()
    changed[row] += 1e-3 * torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1))
    told = predicted_loss(curvatures[name][:1] if tied else curvatures[name], weight, changed)
    if tied:  # the two uses of one row meet in one prediction: judged here is the looking up alone
        model.lm_head.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    assert told == pytest.approx(measured(model, name, changed, ONE_TOKEN), rel=0.15)


def test_a_tied_weight_answers_for_both_uses():
    ids = np.random.default_rng(0).integers(0, 320, (4, 32))
    model = frozen(tie_word_embeddings=True)
    tied = fisher(model, FAMILIES["llama"], ids)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    apart = fisher(model, FAMILIES["llama"], ids)
    assert HEAD not in tied
    for ours, theirs in zip(tied[EMBEDDING], (*apart[EMBEDDING], *apart[HEAD]), strict=True):
        torch.testing.assert_close(ours.rows, theirs.rows)
        torch.testing.assert_close(ours.columns, theirs.columns)


def test_more_rows_are_their_mean():
    ids = np.random.default_rng(0).integers(0, 320, (3, 512))
    model = frozen(max_position_embeddings=512)
    name = f"{LAYER}mlp.up_proj.weight"
    whole = fisher(model, FAMILIES["llama"], ids)[name][0].inputs
    parts = [fisher(model, FAMILIES["llama"], ids[n : n + 1])[name][0] for n in range(3)]
    torch.testing.assert_close(whole, torch.stack([p.inputs for p in parts if p.inputs is not None]).mean(0))


def test_large_inputs_of_tokens_without_gradient_cost_nothing():
    # Token 9 has a residual stream so large that what a layer adds to it is lost; the change touches its inputs alone.
    model, name = frozen(), f"{LAYER}mlp.down_proj.weight"
    model.model.embed_tokens.weight.data[9] *= 300
    ids = np.array([[7], [9]])
    seen: list[torch.Tensor] = []
    linear = model.get_submodule(name.removesuffix(".weight"))
    handle = linear.register_forward_pre_hook(lambda _, args: seen.append(args[0][:, 0]))
    log_probs(model, ids)
    handle.remove()
    kept, lost = seen[0]
    lost = lost - kept * (lost @ kept) / (kept @ kept)
    weight = model.get_parameter(name).data
    changed = weight + torch.randn(len(weight), 1, generator=torch.Generator().manual_seed(1)) * lost * 1e-2
    told = predicted_loss(fisher(model, FAMILIES["llama"], ids.repeat(500, axis=0))[name], weight, changed)
    true = measured(model, name, changed, ids)
    assert true / 3 < told < true * 3


def test_predictions_order_and_size_what_is_measured():
    ids = np.random.default_rng(0).integers(0, 320, (16, 32))
    model = frozen()
    curvatures = fisher(model, FAMILIES["llama"], ids, draws=4)
    told, seen = [], []
    for name in curvatures:
        for bits in (3, 4, 5):
            weight = model.get_parameter(name).data
            rounded = round_to_nearest(weight, None, Grid(bits, 32)).dequantize()
            told.append(predicted_loss(curvatures[name], weight, rounded))
            seen.append(measured(model, name, rounded, ids))
    logs = np.log(np.array([told, seen]))
    assert np.corrcoef(logs)[0, 1] > 0.95
    assert abs(np.median(logs[0] - logs[1])) < 0.4
