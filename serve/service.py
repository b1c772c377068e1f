"""What the endpoints share: the engine with its scheduler, and how a request becomes work for it."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

import llmlite
from llmlite.errors import InputError
from llmlite.serve.constraint import Constraint
from llmlite.serve.engines import Opened
from llmlite.serve.engines.base import ChatTemplateError
from llmlite.serve.errors import ApiError, as_api_error
from llmlite.serve.generation import Work
from llmlite.serve.repeats import Breakers, BreakerTable, Dry, Repeats
from llmlite.serve.sampling import Sampling
from llmlite.serve.scheduler import EngineDead, QueueFull, Scheduler, SchedulerSettings, ShuttingDown
from llmlite.serve.schema import Generating
from llmlite.serve.settings import ServeSettings
from llmlite.serve.shape import grammar_of
from llmlite.serve.structured.compiler import Compiler, CompilerClosed
from llmlite.serve.structured.grammar import Grammar
from llmlite.serve.structured.schema import InvalidGrammar
from llmlite.serve.tools.calling import Calling
from llmlite.serve.tools.formats import format_of
from llmlite.serve.tools.grammar import arguments_grammar
from llmlite.serve.tools.prompt import conversation, without_system

if TYPE_CHECKING:
    from llmlite.serve.models import ModelSpec

T = TypeVar("T")
log = logging.getLogger("llmlite.serve")

DRY_BREAKERS = ("\n", ":", '"', "*")
"""Where a run ends for DRY unless the request says otherwise: llama-server's default."""


