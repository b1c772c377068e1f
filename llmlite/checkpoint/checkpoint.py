"""Open a checkpoint: a directory or a hub id. Nothing of the weights is read until it is asked for."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError

from llmlite.checkpoint.families import EMBEDDING, FINAL_NORM, HEAD, LAYER, Family, family_of
from llmlite.checkpoint.safetensors_index import TensorEntry, read_index
from llmlite.errors import InputError, OutsideError, first_line

HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.txt", "*.model"]
# What transformers raises for values in a config.json that make no model.
CONFIG_ERRORS = (
    StrictDataclassError, TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError, AssertionError,
    RuntimeError, ImportError, IndexError, OverflowError,
)  # fmt: skip
SIDE_FILES = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "chat_template.jinja", "vocab.json", "merges.txt", "tokenizer.model",
)  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A full-precision checkpoint, checked against its own config, read tensor by tensor.

    ``source`` is what the user named, ``directory`` where it lies, ``tensors`` its checked index; ``gguf``: the file
    that ``directory`` was imported from, where it is there only as long as the checkpoint is open.
    """

    source: str
    directory: Path
    config: dict
    tensors: dict[str, TensorEntry]
    family: Family
    gguf: Path | None = None

    @property
    def num_layers(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def tied(self) -> bool:
        """The head is the embedding, whether or not a copy of it is stored."""
        return bool(self.config.get("tie_word_embeddings", HEAD not in self.tensors))

    @property
    def head(self) -> str:
        """The weight that gives the logits: the embedding where the two are tied."""
        return EMBEDDING if self.tied else HEAD

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, taken from the first decoder layer."""
        return self.tensors[f"{LAYER}0.{self.family.linears[0]}.weight"].dtype

    def read(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype."""
        return self.tensors[name].read()

    def layer_tensors(self, layer: int) -> list[str]:
        """The names of one decoder layer's tensors, as they stand in the index."""
        prefix = f"{LAYER}{layer}."
        return [name for name in self.tensors if name.startswith(prefix)]

    def side_files(self) -> list[Path]:
        """Tokenizer, chat template and generation settings, as far as they are there."""
        files = [self.directory / name for name in SIDE_FILES if (self.directory / name).is_file()]
        return [*files, *sorted((self.directory / "additional_chat_templates").glob("*.jinja"))]


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a directory or a hub id; `InputError` for whatever can't be compressed, with the reason."""
    directory = locate(str(model), revision)
    config = read_config(directory)
    if config.get("quantization_config"):
        raise InputError(f"{model}: already quantized; give the full-precision checkpoint that it was made from")
    family = family_of(config, str(model))
    if "auto_map" in config:
        raise InputError(f"{model}: its config asks for remote code (auto_map), which is refused; use a native model")
    tensors = read_index(directory)
    checkpoint = Checkpoint(str(model), directory, config, tensors, family)
    _check_against_config(checkpoint)
    return checkpoint


def locate(model: str, revision: str | None = None) -> Path:
    """The local directory of a model: as given, or a snapshot of the hub id (downloaded, or from the cache)."""
    path = Path(model)
    if path.is_dir():
        return path
    looks_local = model.startswith((".", "/", "~")) or model.count("/") != 1 or path.exists()
    if looks_local:
        raise InputError(f"{model}: no such directory; a checkpoint directory or a hub id like owner/name is right")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=HUB_FILES))
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise InputError(f"{model}: no such directory and no such model on the hub ({first_line(error)})") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise OutsideError(f"{model}: no such directory, and the hub can't be reached ({first_line(error)})") from None


def read_config(directory: Path) -> dict:
    """config.json as a dictionary."""
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(f"{directory}: has no config.json, so this is not a checkpoint") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise InputError(f"{file}: is not a JSON object")
    return config


def _check_against_config(checkpoint: Checkpoint) -> None:
    """Every tensor that the config implies is there, in its shape, as real numbers; nothing unknown is."""
    wanted = expected_shapes(checkpoint.config, checkpoint.family, checkpoint.source)
    tensors = checkpoint.tensors
    for name, shape in wanted.items():
        if name not in tensors:
            raise InputError(f"{checkpoint.source}: tensor {name!r} is missing from the safetensors files")
        if tensors[name].shape != shape:
            raise InputError(
                f"{checkpoint.source}: tensor {name!r} has shape {list(tensors[name].shape)}; "
                f"config.json implies {list(shape)}"
            )
        if tensors[name].dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise InputError(
                f"{checkpoint.source}: tensor {name!r} is {tensors[name].dtype}; 16 or 32 bit floats are right"
            )
    for name in tensors.keys() - wanted.keys():
        if not name.endswith(("rotary_emb.inv_freq", "lm_head.weight")):
            raise InputError(f"{checkpoint.source}: tensor {name!r} is not part of a {checkpoint.family.name} model")


def meta_model(config: dict, where: str) -> torch.nn.Module:
    """The transformers model of a config.json on the meta device, without memory; `InputError` if there is none."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        parsed = AutoConfig.for_model(**config)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(parsed, trust_remote_code=False)
    except CONFIG_ERRORS as error:
        raise InputError(f"{where}: config.json does not describe a model ({first_line(error)})") from None


def expected_shapes(config: dict, family: Family, where: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that transformers gives a model of this config (built without memory)."""
    model = meta_model(config, where)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    required = {EMBEDDING, FINAL_NORM}
    assert required <= shapes.keys(), f"{family.name}: unexpected parameter names {list(shapes)[:5]}"
    return shapes
