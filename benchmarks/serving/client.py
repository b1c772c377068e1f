"""A client that costs little beside a server on the same cores: one connection a request, events read line by line."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field


@dataclass
class Reply:
    """What came of one request. ``times``: of each event that had text, seconds of time.perf_counter()."""

    began: float
    times: list[float] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    status: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    error: str | None = None

    @property
    def first(self) -> float:
        """Seconds until the first text."""
        return self.times[0] - self.began if self.times else float("nan")

    @property
    def gaps(self) -> list[float]:
        """Seconds between the texts."""
        return [later - earlier for earlier, later in zip(self.times, self.times[1:], strict=False)]


async def ask(port: int, body: dict, path: str = "/v1/chat/completions", hang_up_after: float | None = None) -> Reply:
    """Send one request, streamed, and read its events; ``hang_up_after``: seconds after which the client is gone."""
    reply = Reply(time.perf_counter())
    try:
        async with asyncio.timeout(hang_up_after):
            await _exchange(port, path, {**body, "stream": True, "stream_options": {"include_usage": True}}, reply)
    except TimeoutError:
        reply.error = "hung up"
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        reply.error = f"{type(error).__name__}: {error}"
    return reply


async def _exchange(port: int, path: str, body: dict, reply: Reply) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**20)
    try:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\nConnection: close\r\n\r\n".encode() + data)
        await writer.drain()
        reply.status = int((await reader.readline()).split()[1])
        while (await reader.readline()).strip():
            pass
        if reply.status != 200:
            reply.error = (await reader.read()).decode("utf-8", "replace")
            return
        while line := await reader.readline():
            if line.startswith(b"data: ") and not line.startswith(b"data: [DONE]"):
                _event(json.loads(line[6:]), reply)
    finally:
        writer.close()


def _event(data: dict, reply: Reply) -> None:
    if "error" in data:
        reply.error = json.dumps(data["error"])
        return
    for choice in data.get("choices", []):
        text = choice.get("text") or (choice.get("delta") or {}).get("content")
        if text:
            reply.times.append(time.perf_counter())
            reply.text += text
        reply.finish = choice.get("finish_reason") or reply.finish
    usage = data.get("usage")
    if usage:
        reply.tokens = usage["completion_tokens"]
        reply.prompt_tokens = usage["prompt_tokens"]
        reply.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


async def streams(port: int, bodies: list[dict], at_once: int) -> list[Reply]:
    """All requests, ``at_once`` of them running at any time."""
    waiting = list(reversed(bodies))
    replies: list[Reply] = []

    async def one() -> None:
        while waiting:
            replies.append(await ask(port, waiting.pop()))

    await asyncio.gather(*(one() for _ in range(at_once)))
    return replies
