"""How much memory a run will take, told before it: from the config or the GGUF header, no weight is read.

    python -m llmlite.evals.predict ARTIFACT --contexts 512 2048 [--threads N] [--within BYTES]

prints one JSON object. `predict` and `longest` start that process. It measures on itself what no header tells: the
interpreter with its libraries, and what the tokenizer and the model's description take. The rest is counted:

- llama.cpp: loaded with ``no_alloc``, it plans all its buffers and allocates none of them.
- transformers: the tensors as loaded (see `loaded_weights`); cache and activations from the last chunk of the prompt,
  counted on the meta device (see `trace`).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llmlite.errors import LlmliteError
from llmlite.evals.devices import gpu_memory
from llmlite.evals.locate import find
from llmlite.evals.memory import address_space_bytes, resident_bytes
from llmlite.evals.probe import run_module
from llmlite.evals.speed import ANSWER_TOKENS, PROMPT_TOKENS

MOST = 2**20  # positions looked at where a model does not say how many it was trained for
STACK = 8 << 20  # of a thread, most of it never touched


@dataclass(frozen=True)
class Prediction:
    """Bytes of a run on a CPU at one context: a prompt of ``context`` tokens and 64 tokens of an answer.

    ``program``: the interpreter and its libraries, measured before anything is read; ``runtime``: the tokenizer, the
    model's description, what the libraries load on demand, measured; ``weights``: tensors as loaded; ``kv``: the
    cache; ``activations``: what computing takes beside them at most; ``loading``: what loading takes for a while
    beside the weights. ``untouched``: address space that is reserved and never used. On ``device`` "cuda" weights, kv
    and activations are on the card, and the rest is not.
    """

    context: int
    program: int
    runtime: int
    weights: int
    kv: int
    activations: int
    loading: int
    untouched: int
    device: str = "cpu"

    @property
    def peak(self) -> int:
        """The largest resident set that is expected, on "cuda" what the card holds at most."""
        artifact = self.weights + max(self.loading, self.kv + self.activations)
        return artifact if self.device == "cuda" else self.program + self.runtime + artifact


@dataclass(frozen=True)
class Longest:
    """``context``: the longest prompt that is expected to fit, 0 where none is; ``trained``: most positions that the
    model was trained for, None where it does not say."""

    context: int
    trained: int | None


def predict(artifact: Path, contexts: Sequence[int], threads: int | None = None) -> list[Prediction]:
    """In the order of ``contexts``; `InputError` where the artifact can't be loaded."""
    said = run_module(artifact, _command(artifact, contexts, threads))
    return [Prediction(**one) for one in said["predictions"]]


def longest(artifact: Path, budget: int, threads: int | None = None) -> Longest:
    """The longest prompt whose predicted peak is within ``budget`` bytes, with its answer at most as many tokens as
    the model was trained for (2**20 where it does not say)."""
    command = [*_command(artifact, (), threads), "--within", str(budget)]
    return Longest(**run_module(artifact, command)["longest"])


def _command(artifact: Path, contexts: Sequence[int], threads: int | None) -> list[str]:
    command = [sys.executable, "-m", "llmlite.evals.predict", str(artifact)]
    command += ["--contexts", *map(str, contexts)] if contexts else []
    return command + (["--threads", str(threads)] if threads is not None else [])


class Forecaster(Protocol):
    trained: int | None

    def at(self, context: int) -> Prediction: ...


class LlamaForecaster:
    """A GGUF file's header, loaded by llama.cpp without memory for its tensors."""

    def __init__(self, file: Path, threads: int | None):
        from llmlite.evals.llama import Llama, LlamaSettings, library

        api, _ = library()
        self.device = "cpu" if gpu_memory(api) is None else "cuda"
        self.program = resident_bytes()
        settings = LlamaSettings(
            PROMPT_TOKENS, batch=PROMPT_TOKENS, outputs=1, threads=threads, dry=True, windowed=True
        )
        self.llama = Llama(file, settings)
        self.runtime = resident_bytes() - self.program
        stacks = STACK * ((threads or len(os.sched_getaffinity(0))) - 1)
        self.untouched = address_space_bytes() - resident_bytes() + stacks
        self.weights: int = self.llama.api.llama_model_size(self.llama.model)
        self.trained: int | None = self.llama.api.llama_model_n_ctx_train(self.llama.model)

    def at(self, context: int) -> Prediction:
        self.llama.renew(context + ANSWER_TOKENS)
        sizes = self.llama.buffers
        parts = (self.weights, sizes.kv, sizes.compute, 0, self.untouched)
        return Prediction(context, self.program, self.runtime, *parts, device=self.device)


