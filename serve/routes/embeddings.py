"""POST /v1/embeddings."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response

from llmlite.serve.documents import EmbeddingList, answers
from llmlite.serve.embeddings_schema import EmbeddingsRequest
from llmlite.serve.errors import ApiError, as_api_error
from llmlite.serve.routes.answering import Using, models_of, require_json
from llmlite.serve.routes.completions import prompt_ids
from llmlite.serve.scheduler import ShuttingDown
from llmlite.serve.service import Service

router = APIRouter()


@router.post("/v1/embeddings", dependencies=[Depends(require_json)], responses=answers(EmbeddingList))
async def embeddings(body: EmbeddingsRequest, request: Request) -> Response:
    """OpenAI's embeddings, of any model that is served: pooled hidden states of length 1."""
    if models_of(request).draining:
        raise as_api_error(ShuttingDown())
    async with Using(request, body.model) as using:
        service = using.served.service
        if using.served.adapter is not None:
            message = f"model: embeddings are made by the bare model, so name {service.name!r}"
            raise ApiError(400, message, "model", "unsupported_parameter")
        prompts = [await _ids(service, given) for given in body.inputs()]
        vectors = [await service.embed(prompt, request.is_disconnected) for prompt in prompts]
        tokens = sum(map(len, prompts))
        data = [
            {"object": "embedding", "index": place, "embedding": _written(vector, body)}
            for place, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": using.served.name, "usage": usage})


async def _ids(service: Service, given: str | list[int]) -> list[int]:
    """Token ids of one text; raises 400 where there are none, or more than the context holds."""
    tokens = await prompt_ids(service, given, "input")
    if not tokens or not given:
        raise ApiError(400, "input: there is no token in it", "input", "invalid_value")
    if len(tokens) > service.engine.context:
        message = f"this model's context is {service.engine.context} tokens, but a text of input has {len(tokens)}"
        raise ApiError(400, message, "input", "context_length_exceeded")
    return tokens


def _written(vector: np.ndarray, body: EmbeddingsRequest) -> Any:
    """As numbers, or as base64 of little-endian float32."""
    if body.dimensions is not None:
        vector = _shortened(vector, body.dimensions)
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()


def _shortened(vector: np.ndarray, dimensions: int) -> np.ndarray:
    if dimensions > len(vector):
        message = f"dimensions: this model's vectors have {len(vector)}"
        raise ApiError(400, message, "dimensions", "invalid_value")
    short = vector[:dimensions]
    length = float(np.linalg.norm(short))
    return short / np.float32(length) if length else short
