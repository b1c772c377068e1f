import pytest
import torch

from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.errors import InputError
from llmlite.plan.plan import make_plan, stored_dtype
from llmlite.plan.target import parse_target
from llmlite.plan.types import type_table
from tests.tiny import save_tiny


def plan_of(directory, to, solver="auto"):
    checkpoint, target = open_checkpoint(directory), parse_target(to)
    return make_plan(checkpoint, target, type_table(target, stored_dtype(checkpoint, target), "static"), solver)


@pytest.mark.parametrize(
    ("text", "bits", "group", "symmetric"),
    [
        ("gptq:w4g128", 4, 128, True),
        ("gptq:W3g64-asym", 3, 64, False),
        ("gptq:w8", 8, None, True),
        ("compressed-tensors:w4a16g64", 4, 64, True),
        ("compressed-tensors:w8a16", 8, None, True),
    ],
)
def test_targets(text, bits, group, symmetric):
    target = parse_target(text)
    assert (target.bits, target.group, target.symmetric) == (bits, group, symmetric)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("q4_0", "FORMAT:TYPE"),
        ("ggfu:q4_0", "did you mean gguf"),
        ("gguf:q9", "the types of gguf are"),
        ("gptq:w5g128", "the types of gptq are"),
        ("compressed-tensors:w4a16g00", "types of compressed-tensors are"),
        ("gptq:w4g0", "the types of gptq are"),
        ("compressed-tensors:w3a16g128", "4 or 8 bits"),
        ("bnb:fp4", "nf4 or int8"),
    ],
)
def test_a_wrong_target_is_told_what_is_right(text, said):
    with pytest.raises(InputError, match=said):
        parse_target(text)


def test_rows_say_what_each_tensor_becomes(tmp_path):
    plan = plan_of(save_tiny(tmp_path), "gguf:q4_0")
    types = {row.name: (row.type, row.solver) for row in plan.rows}
    assert types["model.embed_tokens.weight"] == ("q4_0", "rtn")
    assert types["lm_head.weight"] == ("q8_0", "rtn")
    assert types["model.norm.weight"] == ("f32", "cast")
    assert types["model.layers.0.mlp.up_proj.weight"] == ("q4_0", "gptq")
    up = next(row for row in plan.rows if row.name == "model.layers.1.mlp.up_proj.weight")
    assert up.bytes == 64 * 128 // 32 * 18


def test_a_tied_embedding_is_the_head(tmp_path):
    plan = plan_of(save_tiny(tmp_path, tie_word_embeddings=True), "gguf:q4_1")
    assert plan.rows[0].type == "q8_0"
    assert all(row.name != "lm_head.weight" for row in plan.rows)


@pytest.mark.parametrize(
    ("to", "solver", "chosen"),
    [
        ("gguf:q8_0", "auto", "rtn"),
        ("gguf:q8_0", "gptq", "gptq"),
        ("gguf:q4_0", "rtn", "rtn"),
        ("gguf:f16", "auto", "cast"),
        ("bnb:nf4", "auto", "bitsandbytes"),
        ("gptq:w3g64", "auto", "gptq"),
    ],
)
def test_the_solver_follows_the_bits(tmp_path, to, solver, chosen):
    plan = plan_of(save_tiny(tmp_path), to, solver)
    assert {row.solver for row in plan.rows if row.name.endswith("q_proj.weight")} == {chosen}
    assert plan.calibrated == (chosen == "gptq")


@pytest.mark.parametrize(
    ("to", "solver", "changes", "said"),
    [
        ("gptq:w4g128", "auto", {}, "width of 64 .* group of 64 divides"),
        ("compressed-tensors:w4a16g48", "auto", {}, "width of 64"),
        ("gguf:q4_0", "auto", {"intermediate_size": 100}, "gguf:f16"),
        ("bnb:nf4", "gptq", {}, "leave --solver out"),
        ("gguf:f16", "rtn", {}, "nothing is rounded"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(tmp_path, to, solver, changes, said):
    with pytest.raises(InputError, match=said):
        plan_of(save_tiny(tmp_path, **changes), to, solver)


def test_dtypes_that_are_kept(tmp_path):
    for dtype, to, kept in [
        (torch.float16, "compressed-tensors:w4a16g64", torch.float16),
        (torch.bfloat16, "bnb:nf4", torch.bfloat16),
        (torch.bfloat16, "gptq:w4g64", torch.float16),
    ]:
        directory = save_tiny(tmp_path / str(dtype) / to, dtype=dtype)
        assert stored_dtype(open_checkpoint(directory), parse_target(to)) == kept
