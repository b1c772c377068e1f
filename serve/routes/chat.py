"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from llmlite.serve.answers import ChatAnswer
from llmlite.serve.documents import STREAM, ChatCompletion, answers
from llmlite.serve.engines.base import ChatTemplateError
from llmlite.serve.errors import ApiError
from llmlite.serve.generation import Work
from llmlite.serve.routes.answering import Using, require_json
from llmlite.serve.schema import ChatRequest
from llmlite.serve.shape import calling_of

router = APIRouter()


@router.post("/v1/chat/completions", dependencies=[Depends(require_json)], responses=answers(ChatCompletion, STREAM))
async def chat(body: ChatRequest, request: Request) -> Response:
    """OpenAI's chat completions."""
    async with Using(request, body.model) as using:
        works, answer = await prepare(using, body, "messages")
        return await using.answer(works, answer, bool(body.stream))


async def prepare(using: Using, body: ChatRequest, field: str) -> tuple[list[Work], ChatAnswer]:
    """A conversation as work for the engine, and what makes the answer of it. ``field``: where its messages came from.

    Every endpoint that answers a conversation goes through here. Raises 400 for what can't be answered.
    """
    service = using.served.service
    prompt = await prompt_of(using, body, field)
    limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    top = (body.top_logprobs or 0) if body.logprobs else None
    works = service.works(body, prompt, field, limit, top, using.served.adapter)
    calling = calling_of(body, service.call_format)
    works = await service.prepared(works, body, calling)
    return works, ChatAnswer(using.served, [len(prompt)] * len(works), body.include_usage, top is not None, calling)


async def prompt_of(using: Using, body: ChatRequest, field: str) -> list[int]:
    """Token ids of a conversation by the model's template; raises 400 with the template's words where it refuses."""
    service = using.served.service
    try:
        messages = [message.plain() for message in body.messages]
        return await service.encode_chat(messages, calling_of(body, service.call_format))
    except ChatTemplateError as error:
        raise ApiError(400, str(error), field, "chat_template") from None