class Service:
    """What the endpoints share: the engine, its scheduler and a thread for templates and tokenizing."""

    def __init__(self, opened: Opened, settings: ServeSettings, spec: ModelSpec) -> None:
        self.engine = opened.engine
        self.name = spec.name
        self.manifest = opened.manifest or {}
        self.scheduler = Scheduler(
            self.engine,
            SchedulerSettings(
                max_queue=settings.max_queue,
                exact=settings.exact,
                lookup=settings.draft == "lookup",
                timeout=settings.request_timeout,
            ),
            opened.draft,
        )
        self._draft = opened.draft
        self._drafting = settings.draft
        self._max_queue = settings.max_queue
        self._embedding = asyncio.Lock()
        self._embeddings = 0  # texts that are embedded or wait for it
        self._text_thread = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        engine = self.engine
        self.call_format = format_of(engine.tool_template)
        self._breakers = BreakerTable(engine.vocab_size, engine.token_bytes, self._encode_plain)
        self._compiler = Compiler(engine, self.call_format.markers)
        identity = "\n".join([spec.name, engine.name, engine.version, llmlite.__version__, repr(self.manifest)])
        self.fingerprint = "fp_" + hashlib.sha256(identity.encode()).hexdigest()[:12]

    def stop(self) -> None:
        """End the engine thread: whoever waits for it is told. Blocks."""
        self.scheduler.stop()

    def stop_reading(self) -> None:
        """Refuse texts and grammars from now on, and finish those that are being read. Blocks."""
        self._text_thread.shutdown()
        self._compiler.close()

    def close(self) -> None:
        """Free the model, after `stop` and `stop_reading`. Blocks."""
        self.engine.close_model()
        if self._draft is not None:
            self._draft.close()

    async def encode(self, text: str) -> list[int]:
        """Token ids of a text, off the event loop: a megabyte takes a second."""
        return await self._read(self.engine.encode, text)

    async def _read(self, function: Callable[..., T], *given: Any) -> T:
        """What a function returned on the thread for texts. Raises 503 where the model is being closed."""
        try:
            reading = asyncio.get_running_loop().run_in_executor(self._text_thread, function, *given)
        except RuntimeError:  # the thread takes no more
            raise self._closing() from None
        return await reading

    def _closing(self) -> ApiError:
        return as_api_error(EngineDead() if self.scheduler.dead else ShuttingDown())

    def _encode_plain(self, text: str) -> list[int]:
        return self.engine.encode(text)[len(self.engine.encode("")) :]

    async def encode_chat(self, messages: list[dict[str, Any]], calling: Calling | None = None) -> list[int]:
        """Token ids of a conversation in which the model is told of its tools. Raises `ChatTemplateError`."""
        return await self._read(self._encode_chat, messages, calling)

    def _encode_chat(self, messages: list[dict[str, Any]], calling: Calling | None) -> list[int]:
        told = conversation(messages, self.call_format, calling)
        if self.call_format.native:
            return self.engine.encode_chat(told, None if calling is None else calling.tools())
        try:
            return self.engine.encode_chat(told)
        except ChatTemplateError:
            if calling is None:
                raise
            return self.engine.encode_chat(without_system(told))

    async def prepared(self, works: list[Work], request: Generating, calling: Calling | None = None) -> list[Work]:
        """``works`` with what takes time: sequence breakers, and the form that the request wants of its answer.

        Raises 400 for a form that can't be held to.
        """
        if request.dry_multiplier:
            breakers = DRY_BREAKERS if request.dry_sequence_breakers is None else request.dry_sequence_breakers
            found = await self._read(self._breakers.breakers, breakers)
            works = [replace(work, sampling=_with_breakers(work.sampling, found)) for work in works]
        try:
            grammar = grammar_of(request, calling)
            if grammar is None:
                return works
            constraint = await self._compile(grammar, calling)
        except CompilerClosed:
            raise self._closing() from None
        except InvalidGrammar as error:
            raise ApiError(400, str(error), error.field, "invalid_value") from None
        return [replace(work, constraint=constraint, shown=self._compiler.shown) for work in works]

    async def _compile(self, grammar: Grammar, calling: Calling | None) -> Callable[[], Constraint]:
        try:
            return await self._compiler.compile(grammar)
        except InvalidGrammar:
            for function in () if calling is None else calling.functions:  # which of them was it?
                await self._compiler.compile(arguments_grammar(function))
            raise

    async def embed(self, prompt: list[int], gone: Callable[[], Awaitable[bool]]) -> np.ndarray:
        """The vector of one text, float32 [width] of length 1. Other work has its turn between two pieces of it.

        One text at a time; as many requests may wait for that as sequences may. ``gone``: whether the client hung up.
        Raises `ApiError`.
        """
        if self._embeddings > self._max_queue:
            raise as_api_error(QueueFull(1))
        self._embeddings += 1
        try:
            async with self._embedding:
                pieces = await self._called(lambda: self.engine.embed([prompt]))
                while (found := await self._called(lambda: next(pieces))) is None:
                    if await gone():
                        raise ApiError(499, "the client hung up")
                return found[0]
        finally:
            self._embeddings -= 1

    async def _called(self, function: Callable[[], T]) -> T:
        """What a function returned on the engine thread."""
        try:
            return await asyncio.wrap_future(self.scheduler.call(function))
        except InputError as refused:
            raise ApiError(400, str(refused), "model", "unsupported_parameter") from None
        except (EngineDead, ShuttingDown) as error:
            raise as_api_error(error) from None
        except Exception as error:  # whatever the engine did, the client is told that it was not its fault
            log.error("embedding failed", exc_info=error)
            raise as_api_error(error) from error

    def facts(self) -> dict[str, Any]:
        """What is known of the artifact: its engine, context, format, base and measured cost."""
        return {
            "engine": {"name": self.engine.name, "version": self.engine.version},
            "context": self.engine.context,
            "draft": self._draft_facts(),
            "format": self.manifest.get("format"),
            "base": self.manifest.get("base"),
            "evals": self.manifest.get("evals", {}),
        }

    def _draft_facts(self) -> dict[str, Any] | None:
        if self._drafting == "off":
            return None
        stats = self.scheduler.stats
        rate = round(stats.accepted_tokens / stats.drafted_tokens, 4) if stats.drafted_tokens else None
        return {"by": "lookup" if self._draft is None else "model", "acceptance": rate}

    def works(
        self,
        request: Generating,
        prompt: list[int],
        field: str,
        limit: int | None,
        top_logprobs: int | None,
        adapter: str | None,
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
            adapter=adapter,
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
    """The request's sampling; sequence breakers, which take time, are put in by `Service.prepared`."""
    names = {"temperature", "top_p", "top_k", "min_p", "typical_p", "frequency_penalty", "presence_penalty"}
    given = request.model_dump(include=names, exclude_none=True)
    return Sampling(**given, repeats=_repeats(request), logit_bias=request.logit_bias)


def _repeats(request: Generating) -> Repeats:
    dry = None
    if request.dry_multiplier:
        given = {
            "base": request.dry_base,
            "allowed_length": request.dry_allowed_length,
            "last_n": request.dry_penalty_last_n,
        }
        dry = Dry(request.dry_multiplier, **{name: value for name, value in given.items() if value is not None})
    last_n = -1 if request.repeat_last_n is None else request.repeat_last_n
    return Repeats(request.repetition_penalty or 1.0, last_n, dry)


def _with_breakers(sampling: Sampling, breakers: Breakers) -> Sampling:
    assert sampling.repeats.dry is not None
    dry = replace(sampling.repeats.dry, breakers=breakers)
    return replace(sampling, repeats=replace(sampling.repeats, dry=dry))
