"""What is measured. Each case gives rows: a figure, the peer's, the bar."""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

from benchmarks.serving.client import Reply, ask, streams
from benchmarks.serving.report import row
from benchmarks.serving.servers import Server, Setup, running
from benchmarks.serving.soak import soak
from benchmarks.serving.texts import Texts, chat

NAMES = ("llmlite", "llama-server")
TOKENS = 96
LOAD, LEAST = 6, 16
"""Requests of each stream and of all: of fewer, the seconds in which the last ones run alone decide."""


def throughput(setup: Setup, texts: Texts, rounds: int) -> list[dict]:
    """Output tokens per second and time to first token at each number of streams, the two servers in turns."""
    rows = []
    for at_once in setup.streams:
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
        for number in range(rounds):
            for name in NAMES if number % 2 == 0 else NAMES[::-1]:
                with running(name, replace(setup, slots=at_once)) as server:
                    found[name].append(_load(server, texts, at_once, number))
        ratios = [ours[0] / theirs[0] for ours, theirs in zip(found["llmlite"], found["llama-server"], strict=True)]
        speed = {name: statistics.median(value[0] for value in values) for name, values in found.items()}
        first = {name: statistics.median(value[1] for value in values) for name, values in found.items()}
        ratio = statistics.median(ratios)
        rows.append(row(f"tokens/s, {at_once} streams", speed["llmlite"], speed["llama-server"], "", None))
        rows.append(row(f"ratio, {at_once} streams", ratio, None, "at least 0.95", ratio >= 0.95))
        met = first["llmlite"] <= first["llama-server"] if at_once == 8 else None
        bar = "no worse" if at_once == 8 else ""
        rows.append(row(f"first token s, {at_once} streams", first["llmlite"], first["llama-server"], bar, met))
    return rows


def _load(server: Server, texts: Texts, at_once: int, seed: int) -> tuple[float, float]:
    asyncio.run(streams(server.port, texts.short(2, 8, seed=99), 2))
    bodies = texts.short(max(LEAST, LOAD * at_once), TOKENS, seed)
    begun = time.perf_counter()
    replies = asyncio.run(streams(server.port, bodies, at_once))
    seconds = time.perf_counter() - begun
    _no_errors(replies, server.name)
    return sum(reply.tokens for reply in replies) / seconds, statistics.median(reply.first for reply in replies)


def prefix(setup: Setup, texts: Texts, rounds: int) -> list[dict]:
    """A prefix of 2,000 tokens that a second request shares, and that a third one shares after a restart."""
    again, restarted = [], []
    for number in range(rounds):
        system = texts.long(1500, number)
        bodies = [chat(f"{system}\n{question}", 4) for question in texts.questions[number : number + 3]]
        with tempfile.TemporaryDirectory() as folder:
            kept = replace(setup, slots=2, context=4096, more=("--cache-dir", folder))
            with running("llmlite", kept) as server:
                one, two = (asyncio.run(ask(server.port, body)) for body in bodies[:2])
            with running("llmlite", kept) as server:
                asyncio.run(ask(server.port, chat("hi", 2)))
                three = asyncio.run(ask(server.port, bodies[2]))
        _no_errors([one, two, three], "llmlite")
        again.append(two.first / one.first)
        restarted.append(three.first / one.first)
    shares = [statistics.median(again), statistics.median(restarted)]
    return [
        row("first token of a shared prefix, share of the first's", shares[0], None, "under 0.1", shares[0] < 0.1),
        row("the same after a restart", shares[1], None, "under 0.33", shares[1] < 1 / 3),
    ]


def long_arrival(setup: Setup, texts: Texts, rounds: int) -> list[dict]:
    """A prompt of 6,000 tokens arrives while 4 streams run: how much longer their gaps get, 99th percentile."""
    rows = []
    found: dict[str, list[float]] = {name: [] for name in NAMES}
    for number in range(rounds):
        for name in NAMES:
            with running(name, replace(setup, slots=5, context=8192)) as server:
                found[name].append(asyncio.run(_arrival(server, texts, number)))
    ratios = {name: statistics.median(values) for name, values in found.items()}
    ours, theirs = ratios["llmlite"], ratios["llama-server"]
    rows.append(row("growth of the 99th percentile gap", ours, theirs, "less than 3", ours < 3))
    return rows


async def _arrival(server: Server, texts: Texts, seed: int) -> float:
    await ask(server.port, chat("hi", 4))
    quiet = await streams(server.port, texts.short(4, 150, seed), 4)
    _no_errors(quiet, server.name)
    writing = [asyncio.create_task(ask(server.port, body)) for body in texts.short(4, 700, seed + 50)]
    await asyncio.sleep(1.5)
    begun = time.perf_counter()
    long = await ask(server.port, chat(texts.long(4400, seed), 4))
    arrived = long.times[0] if long.times else time.perf_counter()
    replies = await asyncio.gather(*writing)
    _no_errors([long, *replies], server.name)
    beside = [
        later - earlier
        for reply in replies
        for earlier, later in zip(reply.times, reply.times[1:], strict=False)
        if later > begun and earlier < arrived
    ]
    return percentile(beside, 0.99) / percentile([gap for reply in quiet for gap in reply.gaps], 0.99)


def oversubscribed(setup: Setup, texts: Texts, rounds: int) -> list[dict]:
    """Cells for a quarter of 16 sequences, 48 requests at once: which outputs differ from the same requests' alone."""
    rows = []
    quarter = replace(setup, slots=4, context=512)
    ways = {
        "a quarter of the slots": quarter,
        "16 slots that share a quarter of the cells": replace(setup, slots=16, context=512, cells=4 * 512),
        "a quarter of the slots, --exact": replace(quarter, more=("--exact",)),
    }
    for name, way in ways.items():
        differ = total = failed = 0
        for number in range(rounds):
            bodies = texts.short(48, 160, seed=number)
            with running("llmlite", replace(way, slots=1, cells=None)) as server:
                alone = {body["messages"][0]["content"]: asyncio.run(ask(server.port, body)).text for body in bodies}
            with running("llmlite", way) as server:
                replies = asyncio.run(_all_at_once(server, bodies))
            for body, reply in zip(bodies, replies, strict=True):
                total += 1
                failed += reply.error is not None
                differ += reply.error is None and reply.text != alone[body["messages"][0]["content"]]
        rows.append(row(f"{name}: requests that failed, of {total}", failed, None, "0", failed == 0))
        rows.append(row(f"{name}: replies that differ from the solo run", differ, None, "0", differ == 0))
    return rows


async def _all_at_once(server: Server, bodies: list[dict]) -> list[Reply]:
    return list(await asyncio.gather(*(ask(server.port, body) for body in bodies)))


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def _no_errors(replies: list[Reply], name: str) -> None:
    wrong = [reply.error for reply in replies if reply.error]
    if wrong:
        raise SystemExit(f"{name}: {wrong[0]}")


def soaked(setup: Setup, texts: Texts, rounds: int) -> list[dict]:
    """1,000 requests of random length, 200 hang-ups, 50 bodies that are none; then nothing is left of them."""
    small = ("--cache-ram", "64MiB")  # the prefix cache is full, and so of one size, when the warm-up ends
    with running("llmlite", replace(setup, slots=8, context=1024, cells=4096, more=small)) as server:
        return soak(server, texts, random.Random(0))


CASES: dict[str, Callable[[Setup, Texts, int], list[dict]]] = {
    "throughput": throughput,
    "prefix": prefix,
    "long_arrival": long_arrival,
    "oversubscribed": oversubscribed,
    "soak": soaked,
}
