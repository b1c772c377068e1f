"""What every tool gets: the texts and the calibration as token rows, the base as f32 GGUF, the base's predictions."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quantization.logits import write_logits
from benchmarks.quantization.pieces import digest, piece, run
from benchmarks.quantization.texts import EXCERPT, SHARES, TEXTS, calibration_text, evaluation_text, token_rows
from llmlite.evals.hf import prefix_token
from llmlite.evals.llama import Llama, LlamaSettings


@dataclass(frozen=True)
class Setup:
    """``base``: a checkpoint; ``data``: the folder of the texts; ``work``: where everything is kept; ``tools``: the
    directory of llama.cpp's programs; ``rows``: windows of ``length`` tokens scored of each text; ``tokens``: of the
    calibration; ``environments``: where the peers' virtual environments are, or are to be built."""

    base: Path
    data: Path
    work: Path
    tools: Path
    environments: Path
    rows: int = 48
    threads: int = 2
    length: int = 512
    tokens: int = 65536

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.base, trust_remote_code=False)

    @cached_property
    def origin(self) -> dict:
        """What everything depends on."""
        return {"base": digest(self.base), "python": platform.python_version()}

    # the pieces, each made where it is not there yet

    def text_rows(self, name: str) -> Path:
        """int64 [rows, length] of one of `TEXTS`, as .npy."""

        def make(out: Path) -> None:
            rows = token_rows(evaluation_text(name, self.data, self.tokenizer), self.tokenizer, self.length, self.rows)
            _save(out, rows)

        settings = {**self.origin, "text": name, "rows": self.rows, "length": self.length, "excerpt": EXCERPT}
        return piece(self.work / "texts" / f"{name}-{self.rows}.npy", settings, make)

    def calibration(self) -> Path:
        """The calibration text; beside it, as ``calibration.npy``, its rows int64 [tokens / length, length]."""
        text = piece(self.work / "calibration.txt", self._calibration_settings(), self._write_calibration)
        self.calibration_rows()
        return text

    def calibration_rows(self) -> Path:
        def make(out: Path) -> None:
            text = (self.work / "calibration.txt").read_text(encoding="utf-8")
            _save(out, token_rows(text, self.tokenizer, self.length, self.tokens // self.length))

        return piece(self.work / "calibration.npy", self._calibration_settings(), make)

    def gguf(self) -> Path:
        """The base in f32."""

        def make(out: Path) -> None:
            llmlite = [sys.executable, "-m", "llmlite.cli", "quantize", str(self.base), "--to", "gguf:f32"]
            run([*llmlite, "-o", str(out)])

        return piece(self.work / "base-f32", self.origin, make) / "model.gguf"

    def logits(self, name: str) -> Path:
        """The base's log-probabilities on one of `TEXTS`, for llama-perplexity."""
        rows, model = self.text_rows(name), self.gguf()

        def make(out: Path) -> None:
            write_logits(out, model, np.load(rows), self.threads)

        settings = {"model": digest(model), "rows": digest(rows)}
        return piece(self.work / "logits" / f"{name}-{self.rows}.logits", settings, make)

    def _calibration_settings(self) -> dict:
        return {**self.origin, "tokens": self.tokens, "length": self.length, "shares": SHARES, "excerpt": EXCERPT}

    def _write_calibration(self, out: Path) -> None:
        # llama.cpp's tools drop a line feed at the end of a file: these are beyond the last row.
        text = calibration_text(self.data, self.tokenizer, self.tokens)
        out.write_text(f"{text}\n\n\n", encoding="utf-8", newline="")


def prepare(setup: Setup) -> None:
    """Make all of it, and say how far llama.cpp's tokens of the calibration are from the rows'."""
    for name in TEXTS:
        print(f"{name}: {np.load(setup.text_rows(name)).size:,} tokens")
    text, rows = setup.calibration(), np.load(setup.calibration_rows())
    differ = np.count_nonzero(_llama_rows(setup, text, rows) != rows)
    print(f"calibration: {rows.size:,} tokens, {differ:,} of them differ in llama.cpp's reading of {text.name}")
    for name in TEXTS:
        print(setup.logits(name))


def _llama_rows(setup: Setup, text: Path, rows: np.ndarray) -> np.ndarray:
    """The calibration as llama-imatrix --parse-special reads it, in the shape of ``rows``; -1 where it ends early."""
    llama = Llama(setup.gguf(), LlamaSettings(setup.length))
    try:
        ids = llama.tokenize(text.read_text(encoding="utf-8"), special=True)
        if llama.bos is not None:
            ids = np.concatenate([[llama.bos], ids])
        if llama.bos != prefix_token(setup.tokenizer):
            raise SystemExit("the GGUF file and the tokenizer disagree on the token in front of a text")
    finally:
        llama.close()
    flat = np.full(rows.size, -1, dtype=np.int64)
    flat[: len(ids)] = ids[: rows.size]
    out = flat.reshape(rows.shape)
    if llama.bos is not None:
        out[:, 0] = llama.bos
    return out


def _save(path: Path, rows: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, rows)
