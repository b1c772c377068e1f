"""llama.cpp's presets by their names: the type that llama-quantize gives each tensor of a model.

Source: llama.cpp, src/llama-quant.cpp; each function here names the one that it follows. Where llama-quantize chooses
differently with an importance matrix and without one, these are the choices with one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches

from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.checkpoint.gguf_names import gguf_name
from llmlite.errors import InputError
from llmlite.formats.gguf.metadata import full_config
from llmlite.formats.gguf.types import TYPES, fallback
from llmlite.plan.order import working_order

PURE = "-pure"


@dataclass(frozen=True)
class Outline:
    """What the rules ask of a model: GGUF's ``architecture``, its counts, and whether the head is the embedding."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool

    @property
    def is_70b(self) -> bool:
        """llama.cpp's LLM_TYPE_70B (load_arch_hparams in src/models): 80 layers, and in Llama shared key heads."""
        shared = self.architecture == "llama" and self.heads != self.kv_heads
        return self.layers == 80 and (shared or self.architecture == "qwen2")


Condition = Callable[[int, Outline], bool]


def always(layer: int, model: Outline) -> bool:
    return True


def more_bits(layer: int, model: Outline) -> bool:
    """use_more_bits: the first and the last eighth of the layers, and every third one between."""
    eighth = model.layers // 8
    return layer < eighth or layer >= 7 * model.layers // 8 or (layer - eighth) % 3 == 2


def first_eighth(layer: int, model: Outline) -> bool:
    return layer < model.layers // 8


def first_sixteenth(layer: int, model: Outline) -> bool:
    return layer < model.layers // 16


def first_two(layer: int, model: Outline) -> bool:
    return layer < 2


def first_four(layer: int, model: Outline) -> bool:
    return layer < 4


def four_heads_share(layer: int, model: Outline) -> bool:
    """n_gqa() >= 4: at least four query heads use one value head."""
    return model.heads // model.kv_heads >= 4


Rules = tuple[tuple[Condition, str], ...]


@dataclass(frozen=True)
class Preset:
    """One preset: ``ftype`` is its number in the file (llama_ftype), ``base`` the type of what no rule names.

    Of each tuple of rules the first whose condition holds gives the type. ``pure``: no rule at all, and no type of
    its own for the head (llama-quantize --pure).
    """

    ftype: int
    base: str
    attention_v: Rules = ()
    attention_output: Rules = ()
    ffn_down: Rules = ()
    pure: bool = False

    @property
    def dense(self) -> bool:
        return TYPES[self.base].grid is None


# llama_ftype_get_default_type, and the conditions on ftype in llama_tensor_get_type_impl.
PRESETS = {
    "f32": Preset(0, "f32"),
    "f16": Preset(1, "f16"),
    "bf16": Preset(32, "bf16"),
    "q8_0": Preset(7, "q8_0"),
    "q6_k": Preset(18, "q6_k"),
    "q5_k_m": Preset(17, "q5_k", attention_v=((more_bits, "q6_k"),), ffn_down=((more_bits, "q6_k"),)),
    "q5_k_s": Preset(16, "q5_k"),
    "q5_1": Preset(9, "q5_1"),
    "q5_0": Preset(8, "q5_0", ffn_down=((first_eighth, "q5_1"),)),
    "q4_k_m": Preset(15, "q4_k", attention_v=((more_bits, "q6_k"),), ffn_down=((more_bits, "q6_k"),)),
    "q4_k_s": Preset(14, "q4_k", attention_v=((first_four, "q5_k"),), ffn_down=((first_eighth, "q5_k"),)),
    "q4_1": Preset(3, "q4_1"),
    "q4_0": Preset(2, "q4_0", ffn_down=((first_eighth, "q4_1"),)),
    "iq4_nl": Preset(25, "iq4_nl", attention_v=((four_heads_share, "q5_k"),)),
    "iq4_xs": Preset(30, "iq4_xs", attention_v=((four_heads_share, "q5_k"),)),
    "q3_k_l": Preset(
        13, "q3_k",
        attention_v=((always, "q5_k"),),
        attention_output=((always, "q5_k"),),
        ffn_down=((always, "q5_k"),),
    ),
    "q3_k_m": Preset(
        12, "q3_k",
        attention_v=((first_two, "q5_k"), (always, "q4_k")),
        attention_output=((always, "q4_k"),),
        ffn_down=((first_sixteenth, "q5_k"), (always, "q4_k")),
    ),
    "q3_k_s": Preset(11, "q3_k"),
    "q2_k": Preset(
        10, "q2_k",
        attention_v=((four_heads_share, "q4_k"), (always, "q3_k")),
        attention_output=((always, "q3_k"),),
        ffn_down=((always, "q3_k"),),
    ),
    "q2_k_s": Preset(21, "q2_k", attention_v=((four_heads_share, "q4_k"),), ffn_down=((first_eighth, "q4_k"),)),
}  # fmt: skip
ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}  # QUANT_OPTIONS in tools/quantize/quantize.cpp


