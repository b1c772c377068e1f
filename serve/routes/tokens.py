"""POST /tokenize and /detokenize."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from llmlite.serve.documents import Tokens, TokenText, answers
from llmlite.serve.routes.answering import Using, models_of, require_json
from llmlite.serve.routes.chat import prompt_of
from llmlite.serve.routes.completions import check_ids
from llmlite.serve.schema import ChatRequest
from llmlite.serve.service import Service
from llmlite.serve.tokens_schema import DetokenizeRequest, TokenizeRequest

router = APIRouter()


@router.post("/tokenize", dependencies=[Depends(require_json)], responses=answers(Tokens))
async def tokenize(body: TokenizeRequest, request: Request) -> Response:
    """Token ids of a text, or of a conversation by the model's template."""
    name = body.model or models_of(request).names[0]
    async with Using(request, name) as using:
        service = using.served.service
        if body.messages is not None:
            tokens = await prompt_of(using, ChatRequest(model=name, messages=body.messages), "messages")
        else:
            tokens = await _text_ids(service, body.content or "", bool(body.add_special))
        shown: list[Any] = [_piece(service, token) for token in tokens] if body.with_pieces else list(tokens)
        return JSONResponse({"tokens": shown, "count": len(tokens), "max_model_len": service.engine.context})


@router.post("/detokenize", dependencies=[Depends(require_json)], responses=answers(TokenText))
async def detokenize(body: DetokenizeRequest, request: Request) -> Response:
    """The text of token ids, control tokens by name; bytes that are no whole character become U+FFFD."""
    async with Using(request, body.model or models_of(request).names[0]) as using:
        engine = using.served.service.engine
        check_ids(engine, body.tokens, "tokens")
        data = b"".join(engine.token_bytes(token, special=True) for token in body.tokens)
        return JSONResponse({"content": data.decode("utf-8", "replace")})


async def _text_ids(service: Service, text: str, special: bool) -> list[int]:
    """The engine's own encoding begins with the BOS token where the model wants one; a BOS in the text itself stays."""
    tokens = await service.encode(text)
    front = await service.encode("")
    if special or not front or tokens[:1] != front:
        return tokens
    written = service.engine.token_bytes(front[0], special=True)
    return tokens if text.encode().startswith(written) else tokens[1:]


def _piece(service: Service, token: int) -> dict[str, Any]:
    """A token with its text, or with its bytes where it is only part of a character."""
    data = service.engine.token_bytes(token, special=True)
    try:
        return {"id": token, "piece": data.decode()}
    except UnicodeDecodeError:
        return {"id": token, "piece": list(data)}
