"""Measure memory and speed in a process that holds one artifact and nothing else.

    python -m llmlite.evals.probe ARTIFACT --context N [--threads N] [--budget BYTES --untouched BYTES]

prints one JSON object. `probe` starts such a process for each context and reads what it says.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlite.errors import InputError, LlmliteError, OutsideError
from llmlite.evals.energy import open_meter
from llmlite.evals.locate import find
from llmlite.evals.memory import Memory, MemoryAt, NoRoomError
from llmlite.evals.runners import Limit, LlamaRunner, TransformersRunner, keep_freed
from llmlite.evals.speed import CONTEXTS, REPEATS, Speed, SpeedAt, Spread, answer, main_context, measure_speed
from llmlite.progress import track

NO_ROOM_STATUS = 4


@dataclass(frozen=True)
class Probe:
    """What one process measured: `Memory` with the one context of it, and `SpeedAt`, None where it did not repeat."""

    memory: Memory
    speed: SpeedAt | None


def probe(
    artifact: Path, threads: int | None = None, repeats: int = REPEATS, contexts: Sequence[int] = CONTEXTS
) -> tuple[Memory, Speed | None]:
    """Memory and speed of an artifact at each of ``contexts``, every one measured in a fresh process.

    ``repeats``: how often each speed is timed; 0 times nothing and gives no speed.

    Raises what a process ended with: `InputError` where the artifact can't be loaded, `OutsideError` where it
    was killed, as the kernel does when memory runs out.
    """
    wanted = sorted(set(contexts))
    done = [probe_one(artifact, threads, repeats, context) for context in track(wanted, artifact.name, len(wanted))]
    main = done[wanted.index(main_context(wanted))].memory
    memory = dataclasses.replace(main, contexts=tuple(one.memory.contexts[0] for one in done))
    timed = [one.speed for one in done if one.speed is not None]
    return memory, Speed.of(timed) if timed else None


def probe_one(artifact: Path, threads: int | None, repeats: int, context: int, limit: Limit | None = None) -> Probe:
    """As `probe`, at one context.

    Raises `NoRoomError` where ``limit`` was hit.
    """
    command = [sys.executable, "-m", "llmlite.evals.probe", str(artifact)]
    command += ["--repeats", str(repeats), "--context", str(context)]
    if threads is not None:
        command += ["--threads", str(threads)]
    if limit is not None:
        command += ["--budget", str(limit.budget), "--untouched", str(limit.untouched)]
    said = run_module(artifact, command, limited=limit is not None)
    at = MemoryAt(**said["memory"].pop("contexts")[0])
    return Probe(Memory(**said["memory"], contexts=(at,)), _speed(said["speed"]) if said["speed"] else None)


def run_module(artifact: Path, command: list[str], limited: bool = False) -> dict:
    """What a measuring process prints as JSON; raises what it ended with."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == InputError.exit_status:
        raise InputError(_last_line(done.stderr))
    starved = done.returncode < 0 or "Thread creation failed" in done.stderr  # libgomp ends the process itself
    if done.returncode == NO_ROOM_STATUS or (limited and starved):
        raise NoRoomError(f"{artifact}: {_last_line(done.stderr)}")
    if done.returncode < 0:
        raise OutsideError(f"{artifact}: the measuring process was killed by signal {-done.returncode}: out of memory?")
    if done.returncode != 0:
        raise OutsideError(f"{artifact}: the measuring process failed ({_last_line(done.stderr)})")
    return json.loads(done.stdout)


def _speed(said: dict[str, Any]) -> SpeedAt:
    return SpeedAt(**{key: Spread(**value) if isinstance(value, dict) else value for key, value in said.items()})


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def _measure(args: argparse.Namespace) -> dict:
    location = find(args.artifact)
    limit = Limit(args.budget, args.untouched) if args.budget else None
    kind = LlamaRunner if location.engine == "llama.cpp" else TransformersRunner
    try:
        runner = kind(location.path, args.threads, args.context, limit)
        answer(runner, args.context)
        at = runner.memory(args.context)
        keep_freed()
        meter = open_meter(runner.gpu)
        speed = measure_speed(runner, args.context, args.repeats, meter) if args.repeats else None
    except MemoryError:
        raise NoRoomError("the process got no more memory") from None
    except RuntimeError as error:  # torch, on a CPU and on a GPU
        if limit is None or "memory" not in str(error).lower():
            raise
        raise NoRoomError(str(error).splitlines()[0]) from None
    weights, per_token = runner.weights()
    memory = Memory(weights, per_token, at.peak, runner.program, runner.device, (at,))
    return {"memory": dataclasses.asdict(memory), "speed": dataclasses.asdict(speed) if speed else None}


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the memory and speed of one artifact, as JSON.")
    parser.add_argument("artifact")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--budget", type=int)
    parser.add_argument("--untouched", type=int, default=0)
    args = parser.parse_args()
    try:
        json.dump(_measure(args), sys.stdout)
    except NoRoomError as error:
        print(error, file=sys.stderr)
        return NO_ROOM_STATUS
    except LlmliteError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
