"""One way to ask a model what it predicts, whichever program computes it: transformers or llama.cpp."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from llmlite.checkpoint.safetensors_index import read_index
from llmlite.errors import InputError
from llmlite.evals.hf import load_transformers, prefix_token
from llmlite.evals.llama import Llama, LlamaSettings, library
from llmlite.evals.locate import find
from llmlite.evals.rows import log_softmax

ROWS = 64  # positions of one chunk: at a vocabulary of 262,144 a chunk of float32 takes 67 MB
LOGITS_BYTES = 256 << 20  # most bytes of logits that llama.cpp holds for one decode


class Engine(Protocol):
    """What an evaluation needs of a loaded model.

    ``name`` and ``version`` say what computes; ``vocab_size`` is the width of its predictions and
    ``known_tokens`` how many of them its tokenizer can name (the rest is padding); ``bos`` is the token that its
    tokenizer puts in front of a text, None where it puts none.
    """

    name: str
    version: str
    vocab_size: int
    known_tokens: int
    bos: int | None

    def tokenize(self, text: str) -> np.ndarray:
        """Token ids int64 [n]; nothing is added, and names of control tokens in the text stay plain text."""
        ...

    def decode(self, tokens: np.ndarray) -> str:
        """The text of token ids int [n], control tokens by name; bytes that are no whole character become U+FFFD."""
        ...

    def log_probs(self, tokens: np.ndarray, first: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Log-probabilities of the token after each position first..n-1 of ``tokens`` int [n], from an empty cache.

        Yields (start, float32 [rows, vocab]) with starts first, first + ROWS, ...: the same chunks in every engine.
        """
        ...

    def close(self) -> None: ...


def open_engine(artifact: str | Path, *, threads: int | None = None, context: int | None = None) -> Engine:
    """Load a safetensors directory, a GGUF file, a directory with one, or a hub id.

    ``context``: the longest run of tokens that log_probs will get (llama.cpp sets memory aside for it; 2,048
    unless given). Raises `InputError` when there is nothing that can be loaded.
    """
    location = find(artifact)
    if location.engine == "llama.cpp":
        return LlamaCppEngine(location.path, threads=threads, context=context)
    return TransformersEngine(location.path, threads=threads)


def engine_version(name: str) -> str:
    """What computes, with its version number, as the evaluation's JSON says it."""
    if name == "llama.cpp":
        return f"llama-cpp-python {library()[0].__version__}"
    import transformers

    return f"transformers {transformers.__version__}"


