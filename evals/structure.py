"""What an artifact must have in common with its base besides weights: token ids, the token in front of a text, the
chat template, RoPE, and the settings that change what the same weights compute.

Read from configs, tokenizers and GGUF headers; no weights are loaded. A wrong one of these hardly shows in a short
text's perplexity, and ruins long prompts, chats, or the start of every answer.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch

from llmlite.checkpoint.checkpoint import CONFIG_ERRORS, meta_model, read_config
from llmlite.checkpoint.families import family_of_gguf
from llmlite.checkpoint.gguf_config import import_config
from llmlite.checkpoint.gguf_header import read_gguf
from llmlite.checkpoint.gguf_tokenizer import import_tokenizer
from llmlite.errors import InputError, first_line
from llmlite.evals.hf import load_tokenizer, prefix_token
from llmlite.evals.locate import Location

PROBE = (
    "The quick brown fox, it's 10:45 on 2024-05-17.\n\n\tdef f(x): return {'a': x[0] ** 2}  # 1234567\n"
    "语言模型可以压缩到四位。 Ünïcödé, нещо на Български, 🚀 😶‍🌫️  three   spaces"
)
TURNS = (
    {"role": "user", "content": "What is 12 + 30?"},
    {"role": "assistant", "content": "42, I think."},
    {"role": "user", "content": " Are you\n\nsure? "},
)
SYSTEM = {"role": "system", "content": "Answer in one word."}
# Besides these, what a config says is seen in the tensors' shapes, or changes nothing that a model computes.
SETTINGS = (
    "model_type", "rms_norm_eps", "layer_norm_eps", "hidden_act", "hidden_activation", "sliding_window", "layer_types",
    "final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "logit_scale", "logits_scaling",
    "attention_multiplier", "residual_multiplier", "embedding_multiplier", "max_position_embeddings",
)  # fmt: skip
SHAPE = ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_size")
TOLERANCE = 1e-5  # GGUF holds its settings as float32
ASPECTS = ("tokenizer", "prefix_token", "chat_template", "rope", "settings", "shape")


@dataclass(frozen=True)
class Aspect:
    """One thing compared; ``detail`` says in words what differs, "" where nothing does."""

    equal: bool
    detail: str = ""


@dataclass(frozen=True)
class Structure:
    """Every aspect that both sides tell, by its name in `ASPECTS`; ``unknown``: why the others could not be read."""

    aspects: dict[str, Aspect]
    unknown: dict[str, str]

    def to_json(self) -> dict:
        """The aspects by name, how many differ, and what is unknown."""
        out: dict[str, Any] = {name: vars(aspect) for name, aspect in self.aspects.items()}
        if self.unknown:
            out["unknown"] = self.unknown
        return {**out, "differences": sum(not aspect.equal for aspect in self.aspects.values())}


def compare_structure(base: Location, artifact: Location) -> Structure:
    """Compare an artifact with the model it was made from; `InputError` for files that can't be read."""
    aspects: dict[str, Aspect] = {}
    unknown: dict[str, str] = {}
    for names, read, compare in (
        (ASPECTS[:3], _tokenizer, _compare_tokenizers), (ASPECTS[3:], _config, _compare_configs),
    ):  # fmt: skip
        sides = []
        for location in (base, artifact):
            try:
                sides.append(read(location))
            except InputError as error:
                unknown.update(dict.fromkeys(names, str(error)))
        if len(sides) == 2:
            try:
                aspects.update(compare(*sides))
            except (InputError, *CONFIG_ERRORS) as error:
                unknown.update(dict.fromkeys(names, f"can't be compared ({first_line(error)})"))
    return Structure(aspects, unknown)


def _tokenizer(location: Location) -> Any:
    """As transformers has it; of a GGUF file the one that its metadata describes."""
    if location.engine == "transformers":
        return load_tokenizer(location.path)
    imported = import_tokenizer(read_gguf(location.path).metadata, str(location.path))
    with tempfile.TemporaryDirectory() as folder:
        imported.save(Path(folder))
        return load_tokenizer(Path(folder))


def _config(location: Location) -> dict:
    if location.engine == "transformers":
        return read_config(location.path)
    source = read_gguf(location.path)
    architecture = str(source.metadata.get("general.architecture"))
    return import_config(source, family_of_gguf(architecture, str(location.path)))


def _compare_tokenizers(base: Any, artifact: Any) -> dict[str, Aspect]:
    return {
        "tokenizer": _same_ids(base, artifact),
        "prefix_token": _same("the token in front of a text", *(_prefix(side) for side in (base, artifact))),
        "chat_template": _same_chat(base, artifact),
    }


