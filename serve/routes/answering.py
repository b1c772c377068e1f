"""What the generating endpoints share: the body must be JSON, work is queued, the answer is whole or streamed."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from llmlite.serve.answers import Answer, stream, whole
from llmlite.serve.errors import ApiError, as_api_error
from llmlite.serve.generation import Work
from llmlite.serve.inbox import Failed, Inbox, Watch
from llmlite.serve.metrics import Metrics
from llmlite.serve.models import Models, Served
from llmlite.serve.retelling import Retelling, retold, retold_whole
from llmlite.serve.scheduler import EngineDead, QueueFull, ShuttingDown


async def require_json(request: Request) -> None:
    """Nothing but application/json: a page in a browser can't send that to a local server without asking first."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be JSON: send Content-Type: application/json, not {kind!r}")


def models_of(request: Request) -> Models:
    """The models of the app that a request came to."""
    found = request.app.state.models
    assert isinstance(found, Models)
    return found


def metrics_of(request: Request) -> Metrics:
    """What the app that a request came to counts."""
    found = request.app.state.metrics
    assert isinstance(found, Metrics)
    return found


class Using:
    """A served model for as long as a request needs it: past the endpoint's return, where the answer is streamed.

    ``async with Using(request, name) as using`` gives ``using.served``; `answer` takes the model along into a
    stream, else it is given back when the block ends.
    """

    def __init__(self, request: Request, name: str) -> None:
        self._request = request
        self._name = name
        self._stack = AsyncExitStack()
        self.served: Served

    async def __aenter__(self) -> Using:
        self.served = await self._stack.enter_async_context(models_of(self._request).use(self._name))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    async def answer(
        self, works: list[Work], answer: Answer, streamed: bool, retelling: Retelling | None = None
    ) -> Response:
        """Queue the work. Answer when all is there; streamed, when the first delta is: a failure then has a status.

        ``retelling``: puts the answer into the words of another API than OpenAI's chat and completions.
        """
        try:
            watch = Watch(metrics_of(self._request), self.served.service.name)
            inbox = Inbox(self.served.service.scheduler, works, self._request, watch)
        except (QueueFull, EngineDead, ShuttingDown) as error:
            raise as_api_error(error) from None
        streaming = False
        try:
            if not streamed:
                told = whole(answer, inbox) if retelling is None else retold_whole(answer, inbox, retelling)
                return JSONResponse(await told)
            first = await inbox.next()
            streaming = True
        except Failed as failure:
            raise as_api_error(failure.error) from failure.error
        finally:
            if not streaming:
                inbox.close()
        told = stream(answer, inbox, first) if retelling is None else retold(answer, inbox, first, retelling)
        self._stack.callback(inbox.close)
        return Streamed(told, self._stack.pop_all())


class Streamed(StreamingResponse):
    """Server-sent events. ``held`` is given back at the end, also where the client left before the first one."""

    def __init__(self, events: AsyncIterator[str], held: AsyncExitStack) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The inbox hears it when the client hangs up, and ends the events; nobody else need listen."""
        async with self._held:
            await self.stream_response(send)
