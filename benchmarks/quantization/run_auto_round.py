"""auto-round in its own environment: python run_auto_round.py BASE ROWS.npy OUT BITS GROUP.

Its own recipe, 200 steps a layer, in bfloat16. Of a float32 checkpoint release 0.16.1 writes the embedding in 32 bits,
where llmlite keeps 16, so its file is larger; the rounded layers are alike. Written in the GPTQ format.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from auto_round import AutoRound
from torch.utils.data import DataLoader

BATCH = 8


def main(base: str, rows: str, out: str, bits: str, group: str) -> None:
    ids = torch.from_numpy(np.load(rows))
    examples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    tuned = AutoRound(
        base,
        scheme=f"W{bits}A16",
        group_size=int(group),
        dataset=DataLoader(examples, batch_size=BATCH),  # type: ignore[arg-type]
        seqlen=ids.shape[1],
        nsamples=len(ids),
        batch_size=BATCH,
        device_map="cpu",
        model_dtype="bf16",
    )
    _, written = tuned.quantize_and_save(out, format="auto_gptq")
    (folder,) = [written] if isinstance(written, str) else written
    for file in list(Path(folder).iterdir()):  # it makes a folder of its own in the one that it is given
        file.rename(Path(out) / file.name)


if __name__ == "__main__":
    main(*sys.argv[1:])
