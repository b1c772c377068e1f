"""POST /v1/chat/completions."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from llmlite.serve.answers import ChatAnswer
from llmlite.serve.engines.base import ChatTemplateError
from llmlite.serve.errors import ApiError
from llmlite.serve.routes.answering import Using, require_json
from llmlite.serve.schema import ChatRequest
from llmlite.serve.shape import calling_of

router = APIRouter()


@router.post("/v1/chat/completions", dependencies=[Depends(require_json)])
async def chat(body: ChatRequest, request: Request) -> Response:
    """OpenAI's chat completions."""
    async with Using(request, body.model) as using:
        service = using.served.service
        calling = calling_of(body, service.call_format)
        try:
            prompt = await service.encode_chat([message.plain() for message in body.messages], calling)
        except ChatTemplateError as error:
            raise ApiError(400, str(error), "messages", "chat_template") from None
        limit = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        top = (body.top_logprobs or 0) if body.logprobs else None
        works = service.works(body, prompt, "messages", limit, top, using.served.adapter)
        works = await service.constrained(works, body, calling)
        lengths = [len(prompt)] * len(works)
        answer = ChatAnswer(using.served, lengths, body.include_usage, top is not None, calling)
        return await using.answer(works, answer, bool(body.stream))
