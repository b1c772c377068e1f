"""Merging an adapter into a 4-bit model: how much of its gain in held-out loss is left after rounding again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.adaptation.setup import Setup, float32_engine
from llmlite.adapt.conversations import Tokens, tokenized
from llmlite.calibrate.corpus import read_corpus
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.evals.engines import Engine
from llmlite.formats.dequantized import open_dequantized
from llmlite.formats.peft import Adapter, read_adapter
from llmlite.progress import track
from llmlite.run.lora import LoraSettings, lora
from llmlite.run.merge import MergeSettings, merge
from llmlite.run.quantize import QuantizeSettings, quantize

BAR = 0.90
TO = "compressed-tensors:w4a16g64"
TOKENS = 16384
TRAINED, STEPS, LONGEST = 150, 30, 1024


def run(setup: Setup) -> dict:
    """Loss per answer token in nats on instructions that trained nothing: of the 4-bit model, with the adapter beside
    it, and merged: into the 4-bit weights and into the full-precision ones, rounded with feedback and to nearest.
    """
    four = setup.work / "w4"
    if not four.is_dir():
        quantize(setup.base, four, QuantizeSettings(TO, calibration_tokens=TOKENS, threads=setup.threads))
    train, judge = _texts(setup)
    folder = setup.adapter or _trained(setup, four, train)
    adapter, plain = read_adapter(folder), float32_engine(setup.base)
    chats, _ = tokenized([read_corpus(str(judge))], plain.tokenizer, LONGEST)
    table = [{"model": "16 bits", "loss": _loss(plain, chats, "16 bits")}]
    rounded = open_dequantized(four)
    without = _measured(setup, rounded, None, chats, "4 bits")
    beside = _measured(setup, rounded, adapter, chats, "4 bits, adapter beside")
    gain, kept = without - beside, {}
    table += [{"model": "4 bits", "loss": without}, {"model": "4 bits, adapter beside", "loss": beside}]
    for source, name in ((four, "4-bit"), (setup.base, "full-precision")):
        for solver in ("feedback", "rtn"):
            out = setup.work / f"{folder.name}-into-{source.name}-{solver}"
            if not out.is_dir():
                merge(source, folder, out, _settings(solver, setup.threads))
            title = f"merged into {name} weights, {solver}"
            loss = _measured(setup, open_dequantized(out), None, chats, title)
            kept[name, solver] = (without - loss) / gain
            table.append({"model": title, "loss": loss, "kept": kept[name, solver]})
    held = gain > 0 and max(kept["4-bit", "feedback"], kept["full-precision", "feedback"]) >= BAR
    bar = f"merged with feedback at least {BAR:.0%} of the gain is kept"
    return {"bar": bar, "held": held, "adapter": str(folder), "gain": gain, "rows": table}


def _settings(solver: str, threads: int) -> MergeSettings:
    if solver == "rtn":
        return MergeSettings(TO, solver="rtn", threads=threads)
    return MergeSettings(TO, calibration_tokens=TOKENS, threads=threads)


def _texts(setup: Setup) -> tuple[Path, Path]:
    """The first 150 instruction tasks to train on, the other 25 to judge with, as files of their own."""
    lines = (setup.data / "chat" / "alpaca_seed_tasks.jsonl").read_text(encoding="utf-8").splitlines()
    files = setup.work / "train.jsonl", setup.work / "judge.jsonl"
    for file, part in zip(files, (lines[:TRAINED], lines[TRAINED:]), strict=True):
        file.write_text("\n".join(part) + "\n", encoding="utf-8")
    return files


def _trained(setup: Setup, model: Path, data: Path) -> Path:
    """An adapter trained on the 4-bit model as `llmlite lora` trains."""
    out = setup.work / "lora"
    if not out.is_dir():
        lora(model, out, LoraSettings(data=(str(data),), steps=STEPS, threads=setup.threads))
    return out


def _measured(setup: Setup, checkpoint: Checkpoint, adapter: Adapter | None, chats: list[Tokens], name: str) -> float:
    return _loss(float32_engine(setup.base, checkpoint, adapter), chats, name)


def _loss(engine: Engine, chats: list[Tokens], name: str) -> float:
    """Nats per token of the answers."""
    total, count = 0.0, 0
    for chat in track(chats, name):
        ids, counts = np.array(chat.ids), torch.tensor(chat.counts)
        for start, logs in engine.log_probs(ids[:-1], 0):
            targets = torch.from_numpy(ids[start + 1 : start + 1 + len(logs)])
            counted = counts[start + 1 : start + 1 + len(logs)]
            total -= float(logs.gather(1, targets[:, None])[counted].sum(dtype=torch.float64))
            count += int(counted.sum())
    return total / count
