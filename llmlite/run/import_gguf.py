"""Turn a GGUF file into a Hugging Face checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from llmlite.checkpoint.gguf_import import import_gguf
from llmlite.memory import keep_heap_small

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ImportSettings:
    """What `run_import` can be told."""

    dtype: Literal["float32", "float16", "bfloat16"] = field(
        default="float32", metadata={"help": "the dtype of the checkpoint"}
    )
    reorder: int | None = field(
        default=None,
        metadata={
            "help": "seed: reorder the channels at random, exactly, so that weights which lay on a low-bit grid "
            "leave it and rounding them again shows its true cost (the network computes the same function)"
        },
    )


def run_import(file: Path, out: Path, settings: ImportSettings) -> None:
    """Import ``file`` into the new directory ``out``."""
    keep_heap_small()
    import_gguf(file, out, DTYPES[settings.dtype], settings.reorder)
