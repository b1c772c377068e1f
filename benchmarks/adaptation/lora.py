"""LoRA and QLoRA on 150 instruction tasks, judged by 25 others, and the memory of QLoRA beside full fine-tuning's.

Each training is a process of its own, so that its peak of memory is its own. Both sides of the memory comparison see
the same rows of 1,024 tokens, in bfloat16 where the processor has it, with activations computed twice.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.adaptation.setup import Setup  # what it imports would count as each training's memory

STEPS = 30
TASKS = "chat/alpaca_seed_tasks.jsonl"  # 175 of them
HELD = 25 / 175
FALLS = {"lora": 0.06, "qlora": 0.07}
MEMORY = 0.5
BAR = "held-out loss falls by 6% (LoRA) and 7% (QLoRA on nf4); QLoRA peaks below half of full fine-tuning's memory"


def run(setup: Setup) -> dict[str, Any]:
    """Loss and peak of LoRA and QLoRA, each after 30 steps, and the peak of two steps of full fine-tuning."""
    rows = [_in_a_process(setup, name) for name in ("lora", "qlora", "full")]
    found = {row["name"]: row for row in rows}
    falls = all(1 - found[name]["after"] / found[name]["before"] >= least for name, least in FALLS.items())
    light = found["qlora"]["peak_mib"] < MEMORY * found["full"]["peak_mib"]
    return {"rows": rows, "held": falls and light, "bar": BAR}


def _in_a_process(setup: Setup, name: str) -> dict[str, Any]:
    facts = setup.work / f"lora-{name}.json"
    if not facts.is_file():
        base = _nf4(setup) if name == "qlora" else setup.base
        settings = [str(base), str(setup.data / TASKS), str(setup.work / f"adapter-{name}"), str(setup.threads)]
        subprocess.run([sys.executable, "-m", "benchmarks.adaptation.lora", name, *settings, str(facts)], check=True)
    return json.loads(facts.read_text())


def _nf4(setup: Setup) -> Path:
    """The base rounded to nearest in nf4. Rounding while loading takes more memory than the training after it."""
    from llmlite.run.quantize import QuantizeSettings, quantize

    out = setup.work / "lora-nf4"
    if not out.is_dir():
        quantize(setup.base, out, QuantizeSettings("bnb:nf4", solver="rtn", threads=setup.threads))
    return out


def _train(base: str, data: str, out: str, threads: int) -> dict[str, Any]:
    from llmlite.run.lora import LoraSettings, lora

    settings = LoraSettings(data=(data,), steps=STEPS, held_out=HELD, checkpointing="on", threads=threads, resume=True)
    done = lora(base, out, settings)
    return {"before": done.trained.before, "after": done.trained.after, "seconds": done.trained.seconds,
            "best_step": done.trained.best_step, "parameters": done.parameters}  # fmt: skip


def _train_whole(base: str, data: str, out: str, threads: int) -> dict[str, Any]:
    """Two steps of full fine-tuning: float32 weights, AdamW, the same rows and the same loss."""
    import torch
    from transformers import AutoModelForCausalLM

    from llmlite.adapt.conversations import packed_rows, tokenized
    from llmlite.adapt.lora import AdapterTask
    from llmlite.adapt.training import TrainSettings, train
    from llmlite.calibrate.corpus import read_corpus
    from llmlite.evals.hf import load_tokenizer
    from llmlite.memory import give_freed_memory_back, keep_heap_small

    class Whole(torch.nn.Module):
        """A model in the place of an adapted one: all of it is trained."""

        def __init__(self, model: Any):
            super().__init__()
            self.model, self.device = model, model.device

        def get_base_model(self) -> Any:
            return self.model

    torch.set_num_threads(threads)
    keep_heap_small()
    conversations, _ = tokenized([read_corpus(data)], load_tokenizer(Path(base)), 1024)
    rows = packed_rows(conversations, 1024, True)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    give_freed_memory_back()
    Path(out).mkdir(exist_ok=True)
    settings = TrainSettings(steps=2, batch_rows=1, rate=1e-5, judge_every=2, save_every=2)
    trained = train(AdapterTask(Whole(model), rows, rows[:1]), settings, Path(out), "full fine-tuning")
    for file in Path(out).iterdir():
        file.unlink()
    parameters = sum(value.numel() for value in model.parameters())
    return {"before": trained.before, "after": trained.after, "seconds": trained.seconds, "parameters": parameters}


def peak_mib() -> float:
    """The most memory that this process ever held, as the kernel counts it (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main(name: str, base: str, data: str, out: str, threads: str, facts: str) -> None:
    """Train in this process, and write what came of it."""
    found = (_train_whole if name == "full" else _train)(base, data, out, int(threads))
    Path(facts).write_text(json.dumps({"name": name, **found, "peak_mib": peak_mib()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
