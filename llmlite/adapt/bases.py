"""Load the model that adapters are trained on: 16 bits, or quantized and still passing a gradient on every device.

gptq and compressed-tensors checkpoints are not loaded by their libraries: those unpack all weights at the first
forward, or need kernels that are not everywhere. Here their layers stay packed (`PackedLinear`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError

from llmlite.adapt.packed_linear import PackedLinear
from llmlite.checkpoint.checkpoint import CONFIG_ERRORS, read_config
from llmlite.checkpoint.safetensors_index import read_index
from llmlite.errors import InputError, OutsideError, first_line
from llmlite.extras import need
from llmlite.formats.reading import packed_format, unquantized
from llmlite.memory import give_freed_memory_back

OnTheFly = Literal["bnb:nf4", "bnb:int8"]
METHODS = ("bitsandbytes", "gptq", "compressed-tensors")


@dataclass(frozen=True)
class Base:
    """A frozen model in train mode and what its linear layers are kept in, as "16 bits" or "bnb:nf4"."""

    model: Any
    kept: str
    notes: tuple[str, ...] = ()


def method_of(directory: Path) -> str:
    """The quantization method that config.json names, "" for none; `InputError` for one that can't be trained on."""
    quantization = read_config(directory).get("quantization_config") or {}
    method = str(quantization.get("quant_method", "")) if isinstance(quantization, dict) else "?"
    if method and method not in METHODS:
        raise InputError(
            f"{directory}: is quantized by {method!r}; adapters are trained on 16 bits, {', '.join(METHODS)}"
        )
    return method


def load_base(directory: Path, dtype: torch.dtype, device: str, on_the_fly: OnTheFly | None = None) -> Base:
    """The model of ``directory``, every parameter frozen; ``dtype`` is that of what is not quantized.

    ``on_the_fly``: round the linear layers of a 16-bit checkpoint while loading. Raises `InputError` for what can't be
    loaded or trained on, `OutsideError` where memory does not suffice.
    """
    method = method_of(directory)
    if method and on_the_fly:
        raise InputError(f"--quantize {on_the_fly}: {directory} is already quantized ({method}); leave it out")
    if method == "bitsandbytes" or on_the_fly:
        need("bnb", "bitsandbytes")
    try:
        if method in ("gptq", "compressed-tensors"):
            model, kept, notes = _packed(directory, dtype, device)
        else:
            model, kept, notes = _by_transformers(directory, dtype, device, on_the_fly)
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise OutsideError(f"{directory}: does not fit into memory ({first_line(error)})") from None
    except (OSError, SafetensorError, *CONFIG_ERRORS) as error:
        raise InputError(f"{directory}: can't be loaded to be trained on ({first_line(error)})") from None
    model.requires_grad_(False)
    model.config.use_cache = False
    give_freed_memory_back()
    return Base(model.train(), kept, notes)


def _by_transformers(
    directory: Path, dtype: torch.dtype, device: str, on_the_fly: OnTheFly | None
) -> tuple[Any, str, tuple[str, ...]]:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    more: dict[str, Any] = {"quantization_config": _rounding(on_the_fly, dtype)} if on_the_fly else {}
    where = "cpu" if device == "cpu" else torch.cuda.current_device()  # bitsandbytes would go to a GPU by itself
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, device_map={"": where}, use_safetensors=True, trust_remote_code=False,
        output_loading_info=True, **more,
    )  # fmt: skip
    model, report = loaded
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise InputError(f"{directory}: {len(names)} tensors of the model are not in the files, {names[0]!r} for one")
    for parameter in model.parameters():  # of quantized checkpoints transformers leaves it as the files have it
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    return model, prepare_bitsandbytes(model, dtype) or "16 bits", ()


def _rounding(to: OnTheFly, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if to == "bnb:int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def prepare_bitsandbytes(model: torch.nn.Module, dtype: torch.dtype) -> str:
    """Make 4-bit layers pass gradients for good and compute in ``dtype``; the kind of layers, "" for none of the two.

    On processors with AVX512-BF16, bitsandbytes 0.50 packs the weights of a 4-bit layer anew at its first forward in
    eval mode, into a form that passes no gradient, with no more than a warning.
    """
    kinds = {type(module).__name__ for module in model.modules()}
    if "Linear4bit" in kinds:
        for module in model.modules():
            if type(module).__name__ == "Linear4bit":
                module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
                module.compute_dtype, module.compute_type_is_set = dtype, True  # type: ignore[assignment]
        return "bnb:nf4"
    return "bnb:int8" if "Linear8bitLt" in kinds else ""


def _packed(directory: Path, dtype: torch.dtype, device: str) -> tuple[Any, str, tuple[str, ...]]:
    """A gptq or compressed-tensors checkpoint with its linear layers packed."""
    config = read_config(directory)
    packed, tensors = packed_format(config, str(directory)), read_index(directory)
    model = _empty_model(unquantized(config))
    modules = packed.modules(set(tensors))
    taken = {name for names in modules.values() for name in names}
    rest = {name: entry.read() for name, entry in tensors.items() if name not in taken}
    for module, names in modules.items():
        old = model.get_submodule(module)
        parts = {name: tensors[name].read() for name in names if not name.endswith(".bias")}
        layer = PackedLinear((old.out_features, old.in_features), parts, _unpacker(packed, module), dtype)
        if old.bias is not None:
            bias = tensors[f"{module}.bias"].read().to(dtype)
            layer.register_parameter("bias", torch.nn.Parameter(bias, requires_grad=False))
        parent, _, name = module.rpartition(".")
        setattr(model.get_submodule(parent), name, layer)
    report = model.load_state_dict({n: t.to(dtype) for n, t in rest.items()}, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, value in model.named_parameters() if value.is_meta]
    if missing or report.unexpected_keys:
        name = (missing or report.unexpected_keys)[0]
        raise InputError(f"{directory}: tensor {name!r} is missing from the files or from the model")
    rounds_inputs = any(s.get("input_activations") for s in _schemes(config))
    note = "the inputs of the layers are rounded by the base's readers, and are not while the adapter is trained"
    return model.to(device), packed.name, (note,) if rounds_inputs else ()


def _schemes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return list(config["quantization_config"].get("config_groups", {}).values())


def _unpacker(packed: Any, module: str) -> Any:
    return lambda tensors: packed.weight(module, tensors)


def _empty_model(config: Mapping[str, Any]) -> Any:
    """The model of a config with its parameters on the meta device and its buffers real."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), trust_remote_code=False)
