"""What the benchmarks of adaptation share: the text that judges, models of float32 weights, adapters in llama.cpp."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.quantization.safetensors_models import Float32Engine
from benchmarks.quantization.texts import evaluation_text, token_rows
from llmlite.checkpoint.checkpoint import Checkpoint
from llmlite.evals.divergence import Compared, compare_rows, divergence
from llmlite.evals.engines import Engine, LlamaCppEngine
from llmlite.evals.llama import Llama, LlamaSettings
from llmlite.evals.perplexity import Places, Window, perplexity
from llmlite.formats.peft import Adapter
from llmlite.progress import track

LENGTH = 512


@dataclass(frozen=True)
class Setup:
    """What the command line said."""

    base: Path
    data: Path
    work: Path
    windows: int
    threads: int
    adapter: Path | None = None

    def rows(self, tokenizer: Any) -> np.ndarray:
        """Rows int64 [windows, 512] of WikiText-2's test part, which nothing here is fitted to."""
        return token_rows(evaluation_text("english", self.data, tokenizer), tokenizer, LENGTH, self.windows)


def float32_engine(base: Path, checkpoint: Checkpoint | None = None, adapter: Adapter | None = None) -> Float32Engine:
    """The base, or ``checkpoint``'s weights in it, in float32, with the adapter's products added."""
    if checkpoint is None and adapter is None:
        return Float32Engine(base, {})
    assert checkpoint is not None
    pairs = {} if adapter is None else adapter.pairs
    weights = {}
    for name in checkpoint.tensors:
        pair = pairs.get(name.removesuffix(".weight"))
        weight = checkpoint.read(name)
        weights[name] = weight.float() if pair is None else pair.applied(weight)
    return Float32Engine(base, weights)


def llama_engine(file: Path, lora: Path | None, threads: int) -> LlamaCppEngine:
    """A GGUF file with an adapter on it."""
    engine = LlamaCppEngine(file, threads=threads, context=LENGTH)
    if lora is not None:
        engine.llama.use_lora(lora)
    return engine


def apart(reference: Engine, engine: Engine, rows: np.ndarray, name: str) -> dict[str, float]:
    """How far ``engine`` is from ``reference`` on the second half of each row: KL in nats, share of the same token."""
    windows = [Window(row, number * len(row), len(row) // 2) for number, row in enumerate(rows)]
    chunks = []
    for window in track(windows, name, len(windows)):
        inputs = window.tokens[:-1]
        both = zip(reference.log_probs(inputs, window.first), engine.log_probs(inputs, window.first), strict=True)
        for (start, theirs), (_, mine) in both:
            targets = torch.from_numpy(window.tokens[start + 1 : start + 1 + len(mine)])
            chunks.append(compare_rows(theirs, mine, targets, reference.vocab_size))
    compared, places = Compared.joined(chunks), Places.of(windows)
    found = divergence(compared, places, reference.vocab_size)
    value = perplexity(-compared.own.astype(np.float64), places).value
    return {"mean_kl": found.mean_kl, "same_top": found.same_top, "perplexity": value}


def tokens_per_second(file: Path, lora: Path, threads: int, rounds: int = 7) -> dict[str, float]:
    """Prompt (512 tokens) and generated (64) tokens per second without and with an adapter, in turns: medians."""
    engines = {}
    for name, adapter in (("plain", None), ("adapted", lora)):
        engines[name] = Llama(file, LlamaSettings(LENGTH + 64, threads=threads))
        if adapter is not None:
            engines[name].use_lora(adapter)
    prompt = np.arange(LENGTH) % engines["plain"].known_tokens()
    spent: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        for name, llama in engines.items():
            llama.clear()
            started = time.perf_counter()
            llama.decode(prompt, 0, np.arange(LENGTH) == LENGTH - 1)
            middle = time.perf_counter()
            for step in range(64):
                llama.decode(prompt[step : step + 1], LENGTH + step, np.ones(1, bool))
            if turn:  # the first one warms up
                spent.setdefault(f"{name}_prompt", []).append(LENGTH / (middle - started))
                spent.setdefault(f"{name}_generate", []).append(64 / (time.perf_counter() - middle))
    for llama in engines.values():
        llama.close()
    return {name: median(values) for name, values in spent.items()}
