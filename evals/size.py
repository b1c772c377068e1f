"""How large an artifact is on disk, and how many bits that makes for each weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from llmlite.checkpoint.gguf_header import read_gguf
from llmlite.checkpoint.safetensors_index import read_index
from llmlite.errors import InputError
from llmlite.evals.locate import Location

NO_PARAMETERS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # constants in GGUF


@dataclass(frozen=True)
class Size:
    """``bytes``: the files that hold weights; ``tensor_bytes``: the tensors in them, scales and tables included.

    ``parameters``: of the model before compression, tied ones once.
    """

    bytes: int
    tensor_bytes: int
    parameters: int

    @property
    def bits_per_weight(self) -> float:
        """All tensors, also those left in 16 bits, over all parameters: a GGUF's tokenizer does not count."""
        return 8 * self.tensor_bytes / self.parameters


def measure_size(location: Location) -> Size:
    """Read from headers and config alone; `InputError` for a file that is missing or broken."""
    on_disk = sum(file.stat().st_size for file in location.weight_files)
    if location.engine == "llama.cpp":
        tensors = read_gguf(location.path).tensors.values()
        counted = sum(math.prod(tensor.shape) for tensor in tensors if tensor.name not in NO_PARAMETERS)
        return Size(on_disk, sum(tensor.nbytes for tensor in tensors), counted)
    stored = read_index(location.path).values()
    return Size(on_disk, sum(tensor.nbytes for tensor in stored), _parameters(location.path))


def _parameters(directory: Path) -> int:
    """Counted on the model that the config describes, built without memory: exact for every packed format."""
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{directory}: config.json does not describe a language model ({error})") from None
    return sum(parameter.numel() for parameter in model.parameters())
