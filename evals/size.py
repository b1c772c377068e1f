"""How large an artifact is on disk, and how many bits that makes for each weight."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmlite.checkpoint.safetensors_index import read_index
from llmlite.errors import InputError
from llmlite.evals.locate import Location
from llmlite.extras import need

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
    missing = [file for file in location.weight_files if not file.is_file()]
    if missing:
        raise InputError(f"{missing[0]}: is missing: the artifact is incomplete")
    on_disk = sum(file.stat().st_size for file in location.weight_files)
    if location.engine == "llama.cpp":
        return Size(on_disk, *_gguf(location.weight_files))
    tensors = read_index(location.path).values()
    return Size(on_disk, sum(tensor.nbytes for tensor in tensors), _parameters(location.path))


def _gguf(files: list[Path]) -> tuple[int, int]:
    gguf = need("gguf", "gguf")
    nbytes = parameters = 0
    for file in files:
        try:
            tensors = gguf.GGUFReader(file).tensors
        except (ValueError, KeyError, IndexError) as error:
            raise InputError(f"{file}: is not a whole GGUF file ({error})") from None
        nbytes += sum(int(tensor.n_bytes) for tensor in tensors)
        parameters += sum(int(tensor.n_elements) for tensor in tensors if tensor.name not in NO_PARAMETERS)
    return nbytes, parameters


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
