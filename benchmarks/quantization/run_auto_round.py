"""auto-round in its own environment: python run_auto_round.py BASE ROWS.npy OUT BITS GROUP.

Its own recipe: 200 steps a layer, in bfloat16 on processors that have it. Written in the GPTQ format, as float16.
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
        dataset=DataLoader(examples, batch_size=BATCH),
        seqlen=ids.shape[1],
        nsamples=len(ids),
        batch_size=BATCH,
        device_map="cpu",
    )
    _, written = tuned.quantize_and_save(out, format="auto_gptq")
    (folder,) = [written] if isinstance(written, str) else written
    if Path(folder).resolve() != Path(out).resolve():
        raise SystemExit(f"auto-round wrote to {folder}, {out} was asked for")


if __name__ == "__main__":
    main(*sys.argv[1:])
