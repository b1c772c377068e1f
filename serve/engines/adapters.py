"""Low-rank adapters of a transformers model, loaded once and chosen for each forward."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from llmlite.errors import InputError, first_line
from llmlite.formats.peft import refuse_changed_base

WEIGHTS = "adapter_model.safetensors"


class Adapters:
    """``adapters``: name and directory of each. Raises `InputError` for what isn't a LoRA of this model."""

    def __init__(self, model: torch.nn.Module, adapters: list[tuple[str, Path]]) -> None:
        self._model = model
        self._modules: list[Any] = []
        self._inner: dict[str, str] = {}
        self._active: str | None = None
        if not adapters:
            return
        if importlib.util.find_spec("peft") is None:
            raise InputError(
                "lora: adapters of safetensors artifacts need the Python package peft, which is not installed: "
                "install llmlite with its extra 'lora', as in pip install '.[lora]'"
            )
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils import AuxiliaryTrainingWrapper

        for number, (name, directory) in enumerate(adapters):
            if name in self._inner:
                raise InputError(f"lora {name}: is given twice")
            self._inner[name] = f"adapter{number}of{len(adapters)}"  # peft puts no dot into a module's name
            _load(model, directory, self._inner[name])
        self._modules = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        self._switch(None)

    def use(self, name: str | None) -> None:
        """The next forwards are those of this adapter, or of the plain model."""
        if name is not None and name not in self._inner:
            raise InputError(f"adapter {name!r}: is not loaded")
        if name != self._active:
            self._switch(name)

    def _switch(self, name: str | None) -> None:
        for module in self._modules:
            module.enable_adapters(name is not None)
        if name is not None:
            from peft.functional import set_adapter

            set_adapter(self._model, self._inner[name], inference_mode=True)
        self._active = name


def _load(model: Any, directory: Path, inner: str) -> None:
    try:
        config = json.loads((directory / "adapter_config.json").read_text())
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"lora {directory}: must be a directory with an adapter_config.json as peft writes it ({first_line(error)})"
        ) from None
    if kind != "LORA":
        raise InputError(f"lora {directory}: is a {kind} adapter; LORA is served")
    refuse_changed_base(config, f"lora {directory}")
    if not (directory / WEIGHTS).is_file():
        raise InputError(f"lora {directory}: has no {WEIGHTS}; weights in pickle files are not read")
    try:
        report = model.load_adapter(
            str(directory),
            adapter_name=inner,
            adapter_kwargs={"local_files_only": True},
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # they are reported below
        )
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise InputError(f"lora {directory}: does not fit this model ({first_line(error)})") from None
    missing = sorted(key for key in report.missing_keys if f".{inner}." in key)
    other = sorted(str(key) for key, *_ in report.mismatched_keys)
    for keys, told in [(other, "another shape of"), (missing, "no"), (sorted(report.unexpected_keys), "a strange")]:
        if keys:
            raise InputError(f"lora {directory}: does not fit this model: it has {told} {keys[0]}")
