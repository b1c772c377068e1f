"""GPTQModel in its own environment: python run_gptqmodel.py BASE ROWS.npy OUT BITS GROUP.

Its own settings throughout, but for the dtype: float16, which the format's scales have and llmlite's GPTQ files keep
their other tensors in. Left to itself it takes bfloat16 on processors.
"""

import sys

import numpy as np
import torch
from gptqmodel import GPTQModel, QuantizeConfig


def main(base: str, rows: str, out: str, bits: str, group: str) -> None:
    config = QuantizeConfig(bits=int(bits), group_size=int(group))
    print(config)
    model = GPTQModel.load(base, config, dtype=torch.float16, device="cpu")
    examples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in np.load(rows)]
    model.quantize(examples, batch_size=1)
    model.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
