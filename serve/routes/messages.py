"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic has them; errors there have Anthropic's shape."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from llmlite.serve.documents import STREAM, AnthropicErrorBody, MessageObject, TokenCount, answers
from llmlite.serve.messages_answer import MessageRetelling
from llmlite.serve.messages_schema import CountRequest, MessagesRequest
from llmlite.serve.routes.answering import Using, require_json
from llmlite.serve.routes.chat import prepare, prompt_of

router = APIRouter()

MESSAGE = answers(MessageObject, STREAM, AnthropicErrorBody)
COUNT = answers(TokenCount, error=AnthropicErrorBody)


@router.post(
    "/v1/messages", dependencies=[Depends(require_json)], responses=answers(MessageObject, STREAM, AnthropicErrorBody)
)
async def messages(body: MessagesRequest, request: Request) -> Response:
    """Anthropic's messages."""
    asked = body.as_chat()
    async with Using(request, body.model) as using:
        works, answer = await prepare(using, asked, "messages")
        return await using.answer(works, answer, bool(body.stream), MessageRetelling(body))


@router.post(
    "/v1/messages/count_tokens",
    dependencies=[Depends(require_json)],
    responses=answers(TokenCount, error=AnthropicErrorBody),
)
async def count_tokens(body: CountRequest, request: Request) -> Response:
    """How many tokens a message's prompt has, tools and system prompt included."""
    asked = body.as_chat()
    async with Using(request, body.model) as using:
        return JSONResponse({"input_tokens": len(await prompt_of(using, asked, "messages"))})
