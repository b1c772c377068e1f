"""GET /v1/models: what is served here, with the artifact's measured quality."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from llmlite.serve.documents import ModelCard, ModelList, answers
from llmlite.serve.models import Models
from llmlite.serve.routes.answering import models_of

router = APIRouter()


@router.get("/v1/models", responses=answers(ModelList))
async def models(request: Request) -> Response:
    """All models and adapters."""
    found = models_of(request)
    return JSONResponse({"object": "list", "data": [card(found, name) for name in found.names]})


@router.get("/v1/models/{model:path}", responses=answers(ModelCard))
async def model(model: str, request: Request) -> Response:
    """One of them."""
    return JSONResponse(card(models_of(request), model))


def card(models: Models, name: str) -> dict[str, Any]:
    """OpenAI's model object, and under ``llmlite`` what is known of the artifact, its measured cost included."""
    model, adapter = models.find(name)
    about: dict[str, Any] = {"loaded": False} if model.service is None else {"loaded": True, **model.service.facts()}
    if adapter is not None:
        about["adapter_of"] = model.spec.name
    return {"id": name, "object": "model", "created": models.created, "owned_by": "llmlite", "llmlite": about}
