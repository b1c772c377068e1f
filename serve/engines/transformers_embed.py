"""Embeddings by transformers: the last layer's hidden states, as the head would get them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import DynamicCache

from llmlite.errors import InputError
from llmlite.serve.engines.adapters import Adapters
from llmlite.serve.engines.pooling import CHUNK, Pool, Pooling

POOLING_FILE = Path("1_Pooling") / "config.json"
POOLING: dict[str, Pooling] = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}


class TransformersEmbedder:
    """Runs the model without its head, one text at a time. Used on the engine thread alone."""

    def __init__(self, model: Any, config: Any, path: Path, adapters: Adapters) -> None:
        self._model = model.base_model
        self._adapters = adapters
        self._config = config
        self._pooling = read_pooling(path)
        self.width: int = config.hidden_size

    def embed(self, prompts: list[list[int]]) -> Iterator[np.ndarray | None]:
        """See `Engine.embed`."""
        rows = []
        for prompt in prompts:
            pool = Pool(self._pooling, self.width)
            cache = DynamicCache(config=self._config)
            for begin in range(0, len(prompt), CHUNK):
                pool.take(self._states(prompt[begin : begin + CHUNK], cache))
                yield None
            rows.append(pool.vector())
        yield np.stack(rows)

    @torch.inference_mode()
    def _states(self, tokens: list[int], cache: DynamicCache) -> np.ndarray:
        self._adapters.use(None)
        ids = torch.tensor([tokens], device=self._model.device)
        out = self._model(input_ids=ids, past_key_values=cache, use_cache=True)
        return out.last_hidden_state[0].float().cpu().numpy()


def read_pooling(path: Path) -> Pooling:
    """What the checkpoint's sentence-transformers configuration says, the mean without one."""
    file = path / POOLING_FILE
    if not file.is_file():
        return "mean"
    try:
        config = json.loads(file.read_text())
        modes = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    except (ValueError, AttributeError, OSError) as error:
        raise InputError(f"{file}: can't be read as a pooling configuration ({error})") from None
    if len(modes) != 1 or modes[0] not in POOLING:
        raise InputError(f"{file}: asks for pooling {', '.join(modes) or 'of no kind'}; mean, cls and last are served")
    return POOLING[modes[0]]
