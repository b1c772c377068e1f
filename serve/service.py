"""What the endpoints share: the engine with its scheduler, and how a request becomes work for it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import llmlite
from llmlite.serve.engines.base import Engine
from llmlite.serve.errors import ApiError
from llmlite.serve.generation import Work
from llmlite.serve.sampling import Sampling
from llmlite.serve.scheduler import Scheduler
from llmlite.serve.schema import Generating
from llmlite.serve.settings import ServeSettings


class Service:
    """What the endpoints share: the engine, its scheduler and a thread for templates and tokenizing."""

    def __init__(self, engine: Engine, settings: ServeSettings, name: str, manifest: dict[str, Any] | None) -> None:
        self.engine = engine
        self.name = name
        self.manifest = manifest or {}
        self.created = int(time.time())
        self.scheduler = Scheduler(engine, settings.max_queue)
        self._text_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        identity = "\n".join([name, engine.name, engine.version, llmlite.__version__, repr(self.manifest)])
        self.fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]

    async def encode(self, what: str | list[dict[str, str]]) -> list[int]:
        """Token ids of a text or a conversation, off the event loop: a megabyte takes a second."""
        call = self.engine.encode if isinstance(what, str) else self.engine.encode_chat
        return await asyncio.get_running_loop().run_in_executor(self._text_thread, call, what)  # type: ignore[arg-type]

    def check_model(self, name: str) -> None:
        """Raises a 404 for a model that isn't the one served."""
        if name != self.name:
            message = f"the model {name!r} is not served here; this server has {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def model_card(self) -> dict[str, Any]:
        """OpenAI's model object, and under ``llmlite`` what is known of the artifact, its measured cost included."""
        facts = {
            "engine": {"name": self.engine.name, "version": self.engine.version},
            "context": self.engine.context,
            "format": self.manifest.get("format"),
            "base": self.manifest.get("base"),
            "evals": self.manifest.get("evals", {}),
        }
        card = {"id": self.name, "object": "model", "created": self.created, "owned_by": "llmlite"}
        return {**card, "llmlite": facts}

    def works(
        self, request: Generating, prompt: list[int], field: str, limit: int | None, top_logprobs: int | None
    ) -> list[Work]:
        """The ``n`` sequences that a request wants of one prompt, from its field ``field``.

        ``limit``: tokens to generate; None for as many as fit the context. Raises 400 where they don't fit.
        """
        self._check(request, prompt, field, limit)
        work = Work(
            prompt=prompt,
            max_tokens=self.engine.context - len(prompt) if limit is None else limit,
            sampling=_sampling(request),
            seed=request.seed,
            stops=tuple(request.stop),
            top_logprobs=top_logprobs,
        )
        return [replace(work, choice=choice) for choice in range(request.n or 1)]

    def _check(self, request: Generating, prompt: list[int], field: str, limit: int | None) -> None:
        if not prompt:
            raise ApiError(400, f"{field}: there is no token in it", field, "invalid_value")
        wanted = 1 if limit is None else limit
        if len(prompt) + wanted > self.engine.context:
            message = (
                f"this model's context is {self.engine.context} tokens, but {len(prompt) + wanted} were asked for: "
                f"{len(prompt)} in {field} and {'at least ' * (limit is None)}{wanted} to be generated"
            )
            raise ApiError(400, message, field, "context_length_exceeded")
        unknown = [token for token in request.logit_bias if token >= self.engine.vocab_size]
        if unknown:
            message = f"logit_bias: token {unknown[0]} is not in the vocabulary of {self.engine.vocab_size}"
            raise ApiError(400, message, "logit_bias", "invalid_value")


def _sampling(request: Generating) -> Sampling:
    names = {"temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty"}
    return Sampling(**request.model_dump(include=names, exclude_none=True), logit_bias=request.logit_bias)
