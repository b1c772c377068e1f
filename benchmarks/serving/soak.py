"""Many requests of every kind, and what is left of the server's memory, threads and files afterwards."""

from __future__ import annotations

import asyncio
import json
import random
import urllib.request

import psutil

from benchmarks.serving.client import Reply, ask
from benchmarks.serving.report import row
from benchmarks.serving.servers import Server
from benchmarks.serving.texts import Texts, chat

REQUESTS, HANG_UPS, MALFORMED, AT_ONCE = 1000, 200, 50, 24


def soak(server: Server, texts: Texts, chance: random.Random) -> list[dict]:
    """The rows of the case; the first tenth of the requests only warms up."""
    process = psutil.Process(server.process.pid)
    jobs = [("ask", texts.questions[chance.randrange(len(texts.questions))]) for _ in range(REQUESTS)]
    jobs += [("hang up", texts.long(chance.randrange(10, 400), seed)) for seed in range(HANG_UPS)]
    jobs += [("malformed", "") for _ in range(MALFORMED)]
    chance.shuffle(jobs)
    tenth = len(jobs) // 10
    red: list[str] = []
    _run(server, jobs[:tenth], chance, red)
    before = _use(process)
    wrong = _run(server, jobs[tenth:], chance, red)
    after = _use(process)
    status = _health(server)
    memory = (after["memory"] - before["memory"]) / 2**20
    return [
        row("requests that failed or were answered wrongly", len(wrong), None, "0", not wrong),
        row("health checks that failed", len(red), None, "0", not red),
        row("sequences left", status["running"] + status["waiting"], None, "0", not any(
            status[key] for key in ("running", "waiting"))),
        row("threads more", after["threads"] - before["threads"], None, "0", after["threads"] <= before["threads"]),
        row("open files more", after["files"] - before["files"], None, "0", after["files"] <= before["files"]),
        row("MiB more", memory, None, "under 64", memory < 64),
    ]  # fmt: skip


def _run(server: Server, jobs: list[tuple[str, str]], chance: random.Random, red: list[str]) -> list[str]:
    return asyncio.run(_all(server, list(jobs), chance, red))


async def _all(server: Server, jobs: list[tuple[str, str]], chance: random.Random, red: list[str]) -> list[str]:
    wrong: list[str] = []

    async def work() -> None:
        while jobs:
            problem = await _one(server, jobs.pop(), chance)
            if problem:
                wrong.append(problem)

    async def watch() -> None:
        while jobs:
            try:
                await asyncio.to_thread(_health, server)
            except (OSError, ValueError) as error:
                red.append(str(error))
            await asyncio.sleep(1)

    await asyncio.gather(watch(), *(work() for _ in range(AT_ONCE)))
    return wrong


async def _one(server: Server, job: tuple[str, str], chance: random.Random) -> str | None:
    kind, text = job
    if kind == "ask":
        reply = await ask(server.port, chat(text, chance.randrange(1, 64)))
        return reply.error or (None if reply.finish else f"no finish: {reply}")
    if kind == "hang up":
        await ask(server.port, chat(text, 400), hang_up_after=chance.random() * 2)
        return None
    bodies: list[dict] = [
        {"messages": 5},
        {"model": "m"},
        chat("a", -1),
        chat("a", 4, temperature="hot"),
        chat("a", 4, what=1),
    ]
    body = chance.choice(bodies)
    reply = await ask(server.port, {"model": "m", **body})
    return None if _refused(reply) else f"{body} was not refused: {reply}"


def _refused(reply: Reply) -> bool:
    return reply.status == 400 and "message" in json.loads(reply.error or "{}").get("error", {})


def _health(server: Server) -> dict:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/health", timeout=30) as answer:
        return json.loads(answer.read())


def _use(process: psutil.Process) -> dict[str, int]:
    return {"memory": process.memory_info().rss, "threads": process.num_threads(), "files": process.num_fds()}
