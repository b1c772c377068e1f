"""POST /v1/completions."""

from __future__ import annotations

from dataclasses import replace

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from llmlite.serve.answers import CompletionAnswer
from llmlite.serve.documents import STREAM, Completion, answers
from llmlite.serve.engines.base import Engine
from llmlite.serve.errors import ApiError
from llmlite.serve.generation import Work
from llmlite.serve.routes.answering import Using, require_json
from llmlite.serve.schema import CompletionRequest
from llmlite.serve.service import Service

COMPLETION_TOKENS = 16
"""What /v1/completions generates at most where the request doesn't say: the default of OpenAI's API."""

router = APIRouter()


@router.post("/v1/completions", dependencies=[Depends(require_json)], responses=answers(Completion, STREAM))
async def completions(body: CompletionRequest, request: Request) -> Response:
    """OpenAI's text completions, with ``echo`` and prompts of token ids."""
    async with Using(request, body.model) as using:
        service = using.served.service
        works: list[Work] = []
        echoes: list[tuple[str | list[int], list[int]] | None] = []
        scored = bool(body.echo) and body.logprobs is not None
        n = body.n or 1
        for given in body.prompts():
            prompt = await prompt_ids(service, given, "prompt")
            room = max(1, service.engine.context - len(prompt))
            limit = min(COMPLETION_TOKENS, room) if body.max_tokens is None else body.max_tokens
            choices = service.works(body, prompt, "prompt", limit, body.logprobs, using.served.adapter)
            works += [replace(work, score_prompt=scored) for work in choices]
            echoes += [(given, prompt) if body.echo else None] * n
        works = await service.prepared(works, body)
        lengths = [len(work.prompt) for work in works]
        answer = CompletionAnswer(using.served, lengths, n, body.include_usage, body.logprobs is not None, echoes)
        return await using.answer(works, answer, bool(body.stream))


async def prompt_ids(service: Service, prompt: str | list[int], field: str) -> list[int]:
    """Token ids of a prompt, given in ``field``, that may already be ids; raises 400 for ids that are none."""
    if isinstance(prompt, str):
        return await service.encode(prompt)
    check_ids(service.engine, prompt, field)
    return prompt


def check_ids(engine: Engine, tokens: list[int], field: str) -> None:
    """Raises 400 for ids, given in ``field``, that are none."""
    if not all(0 <= token < engine.vocab_size for token in tokens):
        message = f"{field}: token ids must lie between 0 and {engine.vocab_size - 1}"
        raise ApiError(400, message, field, "invalid_value")
