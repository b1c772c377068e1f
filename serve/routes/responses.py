"""POST /v1/responses. Nothing is stored, so there is nothing to get or delete."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from llmlite.serve.documents import STREAM, ErrorBody, ResponseObject, answers
from llmlite.serve.errors import ApiError
from llmlite.serve.responses_answer import ResponseRetelling
from llmlite.serve.responses_schema import ResponsesRequest
from llmlite.serve.routes.answering import Using, require_json
from llmlite.serve.routes.chat import prepare

router = APIRouter()

NONE = {"description": "No response is stored", "model": ErrorBody}


@router.post("/v1/responses", dependencies=[Depends(require_json)], responses=answers(ResponseObject, STREAM))
async def responses(body: ResponsesRequest, request: Request) -> Response:
    """OpenAI's responses, without storage: each request brings its whole conversation."""
    asked = body.as_chat()
    async with Using(request, body.model) as using:
        works, answer = await prepare(using, asked, "input")
        return await using.answer(works, answer, bool(body.stream), ResponseRetelling(body))


@router.get("/v1/responses/{response}", status_code=404, responses={404: NONE, "4XX": NONE})
@router.delete("/v1/responses/{response}", status_code=404, responses={404: NONE, "4XX": NONE})
async def stored(response: str) -> Response:
    """Always 404: this server stores no responses."""
    message = f"there is no response {response!r}: this server stores none, send the conversation with each request"
    raise ApiError(404, message, "response_id", "not_stored")
