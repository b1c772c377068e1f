"""What a decoder's arithmetic depends on, and the floating-point operations of one token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmlite.checkpoint.checkpoint import meta_model, read_config
from llmlite.checkpoint.families import family_of_gguf
from llmlite.checkpoint.gguf_config import import_config
from llmlite.checkpoint.gguf_header import read_gguf
from llmlite.errors import InputError
from llmlite.evals.locate import Location


@dataclass(frozen=True)
class Shape:
    """``matrices``: parameters that every token is multiplied with: the embedding is looked up and does not count,
    the output head does. ``layers``: for each attention layer its query heads x head size, and how many positions it
    attends to at most (None: all)."""

    matrices: int
    layers: tuple[tuple[int, int | None], ...]

    def flops(self, context: int) -> int:
        """For one more token with ``context`` positions before it: 2 for every parameter, and 4 x width x positions
        for every attention layer, its scores and its weighted sum (Kaplan et al., arXiv 2001.08361, table 1)."""
        attended = sum(width * min(context, window or context) for width, window in self.layers)
        return 2 * self.matrices + 4 * attended


def model_shape(location: Location) -> Shape | None:
    """From config.json or the GGUF header; None for an architecture that is unknown here or has experts, of which a
    token uses only some. Raises `InputError` for a file that is broken."""
    config = _config(location)
    if config is None or any("expert" in key for key in config):
        return None
    model: Any = meta_model(config, str(location.path))
    text = model.config.get_text_config()
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    if not text.tie_word_embeddings:
        matrices -= model.get_input_embeddings().weight.numel()
    said = text.to_dict()
    width = text.num_attention_heads * (said.get("head_dim") or text.hidden_size // text.num_attention_heads)
    kinds = said.get("layer_types") or ["full_attention"] * text.num_hidden_layers
    window = said.get("sliding_window")
    layers = tuple((width, window if kind == "sliding_attention" else None) for kind in kinds)
    return Shape(matrices, layers)


def _config(location: Location) -> dict | None:
    if location.engine == "transformers":
        return read_config(location.path)
    source = read_gguf(location.path)
    architecture = str(source.metadata.get("general.architecture"))
    try:
        return import_config(source, family_of_gguf(architecture, str(location.path)))
    except InputError:  # llama.cpp runs more architectures than have a config here
        return None