def preset_name(text: str) -> str | None:
    """The name in the table of a preset in any case, None for one that is not there; "-pure" stays at its end."""
    lowered = text.lower()
    name = lowered.removesuffix(PURE)
    name = ALIASES.get(name, name)
    if name not in PRESETS or (lowered.endswith(PURE) and PRESETS[name].dense):
        return None
    return name + PURE if lowered.endswith(PURE) else name


def find_preset(text: str) -> Preset:
    """The preset of a name in any case, with "-pure" at its end or without; `InputError` with the nearest name."""
    name = preset_name(text)
    if name is None:
        near = get_close_matches(text.lower().removesuffix(PURE), PRESETS, 1)
        raise InputError(f"{text!r} is not a preset; {', '.join(PRESETS)} are" + (f"; near: {near[0]}" if near else ""))
    preset = PRESETS[name.removesuffix(PURE)]
    return replace(preset, pure=True) if name.endswith(PURE) else preset


def outline(checkpoint: Checkpoint) -> Outline:
    """What the rules ask of this checkpoint."""
    config = full_config(checkpoint.config)
    return Outline(
        architecture=checkpoint.family.gguf,
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        tied=checkpoint.tied,
    )


def asked_type(preset: Preset, name: str, model: Outline) -> str:
    """The type by the preset's rules, whether or not its blocks divide the width; ``name`` is GGUF's.

    Follows llama_tensor_get_type and llama_tensor_get_type_impl.
    """
    if preset.dense or preset.pure:
        return preset.base
    if name == "output.weight" or (name == "token_embd.weight" and model.tied):
        return "q8_0" if preset.base == "q8_0" else "q6_k"  # where 256 does not divide the width, q8_0 as well
    parts = name.split(".")
    if parts[0] != "blk":
        return preset.base
    layer, module = int(parts[1]), parts[2]
    rules = {"attn_v": preset.attention_v, "attn_output": preset.attention_output, "ffn_down": preset.ffn_down}
    kind = next((kind for holds, kind in rules.get(module, ()) if holds(layer, model)), preset.base)
    if module == "attn_v" and model.is_70b and kind in ("q3_k", "q4_k"):
        return "q5_k"  # eight heads share these weights, so more bits for them cost next to nothing
    return kind


def preset_types(checkpoint: Checkpoint, preset: str) -> dict[str, str]:
    """Hugging Face tensor name -> GGML type, of every tensor that the GGUF file holds under this name.

    ``preset``: a name as for `find_preset`. Norms and biases are f32; where a type's blocks do not divide the width,
    it is the type that llama-quantize falls back to (tensor_type_fallback). `InputError` for an unknown preset, and
    for a tensor that GGUF has no place for.
    """
    return {name: kind for name, (_, kind) in asked_and_given(checkpoint, preset).items()}


def asked_and_given(checkpoint: Checkpoint, preset: str) -> dict[str, tuple[str, str]]:
    """As `preset_types`, with the type by the rules before the one that fits the width."""
    rules, model = find_preset(preset), outline(checkpoint)
    out = {}
    for name in working_order(checkpoint):
        shape = checkpoint.tensors[name].shape
        if len(shape) == 1:  # tensor_allows_quantization
            out[name] = ("f32", "f32")
            continue
        kind = asked_type(rules, gguf_name(checkpoint.family, name), model)
        out[name] = (kind, kind if rules.dense else fallback(kind, shape[1]))
    return out
