"""Measure memory and speed in a process that holds one artifact and nothing else.

    python -m llmlite.evals.probe ARTIFACT [--threads N]

prints one JSON object. `probe` starts that process and reads what it says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from llmlite.errors import InputError, LlmliteError, OutsideError
from llmlite.evals.locate import find
from llmlite.evals.memory import Memory, resident_bytes
from llmlite.evals.speed import ANSWER_TOKENS, PROMPT_TOKENS, REPEATS, Speed, measure_speed


def probe(artifact: Path, threads: int | None = None, repeats: int = REPEATS) -> tuple[Memory, Speed]:
    """Memory and speed of an artifact, measured in a fresh process.

    Raises what the process ended with: `InputError` where the artifact can't be loaded, `OutsideError` where the
    process was killed, as the kernel does when memory runs out.
    """
    command = [sys.executable, "-m", "llmlite.evals.probe", str(artifact), "--repeats", str(repeats)]
    if threads is not None:
        command += ["--threads", str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == InputError.exit_status:
        raise InputError(_last_line(done.stderr))
    if done.returncode < 0:
        raise OutsideError(f"{artifact}: the measuring process was killed by signal {-done.returncode}: out of memory?")
    if done.returncode != 0:
        raise OutsideError(f"{artifact}: the measuring process failed ({_last_line(done.stderr)})")
    said = json.loads(done.stdout)
    return Memory(**said["memory"]), Speed(**said["speed"])


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


class LlamaRunner:
    """llama.cpp, set up as a server would: logits of one position only."""

    def __init__(self, file: Path, threads: int | None):
        from llmlite.evals.llama import Llama, LlamaSettings, library

        library()
        self.program = resident_bytes()
        settings = LlamaSettings(context=PROMPT_TOKENS + ANSWER_TOKENS, outputs=1, threads=threads, mmap=False)
        self.llama = Llama(file, settings)
        self.vocab_size = self.llama.vocab_size
        self.length = 0

    def prompt(self, tokens: np.ndarray) -> int:
        self.llama.clear()
        self.length = 0
        return self._read(tokens)

    def step(self, token: int) -> int:
        return self._read(np.array([token]))

    def _read(self, tokens: np.ndarray) -> int:
        wanted = np.zeros(len(tokens), np.int8)
        wanted[-1] = 1
        logits = self.llama.decode(tokens, self.length, wanted)
        self.length += len(tokens)
        return int(logits[0].argmax())

    def memory(self) -> Memory:
        weights = self.llama.api.llama_model_size(self.llama.model)
        return Memory(weights, self.llama.kv_bytes_per_token(), resident_bytes(peak=True), self.program, "cpu")


class TransformersRunner:
    """transformers, greedy by hand with its own cache."""

    def __init__(self, path: Path, threads: int | None):
        import torch
        import transformers  # noqa: F401 (counts as the program)

        from llmlite.evals.hf import load_transformers

        self.torch = torch
        self.program = 0 if torch.cuda.is_available() else resident_bytes()
        self.model, _ = load_transformers(path, threads)
        self.vocab_size = self.model.config.get_text_config().vocab_size
        self.cache = None

    def prompt(self, tokens: np.ndarray) -> int:
        self.cache = None
        return self._read(tokens)

    def step(self, token: int) -> int:
        return self._read(np.array([token]))

    def _read(self, tokens: np.ndarray) -> int:
        with self.torch.inference_mode():
            ids = self.torch.from_numpy(tokens)[None].to(self.model.device)
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        return int(out.logits[0, -1].argmax())

    def memory(self) -> Memory:
        from llmlite.evals.hf import kv_bytes_per_token

        tensors = [*self.model.parameters(), *self.model.buffers()]
        weights = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
        on_gpu = self.model.device.type == "cuda"
        peak = self.torch.cuda.max_memory_allocated() if on_gpu else resident_bytes(peak=True)
        return Memory(weights, kv_bytes_per_token(self.model), peak, self.program, self.model.device.type)


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the memory and speed of one artifact, as JSON.")
    parser.add_argument("artifact")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    args = parser.parse_args()
    try:
        location = find(args.artifact)
        runner = (LlamaRunner if location.engine == "llama.cpp" else TransformersRunner)(location.path, args.threads)
        speed = measure_speed(runner, args.repeats)
        json.dump({"memory": dataclasses.asdict(runner.memory()), "speed": dataclasses.asdict(speed)}, sys.stdout)
    except LlmliteError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
