"""LoRA adapters as peft keeps them: adapter_config.json beside adapter_model.safetensors, read and written.

Per linear layer, under ``base_model.model.``: ``lora_A.weight`` [rank, in], ``lora_B.weight`` [out, rank], and of
DoRA ``lora_magnitude_vector`` [out]. The layer's weight becomes W' = W + scale * B A, scale = alpha / rank (LoRA,
2106.09685) or alpha / sqrt(rank) (rsLoRA, 2312.03732), or magnitude * W' / |W'| row by row (DoRA, 2402.09353).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmlite.checkpoint.artifact import sha256_of
from llmlite.checkpoint.safetensors_index import TensorEntry, read_header
from llmlite.checkpoint.safetensors_writer import SafetensorsWriter, TensorSpec
from llmlite.errors import InputError
from llmlite.extras import need

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# Settings that change what the pairs mean; the values are those that change nothing.
PLAIN = {
    "fan_in_fan_out": False, "layer_replication": None, "alora_invocation_tokens": None, "use_qalora": False,
    "use_bdlora": None, "arrow_config": None, "target_parameters": None, "megatron_config": None,
}  # fmt: skip
# Ways to begin that take the first product out of the base's weights: the pairs do not belong to the base as it is.
CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


@dataclass(frozen=True)
class Pair:
    """What an adapter has of one linear layer: ``a`` [rank, in], ``b`` [out, rank], the scale of their product, and
    DoRA's ``magnitude`` [out].
    """

    a: TensorEntry
    b: TensorEntry
    scale: float
    magnitude: TensorEntry | None = None

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it changes: (out, in)."""
        return self.b.shape[0], self.a.shape[1]

    def applied(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight [out, in] with the adapter merged in, float32."""
        changed = weight.float() + self.scale * (self.b.read().float() @ self.a.read().float())
        if self.magnitude is None:
            return changed
        return changed * (self.magnitude.read().float() / changed.norm(dim=1)).unsqueeze(1)


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: the pair of each linear layer by the layer's name, "model.layers.0.mlp.up_proj"."""

    directory: Path
    pairs: dict[str, Pair]
    config: dict[str, Any] = field(repr=False)

    @property
    def weights(self) -> Path:
        return self.directory / WEIGHTS

    @property
    def sha256(self) -> str:
        """The digest of its weights."""
        return sha256_of(self.weights)

    @property
    def dora(self) -> bool:
        return any(pair.magnitude is not None for pair in self.pairs.values())

    def check(self, shapes: Mapping[str, tuple[int, ...]], model: str) -> None:
        """`InputError` where it is not an adapter of a model with weights of these ``shapes``, by tensor name."""
        for module, pair in self.pairs.items():
            shape = shapes.get(f"{module}.weight")
            if shape != pair.shape:
                has = "has no such layer" if shape is None else f"has a weight of {list(shape)} there"
                raise InputError(
                    f"{self.directory}: changes {module}, a weight of {list(pair.shape)}, and {model} {has}: an "
                    "adapter of another base"
                )


def read_adapter(directory: Path) -> Adapter:
    """The adapter in a directory, its tensors not yet read; `InputError` for one that is more than pairs of LoRA."""
    config = _config(directory)
    if not (directory / WEIGHTS).is_file():
        raise InputError(f"{directory}: has no {WEIGHTS}; an adapter saved by peft as safetensors is right")
    parts: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in read_header(directory / WEIGHTS).items():
        if name.endswith(".base_layer.weight"):  # peft puts the unchanged weight of an adapted head beside its pair
            continue
        module, dot, part = name.removeprefix(PREFIX).rpartition(".lora_")
        if not dot or part not in ("A.weight", "B.weight", "magnitude_vector"):
            raise InputError(
                f"{directory}: tensor {name!r} is no part of a low-rank pair of a linear layer: an adapter that also "
                "trains whole tensors or embeddings can't be used here"
            )
        parts.setdefault(module, {})[part] = entry
    if not parts:
        raise InputError(f"{directory}: {WEIGHTS} holds no tensors")
    return Adapter(directory, {m: _pair(directory, m, found, config) for m, found in parts.items()}, config)


def _config(directory: Path) -> dict[str, Any]:
    file = directory / CONFIG
    try:
        config = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{directory}: has no {CONFIG}; the directory of an adapter saved by peft is right") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: is not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise InputError(f"{file}: is not the config of a LoRA adapter; peft_type LORA is right")
    for key, plain in PLAIN.items():
        if config.get(key, plain) != plain:
            raise InputError(f"{file}: {key} is {config[key]!r}, which can't be followed here; plain LoRA is right")
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{file}: {key} is {value!r}; a number is right")
    refuse_changed_base(config, str(file))
    return config


def refuse_changed_base(config: Mapping[str, Any], where: str) -> None:
    """`InputError` for an adapter that began with a part of the base's weights, which peft takes out of them."""
    begun = config.get("init_lora_weights", True)
    if isinstance(begun, str) and begun.lower().startswith(CHANGES_BASE):
        raise InputError(
            f"{where}: init_lora_weights is {begun!r}, so the adapter belongs to weights that peft changes when it "
            "loads them; save it as plain LoRA (path_initial_model_for_weight_conversion of save_pretrained)"
        )


def _pair(directory: Path, module: str, parts: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> Pair:
    a, b, magnitude = parts.get("A.weight"), parts.get("B.weight"), parts.get("magnitude_vector")
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or not 0 < a.shape[0] == b.shape[1]:
        raise InputError(f"{directory}: {module} lacks a pair lora_A [rank, in], lora_B [out, rank] of one rank")
    if magnitude is not None and magnitude.shape != (b.shape[0],):
        raise InputError(f"{directory}: {module} has {list(magnitude.shape)} magnitudes for {b.shape[0]} outputs")
    if bool(config.get("use_dora")) != (magnitude is not None):
        has = "has no" if magnitude is None else "has"
        raise InputError(f"{directory}: {module} {has} magnitudes; use_dora in {CONFIG} says otherwise")
    alpha, rank = float(_of_layer(config, "lora_alpha", "alpha_pattern", module)), a.shape[0]
    wanted = _of_layer(config, "r", "rank_pattern", module)
    if rank != wanted:
        raise InputError(f"{directory}: {module} has a pair of rank {rank}; {CONFIG} says {wanted}")
    return Pair(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank), magnitude)


def _of_layer(config: Mapping[str, Any], key: str, patterns: str, module: str) -> Any:
    """A setting as it is for one layer: what the pattern that matches its name says, else what all have."""
    given = config.get(patterns) or {}
    return given.get(need("lora", "peft.utils.other").get_pattern_key(given, module), config[key])


class AdapterWriter:
    """A new adapter in ``directory``, whose products are added as they are: alpha = ``rank``.

    ``shapes``: (out, in) of each linear layer by its name. The pairs are kept in ``dtype``, filled in any order;
    ``close`` raises ValueError if one was never written. ``base``: what to load it on, for its reader.
    """

    def __init__(
        self,
        directory: Path,
        shapes: Mapping[str, tuple[int, int]],
        rank: int,
        base: str,
        dtype: torch.dtype = torch.float16,
    ):
        self.directory, self.dtype = directory, dtype
        layout = {}
        for module, (out, width) in shapes.items():
            layout[f"{PREFIX}{module}.lora_A.weight"] = TensorSpec(dtype, (rank, width))
            layout[f"{PREFIX}{module}.lora_B.weight"] = TensorSpec(dtype, (out, rank))
        self.bytes = sum(spec.nbytes for spec in layout.values())
        self._writer = SafetensorsWriter(directory, layout, max_shard_bytes=self.bytes + 1)
        self._config = need("lora", "peft").LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=sorted({module.rpartition(".")[2] for module in shapes}),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            inference_mode=True,
        )

    def write(self, module: str, a: torch.Tensor, b: torch.Tensor) -> None:
        """Put one pair in its place: ``a`` [rank, in], ``b`` [out, rank]; `InputError` beyond the dtype's range."""
        for part, tensor in (("A", a), ("B", b)):
            kept = tensor.to(self.dtype)
            if not torch.isfinite(kept).all():
                raise InputError(f"{module}: the adapter has values that {self.dtype} can't hold")
            self._writer.write(f"{PREFIX}{module}.lora_{part}.weight", kept)

    def close(self) -> None:
        """Flush the pairs, then say what they are."""
        self._writer.close()
        (self.directory / "model.safetensors").rename(self.directory / WEIGHTS)
        self._config.save_pretrained(self.directory)

    def abandon(self) -> None:
        """Close the file as it is."""
        self._writer.abandon()
