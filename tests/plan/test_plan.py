import pytest
import torch

from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.errors import InputError
from llmlite.plan.plan import make_plan, stored_dtype
from llmlite.plan.target import parse_target
from llmlite.plan.types import type_table
from tests.tiny import save_tiny


def plan_of(directory, to, solver="auto", rules=()):
    checkpoint, target = open_checkpoint(directory), parse_target(to)
    types = type_table(target, stored_dtype(checkpoint, target), False, rules)
    return make_plan(checkpoint, target, types, solver)


@pytest.mark.parametrize(
    ("text", "bits", "group", "symmetric"),
    [
        ("gptq:w4g128", 4, 128, True),
        ("gptq:W3g64-asym", 3, 64, False),
        ("gptq:w8", 8, None, True),
        ("compressed-tensors:w4a16g64", 4, 64, True),
        ("compressed-tensors:w8a16", 8, None, True),
        ("compressed-tensors:w8a8", 8, None, True),
    ],
)
def test_targets(text, bits, group, symmetric):
    target = parse_target(text)
    assert (target.bits, target.group, target.symmetric) == (bits, group, symmetric)
    grid = target.grid(torch.float16)
    assert (grid.bits, grid.group) == (bits, group)
    assert (grid.zero, grid.scale_rule == "signed") == (("symmetric", bits < 8) if symmetric else ("integer", False))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("q4_0", "FORMAT:TYPE"),
        ("ggfu:q4_0", "did you mean gguf"),
        ("gguf:x9", "the types of gguf are"),
        ("gguf:q4km", "did you mean gguf:q4_k_m"),
        ("gguf:f16-pure", "the types of gguf are"),
        ("gptq:w5g128", "the types of gptq are"),
        ("compressed-tensors:w4a16g00", "types of compressed-tensors are"),
        ("gptq:w4g0", "the types of gptq are"),
        ("compressed-tensors:w3a16g128", "4 or 8 bits"),
        ("compressed-tensors:w4a8", "or w8a8"),
        ("compressed-tensors:w8a8g64", "or w8a8"),
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
    assert types["lm_head.weight"] == ("q8_0", "rtn")  # q6_k, whose blocks of 256 do not divide 64
    assert types["model.norm.weight"] == ("f32", "cast")
    assert types["model.layers.0.mlp.up_proj.weight"] == ("q4_0", "feedback")
    up = next(row for row in plan.rows if row.name == "model.layers.1.mlp.up_proj.weight")
    assert up.bytes == 64 * 128 // 32 * 18
    assert plan.notes == (
        "q8_0 in place of q6_k for 1 of 21 tensors: blocks of 256 do not divide their width (as in llama-quantize)",
    )


def test_a_pure_plan_has_one_type(tmp_path):
    plan = plan_of(save_tiny(tmp_path), "gguf:Q4_0-pure")
    assert {row.type for row in plan.rows if len(row.shape) == 2} == {"q4_0"}
    assert str(plan.target) == "gguf:q4_0-pure"
    assert plan.notes == ()


def test_rules_win_over_the_preset_and_the_last_over_the_first(tmp_path):
    rules = (r"\.mlp\.=q8_0", r"layers\.1\.mlp\.down_proj: Q5_1", "embed_tokens=f16", "layers.0=q5_0", "gate=f16")
    plan = plan_of(save_tiny(tmp_path), "gguf:q4_0", rules=rules)
    types = {row.name.removeprefix("model."): (row.type, row.solver) for row in plan.rows}
    assert types["layers.1.mlp.up_proj.weight"] == ("q8_0", "feedback")
    assert types["layers.1.mlp.down_proj.weight"] == ("q5_1", "feedback")
    assert types["embed_tokens.weight"] == ("f16", "cast")
    assert types["layers.0.mlp.up_proj.weight"] == ("q5_0", "feedback")
    assert types["layers.0.mlp.gate_proj.weight"] == ("f16", "cast")
    assert types["layers.0.input_layernorm.weight"] == ("f32", "cast")
    assert types["layers.1.self_attn.q_proj.weight"] == ("q4_0", "feedback")


def test_one_type_on_a_grid_is_rounded_in_a_dense_file(tmp_path):
    plan = plan_of(save_tiny(tmp_path), "gguf:f16", rules=("down_proj=q8_0",))
    assert {row.name.split(".")[-2]: row.solver for row in plan.rows}["down_proj"] == "feedback"
    assert sum(row.solver == "feedback" for row in plan.rows) == 2


@pytest.mark.parametrize(
    ("rule", "to", "said"),
    [
        ("down_proj", "gguf:q4_0", "PATTERN=TYPE"),
        ("down_proj=q6k", "gguf:q4_0", "did you mean q6_k"),
        ("down_(=q4_0", "gguf:q4_0", "not a regular expression"),
        (r"\.down_prj=q8_0", "gguf:q4_0", "matches no tensor .* did you mean down_proj"),
        ("experts=q8_0", "gguf:q4_0", "its matrices are embed_tokens, self_attn.q_proj"),
        ("input_layernorm=f16", "gguf:q4_0", "norms or biases only"),
        ("down_proj=q6_k", "gguf:q4_0", "can't become gguf:q6_k: .* 128 is not a multiple of 256"),
        ("down_proj=q8_0", "gptq:w4g64", "one type for all"),
    ],
)
def test_a_wrong_rule_is_told_what_is_right(tmp_path, rule, to, said):
    with pytest.raises(InputError, match=said):
        plan_of(save_tiny(tmp_path), to, rules=(rule,))


def test_a_tied_embedding_is_the_head(tmp_path):
    plan = plan_of(save_tiny(tmp_path, tie_word_embeddings=True), "gguf:q4_1")
    assert plan.rows[0].type == "q8_0"
    assert all(row.name != "lm_head.weight" for row in plan.rows)


@pytest.mark.parametrize(
    ("to", "solver", "chosen"),
    [
        ("gguf:q8_0", "auto", "feedback"),
        ("gguf:q4_k_m", "imatrix", "imatrix"),
        ("gguf:q4_0", "rtn", "rtn"),
        ("gguf:f16", "auto", "cast"),
        ("bnb:nf4", "auto", "feedback"),
        ("bnb:int8", "auto", "rtn"),
        ("gptq:w3g64", "auto", "feedback"),
    ],
)
def test_the_solver_of_the_linear_layers(tmp_path, to, solver, chosen):
    plan = plan_of(save_tiny(tmp_path), to, solver)
    assert {row.solver for row in plan.rows if row.name.endswith("q_proj.weight")} == {chosen}
    assert plan.calibrated == (chosen in ("feedback", "imatrix"))


@pytest.mark.parametrize(
    ("to", "solver", "changes", "said"),
    [
        ("gptq:w4g128", "auto", {}, "width of 64 .* group of 64 divides"),
        ("compressed-tensors:w4a16g48", "auto", {}, "width of 64"),
        ("bnb:int8", "feedback", {}, "bitsandbytes itself rounds"),
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


def test_w8a8_takes_a_byte_for_each_weight_and_a_scale_for_each_output(tmp_path):
    plan = plan_of(save_tiny(tmp_path), "compressed-tensors:w8a8")
    up = next(row for row in plan.rows if row.name == "model.layers.1.mlp.up_proj.weight")
    assert (up.type, up.bytes) == ("w8a8", 128 * 64 + 128 * 2)
