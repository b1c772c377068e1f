"""An adapter as GGUF on a Q8_0 base in llama.cpp, against peft's own model in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.adaptation.setup import Setup, apart, float32_engine, llama_engine, tokens_per_second
from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.checkpoint.families import LAYER
from llmlite.evals.engines import TransformersEngine
from llmlite.formats.gguf.lora import GGUF_LORA, write_gguf_lora
from llmlite.formats.peft import AdapterWriter, read_adapter
from llmlite.run.quantize import QuantizeSettings, quantize

BAR = 0.01
RANK, SIZE = 16, 0.05  # of a random adapter: its product's norm as a share of the weight's


def run(setup: Setup) -> dict:
    """Mean KL(peft || llama.cpp) with the adapter on the Q8_0 base; beside it what the adapter itself changes."""
    folder = setup.adapter or _random(setup, setup.work / f"random-r{RANK}")
    base = setup.work / "q8_0"
    if not base.is_dir():
        quantize(setup.base, base, QuantizeSettings("gguf:q8_0", solver="rtn", threads=setup.threads))
    lora = setup.work / f"{folder.name}-{GGUF_LORA}"
    write_gguf_lora(read_adapter(folder), json.loads((setup.base / "config.json").read_text()), lora)
    plain = float32_engine(setup.base)
    rows = setup.rows(plain.tokenizer)
    peft, llama = _PeftEngine(setup.base, folder), llama_engine(base / "model.gguf", lora, setup.threads)
    mine, its = apart(peft, llama, rows, "llama.cpp"), apart(plain, peft, rows, "peft")
    table = [{"what": "llama.cpp against peft", **mine}, {"what": "peft against the base", **its}]
    llama.close()
    speed = {"what": "tokens per second", **tokens_per_second(base / "model.gguf", lora, setup.threads)}
    held = mine["mean_kl"] < BAR < its["mean_kl"]
    return {"bar": f"mean KL < {BAR}", "held": held, "adapter": str(folder), "rows": [*table, speed]}


class _PeftEngine(TransformersEngine):
    """The base with the adapter on it in float32, computed by peft: two products beside each weight."""

    def __init__(self, base: Path, adapter: Path):
        from peft import PeftModel

        super().__init__(base)
        self.model: Any = PeftModel.from_pretrained(self.model.float().cpu(), str(adapter)).eval().base_model.model


def _random(setup: Setup, folder: Path) -> Path:
    """An adapter of every linear layer with random pairs."""
    if (folder / "adapter_config.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    base = open_checkpoint(setup.base)
    modules = [f"{LAYER}{layer}.{name}" for layer in range(base.num_layers) for name in base.family.linears]
    shapes = {module: base.tensors[f"{module}.weight"].shape for module in modules}
    writer = AdapterWriter(folder, {m: (shape[0], shape[1]) for m, shape in shapes.items()}, RANK, str(setup.base))
    torch.manual_seed(0)
    for module, (out, width) in shapes.items():
        a, b = torch.randn(RANK, width), torch.randn(out, RANK)
        size = SIZE * base.read(f"{module}.weight").float().norm() / (b @ a).norm()
        writer.write(module, a * size.sqrt(), b * size.sqrt())
    writer.close()
    return folder
