"""How much of its teacher a student has: counts of layers, FFN channels and key/value heads, and its config.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

from llmlite.adapt.influence import check_layers, droppable
from llmlite.checkpoint.checkpoint import Checkpoint, expected_shapes
from llmlite.checkpoint.families import LAYER
from llmlite.errors import InputError
from llmlite.formats.gguf.metadata import full_config, head_dim

FFN_STEP = 256  # widths stay multiples of this, or of its largest share that divides the teacher's: blocks of weights
QUERIES_AS_WIDE = ("qwen2",)  # llama.cpp, src/models/qwen2.cpp: the query projection is [hidden, hidden]
FFN_FLOOR = 2 / 3  # FFN channels go first, as they cost least; below this share of them whole layers go


@dataclass(frozen=True)
class Shape:
    """How many decoder layers, FFN channels and key/value heads a network has."""

    layers: int
    ffn: int
    kv_heads: int


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape of the network that a config.json describes."""
    full = full_config(config)
    return Shape(full["num_hidden_layers"], full["intermediate_size"], full["num_key_value_heads"])


def student_shape(
    checkpoint: Checkpoint,
    layers: int | None = None,
    ffn: int | None = None,
    kv_heads: int | None = None,
    share: float | None = None,
) -> Shape:
    """The shape asked for: counts, each the teacher's where None, or a ``share`` of the teacher's parameters.

    For a share FFN channels go first, down to two thirds of them, then whole layers: measured at equal size, layers
    cost more. `InputError` for what the network does not have or the architecture can't hold.
    """
    whole = shape_of(checkpoint.config)
    if share is not None:
        if (layers, ffn, kv_heads) != (None, None, None):
            raise InputError("--shrink: says all about the student's size; leave out --layers, --ffn and --kv-heads")
        return _shape_for_share(checkpoint, whole, share)
    shape = Shape(
        whole.layers if layers is None else layers,
        whole.ffn if ffn is None else ffn,
        whole.kv_heads if kv_heads is None else kv_heads,
    )
    check_layers(checkpoint, shape.layers)
    for option, mine, its in (("--ffn", shape.ffn, whole.ffn), ("--kv-heads", shape.kv_heads, whole.kv_heads)):
        if not 1 <= mine <= its:
            raise InputError(f"{option} {mine}: {checkpoint.source} has {its}; 1 to {its} is right")
    if shape.kv_heads != whole.kv_heads and checkpoint.family.name in QUERIES_AS_WIDE:
        raise InputError(
            f"--kv-heads {shape.kv_heads}: llama.cpp reads {checkpoint.family.name} with queries as wide as the hidden "
            "states only, so all heads stay; leave out --kv-heads"
        )
    expected_shapes(student_config(checkpoint, range(shape.layers), shape), checkpoint.family, f"a student of {shape}")
    return shape


def parameters(checkpoint: Checkpoint, shape: Shape) -> int:
    """How many parameters a student of this shape has."""
    inside = outside = 0
    for name, entry in checkpoint.tensors.items():
        if name.startswith(f"{LAYER}0."):
            inside += prod(cut_shape(checkpoint, shape, name, entry.shape))
        elif not name.startswith(LAYER):
            outside += prod(entry.shape)
    return outside + shape.layers * inside


def _shape_for_share(checkpoint: Checkpoint, whole: Shape, share: float) -> Shape:
    if not 0 < share < 1:
        raise InputError(f"--shrink {share}: a share of the teacher's parameters, above 0 and below 1, is right")
    limit = share * parameters(checkpoint, whole)
    step = gcd(whole.ffn, FFN_STEP)
    least = max(-(-int(whole.ffn * FFN_FLOOR) // step) * step, step)
    shapes = [Shape(whole.layers, ffn, whole.kv_heads) for ffn in range(whole.ffn - step, least - 1, -step)]
    fewest = whole.layers - len(droppable(checkpoint))
    shapes += [Shape(layers, least, whole.kv_heads) for layers in range(whole.layers - 1, fewest - 1, -1)]
    for shape in shapes:
        if parameters(checkpoint, shape) <= limit:
            return shape
    smallest = parameters(checkpoint, shapes[-1]) / parameters(checkpoint, whole) if shapes else 1.0
    raise InputError(
        f"--shrink {share}: with two thirds of the FFN channels and the layers that must stay, {checkpoint.source} "
        f"keeps {smallest:.2f} of its parameters, the embedding among them; more than that is right, or counts of your "
        "own with --layers, --ffn and --kv-heads"
    )


def student_config(checkpoint: Checkpoint, layers: Sequence[int], shape: Shape) -> dict[str, Any]:
    """config.json of a student that has these ``layers`` of its teacher, one kind of attention for each."""
    full = full_config(checkpoint.config)
    queries = full["num_attention_heads"] // full["num_key_value_heads"]
    config = {
        **checkpoint.config,
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.ffn,
        "num_attention_heads": queries * shape.kv_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": head_dim(full),  # by default it follows from the number of heads
    }
    if full.get("layer_types"):
        config["layer_types"] = [full["layer_types"][layer] for layer in layers]
    return config


def cut_shape(checkpoint: Checkpoint, shape: Shape, name: str, old: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a layer's tensor in the student."""
    whole = shape_of(checkpoint.config)
    sizes = list(old)
    for dimension, axis in enumerate(axes_of(checkpoint, name)):
        if axis == "ffn":
            sizes[dimension] = shape.ffn
        elif axis == "heads":
            sizes[dimension] = old[dimension] // whole.kv_heads * shape.kv_heads
    return tuple(sizes)


def axes_of(checkpoint: Checkpoint, name: str) -> tuple[str, ...]:
    """What each dimension of a layer's tensor runs over: "ffn", "heads" (of queries, keys or values), or "-"."""
    module, _, part = name.rpartition(".")
    inner = module.removeprefix(LAYER).partition(".")[2]
    if inner in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        axes: tuple[str, ...] = ("heads", "-")
    elif inner == "self_attn.o_proj":
        axes = ("-", "heads")
    else:
        axes = tuple(axis if axis == "ffn" else "-" for axis in checkpoint.family.axes.get(inner, ("-",)))
    return axes[:1] if part == "bias" else axes