class TransformersForecaster:
    """A safetensors directory's config and tensor headers."""

    def __init__(self, path: Path, threads: int | None):
        import torch
        import transformers  # noqa: F401 (both count as the program)

        from llmlite.checkpoint.checkpoint import meta_model, read_config
        from llmlite.evals import hf, trace

        self.program = resident_bytes()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.trace = trace.trace_prompt
        config = read_config(path)
        with redirect_stdout(sys.stderr):  # gptqmodel prints a banner, and the JSON stands alone on standard output
            for module in hf.EXTRAS.get(hf.require_packages(path), ("", ()))[1]:
                importlib.import_module(module)
        tokenizer = hf.load_tokenizer(path)
        self.model = meta_model(config, str(path)).eval()
        text: Any = self.model.config
        self.trained: int | None = text.get_text_config().to_dict().get("max_position_embeddings")
        self.weights, self.loading, self.unpacked = loaded_weights(path, self.model)
        self.trace(self.model, PROMPT_TOKENS, PROMPT_TOKENS)  # imports what a forward needs
        self.runtime = resident_bytes() - self.program
        self.untouched = address_space_bytes() - resident_bytes()
        del tokenizer

    def at(self, context: int) -> Prediction:
        traced = self.trace(self.model, context, PROMPT_TOKENS)
        answer = self.trace(self.model, context + ANSWER_TOKENS, 1)
        kv = max(traced.kv, answer.kv)
        activations = max(traced.kv + traced.activations, kv + answer.activations) - kv + self.unpacked
        parts = (self.weights, kv, activations, self.loading, self.untouched)
        return Prediction(context, self.program, self.runtime, *parts, device=self.device)


def loaded_weights(path: Path, model: Any) -> tuple[int, int, int]:
    """Bytes: of the tensors as loaded, of what loading takes beside them, of what a forward unpacks at a time.

    ``model``: the unquantized model on the meta device. By ``quant_method`` of config.json: none: the tensors in
    the files, mapped; bitsandbytes: as stored, and the largest linear layer unpacked while it computes;
    compressed-tensors: unpacked as a whole when loaded, the packed ones beside that for a while; gptq: as stored.
    """
    from llmlite.checkpoint.checkpoint import read_config
    from llmlite.checkpoint.safetensors_index import read_index

    index = read_index(path)
    stored = sum(tensor.nbytes for tensor in index.values())
    quantization = read_config(path).get("quantization_config") or {}
    method = quantization.get("quant_method", "")
    inner = [(name, p) for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    largest = max((p.nbytes for _, p in inner), default=0)
    if method == "compressed-tensors":
        plain = {name for name, _ in model.named_parameters()}
        packed = sum(tensor.nbytes for name, tensor in index.items() if name not in plain)
        return sum(p.nbytes for p in model.parameters()), packed, 0
    return stored, 0, largest if method == "bitsandbytes" else 0


def search(forecaster: Forecaster, budget: int) -> int:
    """The longest context within ``budget`` bytes, 0 where even one token is not; the peak grows with the context."""
    low, high = 0, max(1, (forecaster.trained or MOST) - ANSWER_TOKENS)
    while low < high:
        middle = (low + high + 1) // 2
        if forecaster.at(middle).peak <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def main() -> int:
    parser = argparse.ArgumentParser(description="Tell how much memory an artifact will take, as JSON.")
    parser.add_argument("artifact")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--contexts", type=int, nargs="+", default=[])
    parser.add_argument("--within", type=int)
    args = parser.parse_args()
    try:
        location = find(args.artifact)
        kind = LlamaForecaster if location.engine == "llama.cpp" else TransformersForecaster
        forecaster: Forecaster = kind(location.path, args.threads)
        out: dict = {"predictions": [dataclasses.asdict(forecaster.at(context)) for context in args.contexts]}
        if args.within is not None:
            found = Longest(search(forecaster, args.within), forecaster.trained)
            out["longest"] = dataclasses.asdict(found)
        json.dump(out, sys.stdout)
    except LlmliteError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
