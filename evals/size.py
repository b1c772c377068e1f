"""How large an artifact is on disk, and how many bits that makes for each weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

from llmlite.checkpoint.checkpoint import meta_model, read_config
from llmlite.checkpoint.gguf_header import read_gguf
from llmlite.checkpoint.safetensors_index import read_index
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
    if location.engine == "llama.cpp":
        tensors = read_gguf(location.path).tensors.values()
        counted = sum(math.prod(tensor.shape) for tensor in tensors if tensor.name not in NO_PARAMETERS)
        return Size(location.path.stat().st_size, sum(tensor.nbytes for tensor in tensors), counted)
    stored = read_index(location.path).values()
    on_disk = sum(file.stat().st_size for file in {tensor.file for tensor in stored})
    model = meta_model(read_config(location.path), str(location.path))  # exact for every packed format
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Size(on_disk, sum(tensor.nbytes for tensor in stored), parameters)