def _same_ids(base: Any, artifact: Any) -> Aspect:
    ours, theirs = (side(PROBE, add_special_tokens=False).input_ids for side in (base, artifact))
    if ours == theirs:
        return Aspect(True)
    where = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return Aspect(False, f"a fixed text is tokenized differently from token {where} on")


def _prefix(tokenizer: Any) -> str | None:
    token = prefix_token(tokenizer)
    return None if token is None else str(tokenizer.convert_ids_to_tokens(token))


def _same_chat(base: Any, artifact: Any) -> Aspect:
    for turns in ([SYSTEM, *TURNS], [*TURNS], [TURNS[0]]):
        ours, theirs = (_render(side, turns) for side in (base, artifact))
        if ours != theirs:
            where = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            start = max(0, where - 10)
            return Aspect(
                False, f"a fixed conversation is rendered as ...{theirs[start : where + 30]!r}..., "
                f"by the base as ...{ours[start : where + 30]!r}..."
            )  # fmt: skip
    return Aspect(True)


def _render(tokenizer: Any, turns: list) -> str:
    """The text that a chat becomes; what the template says where it refuses, so that refusals compare, too."""
    if tokenizer.chat_template is None:
        return "(no chat template)"
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as error:
        return f"(refused: {first_line(error)})"


def _compare_configs(base: dict, artifact: dict) -> dict[str, Aspect]:
    ours, theirs = (_model(config) for config in (base, artifact))
    one, other = (model.config.get_text_config().to_dict() for model in (ours, theirs))
    return {
        "rope": _same_rope(ours, theirs),
        "settings": _same_keys(SETTINGS, one, other),
        "shape": _same_keys((*SHAPE, "head_dim"), _with_head_dim(one), _with_head_dim(other)),
    }


def _model(config: dict) -> Any:
    return meta_model(config, "config.json")


def _with_head_dim(config: dict) -> dict:
    """A config may leave it out, or hold None."""
    return {**config, "head_dim": config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]}


def _same_keys(keys: tuple[str, ...], base: dict, artifact: dict) -> Aspect:
    said = [_same(key, base.get(key), artifact.get(key)) for key in keys]
    details = [aspect.detail for aspect in said if not aspect.equal]
    return Aspect(not details, "; ".join(details))


def _same(name: str, base: Any, artifact: Any) -> Aspect:
    close = isinstance(base, float) and isinstance(artifact, float) and abs(base - artifact) <= TOLERANCE * abs(base)
    return Aspect(True) if close or base == artifact else Aspect(False, f"{name} is {artifact!r}, the base's {base!r}")


def _same_rope(base: torch.nn.Module, artifact: torch.nn.Module) -> Aspect:
    """By what the settings come to: the rotary frequencies, whichever way a config states them."""
    ours, theirs = _frequencies(base), _frequencies(artifact)
    if ours.keys() != theirs.keys():
        return Aspect(False, f"rotary embeddings {sorted(theirs)}, the base's {sorted(ours)}")
    for name, expected in ours.items():
        found = theirs[name]
        if expected.shape != found.shape:
            return Aspect(False, f"{name} has {len(found)} frequencies, the base's {len(expected)}")
        if not torch.allclose(expected, found, rtol=1e-4, atol=0):
            worst = int((found / expected).log().abs().argmax())
            return Aspect(
                False, f"{name}: frequency {worst} is {found[worst]:.6g}, the base's {expected[worst]:.6g} "
                f"(rope settings {_rope(artifact)}, the base's {_rope(base)})"
            )  # fmt: skip
    return Aspect(True)


def _rope(model: Any) -> Any:
    return model.config.get_text_config().to_dict().get("rope_parameters")


def _frequencies(model: Any) -> dict[str, torch.Tensor]:
    """Radians per position float32 [head_dim / 2] and the factor on attention, of each rotary embedding by name."""
    out = {}
    for name, module in model.named_modules():
        if name.split(".")[-1].startswith("rotary_emb"):
            kind: Any = type(module)
            fresh = kind(config=model.config.get_text_config())
            for key, buffer in fresh.named_buffers():
                if key.endswith("inv_freq") and not key.endswith("original_inv_freq"):
                    out[f"{name}.{key}"] = buffer.float()
            for key, value in vars(fresh).items():
                if key.endswith("attention_scaling"):
                    out[f"{name}.{key}"] = torch.tensor([float(value)])
    return out