class Head:
    """The way from final hidden states to log-probabilities: a product, then a soft cap where there is one.

    ``module`` gives logits [n, vocab] of hidden states [n, width].
    """

    def __init__(self, module: Callable[[torch.Tensor], torch.Tensor], softcap: float | None):
        self.module, self.softcap = module, softcap

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32 [rows, vocab]: the head of a few positions, never of a whole window."""
        logits = self.module(hidden).float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    @torch.inference_mode()
    def log_probs(self, hidden: torch.Tensor, first: int) -> Iterator[tuple[int, torch.Tensor]]:
        """As `Engine.log_probs`, from the hidden states [n - first, width] of positions first..n-1."""
        for start in range(0, len(hidden), ROWS):
            yield first + start, log_softmax(self.logits(hidden[start : start + ROWS]))


def softcap_of(config: dict) -> float | None:
    """The soft cap on the logits that a config.json asks for."""
    return config.get("final_logit_softcapping")


class TransformersEngine:
    """Any causal language model that transformers loads; on the GPU where there is one."""

    name = "transformers"

    def __init__(self, path: Path, threads: int | None = None):
        self.version = engine_version(self.name)
        self.path = path
        self.model, self.tokenizer = load_transformers(path, threads)
        config = self.model.config.get_text_config()
        self.head = Head(self.model.get_output_embeddings(), softcap_of(config.to_dict()))
        self.vocab_size: int = config.vocab_size
        self.known_tokens = len(self.tokenizer)
        self.bos = prefix_token(self.tokenizer)
        self._check_head()

    def tokenize(self, text: str) -> np.ndarray:
        return token_ids(self.tokenizer, text)

    def decode(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)

    def log_probs(self, tokens: np.ndarray, first: int) -> Iterator[tuple[int, torch.Tensor]]:
        return self.head.log_probs(self.hidden(tokens, first), first)

    @torch.inference_mode()
    def hidden(self, tokens: np.ndarray, first: int) -> torch.Tensor:
        """What the head takes in at positions first..n-1 of ``tokens`` int [n]: [n - first, width], model's dtype."""
        ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None].to(self.model.device)
        return self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, first:]

    def head_tensor(self) -> str | None:
        """The stored tensor that the head multiplies with, by name; None where the head is more, or packed."""
        module: Any = self.head.module
        if type(module) is not torch.nn.Linear:
            return None
        stored = read_index(self.path)
        for name, parameter in self.model.named_parameters():  # a tied head comes up as the embedding
            if name in stored and parameter is module.weight and module.bias is None:
                return name if stored[name].shape == tuple(parameter.shape) else None
        return None

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Refuse an architecture that does something to its logits which the chunked head does not do."""
        tokens = np.arange(8) % self.vocab_size
        ids = torch.from_numpy(tokens)[None].to(self.model.device)
        own = self.model(input_ids=ids, use_cache=False).logits[0].float()
        chunked = self.head.logits(self.hidden(tokens, 0))
        finite = bool(torch.isfinite(own).all())  # what is not shows in the scores, and has another reason
        if finite and not torch.allclose(own, chunked, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
            kind = self.model.config.model_type
            raise InputError(
                f"{self.path}: the output head of {kind!r} is more than a product and a soft cap: unknown here"
            )

    def close(self) -> None:
        del self.model, self.head


def token_ids(tokenizer: Any, text: str) -> np.ndarray:
    """Ids int64 [n] of a transformers tokenizer, as `Engine.tokenize` says."""
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False).input_ids
    return np.asarray(ids, dtype=np.int64)


class LlamaCppEngine:
    """A GGUF file, computed by llama.cpp."""

    name = "llama.cpp"

    def __init__(self, file: Path, threads: int | None = None, context: int | None = None):
        self.longest = context or 2048
        self.llama = Llama(file, LlamaSettings(self.longest, batch=min(512, self.longest), threads=threads))
        self.version = engine_version(self.name)
        self.vocab_size = self.llama.vocab_size
        self.known_tokens = self.llama.known_tokens()
        self.bos = self.llama.bos
        rows = LOGITS_BYTES // (4 * self.vocab_size) // ROWS * ROWS
        self.step = min(512, max(ROWS, rows))

    def tokenize(self, text: str) -> np.ndarray:
        return self.llama.tokenize(text).astype(np.int64)

    def decode(self, tokens: np.ndarray) -> str:
        return self.llama.text_of(tokens)

    def log_probs(self, tokens: np.ndarray, first: int) -> Iterator[tuple[int, torch.Tensor]]:
        if len(tokens) > self.longest:
            raise ValueError(f"{len(tokens)} tokens in a context of {self.longest}")
        self.llama.clear()
        for start, stop in _batches(len(tokens), first, self.step):
            wanted = np.arange(start, stop) >= first
            logits = torch.from_numpy(self.llama.decode(tokens[start:stop], start, wanted))
            position = max(start, first)
            for row in range(0, len(logits), ROWS):
                yield position + row, log_softmax(logits[row : row + ROWS])

    def close(self) -> None:
        self.llama.close()


def _batches(length: int, first: int, step: int) -> Iterator[tuple[int, int]]:
    """Cut 0..length into runs of at most ``step``, those beyond ``first`` so that they end where a chunk ends."""
    start = 0
    while start < length:
        stop = min(start + step, length)
        if first < stop < length:
            stop -= (stop - first) % ROWS
        yield start, stop
        start = stop
