"""Two replicas of the server on a local Ray cluster: both answer, one is killed, the other goes on, a new one comes.

    python -m benchmarks.serving.replicas --model FILE.gguf

Needs `pip install 'llmlite[ray]'`, the official OpenAI client and memory for two engines. Prints what it saw; exit
status 1 if one of it is not as it should be.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import openai
import psutil
import ray
from ray import serve

from llmlite.serve.ray_app import build

PORT = 8123
SECONDS = 180.0


class Cluster:
    """What is looked at: the replicas' processes, and the log that each writes of the requests that it answered."""

    def __init__(self, folder: Path) -> None:
        self._logs = folder / "session_latest" / "logs" / "serve"
        self.url = f"http://127.0.0.1:{PORT}"
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120, _strict_response_validation=True
        )

    def replicas(self) -> list[int]:
        """Process ids of the replicas that run."""
        running = psutil.Process().children(recursive=True)
        return [child.pid for child in running if _is_replica(child)]

    def answered(self) -> dict[str, int]:
        """Chat answers by replica, in the order of the replicas' names."""
        counts = {}
        for file in sorted(self._logs.glob("replica_*.log")):
            lines = file.read_text("utf-8", errors="replace").splitlines()
            counts[file.stem.rpartition("_")[2]] = sum("/v1/chat/completions 200" in line for line in lines)
        return counts

    def ask(self, prompt: str = "Say hello.") -> str:
        """ "ok", or how the request failed."""
        messages: list = [{"role": "user", "content": prompt}]
        try:
            self.client.chat.completions.create(model="smol", messages=messages, max_tokens=8, temperature=0)
        except openai.OpenAIError as error:
            return f"{type(error).__name__}: {str(error)[:80]}"
        return "ok"

    def crowd(self, count: int, meanwhile: int | None = None) -> list[str]:
        """Answers to ``count`` requests at once; ``meanwhile``: a process that is killed while they run."""
        results: list[str] = []
        threads = [threading.Thread(target=lambda: results.append(self.ask())) for _ in range(count)]
        for thread in threads:
            thread.start()
        if meanwhile is not None:
            time.sleep(0.2)
            os.kill(meanwhile, signal.SIGKILL)
        for thread in threads:
            thread.join()
        return results

    def wait_for_another(self, victim: int) -> bool:
        """Whether Ray has a new replica in the killed one's place, with its model loaded."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            states = serve.status().applications["default"].deployments["llmlite"].replica_states
            if victim not in self.replicas() and states == {"RUNNING": 2}:
                return True
            time.sleep(1)
        return False


def _is_replica(process: psutil.Process) -> bool:
    try:
        return "ServeReplica" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        ray.init(
            num_cpus=4, object_store_memory=80 * 2**20, include_dashboard=False, log_to_driver=False, _temp_dir=folder
        )
        serve.start(http_options={"host": "127.0.0.1", "port": PORT})
        given = {"artifact": str(args.model.resolve()), "name": "smol", "min_replicas": "2", "max_replicas": "2"}
        serve.run(build({**given, "context": "512", "parallel": "2"}))
        try:
            return 0 if check(Cluster(Path(folder))) else 1
        finally:
            serve.shutdown()
            ray.shutdown()


def check(cluster: Cluster) -> bool:
    """Print each step and tell whether all were as they should be."""
    good: list[bool] = []

    def step(what: str, right: bool, seen: object) -> None:
        good.append(right)
        print(f"{'ok' if right else 'WRONG'}  {what}: {seen}", flush=True)

    before = cluster.replicas()
    step("replicas", len(before) == 2, f"processes {before}")
    models = [model.id for model in cluster.client.models.list().data]
    step("models", models == ["smol"], models)
    results = cluster.crowd(16)
    step("16 requests at once", results == ["ok"] * 16, _told(results))
    time.sleep(1)  # the logs are written behind the answers
    answered = cluster.answered()
    step("answers by replica", len(answered) == 2 and min(answered.values()) > 0, answered)
    refused = httpx.post(f"{cluster.url}/v1/chat/completions", json={"model": "smol", "messages": [], "nonsense": 1})
    step("bad request", refused.status_code == 400, f"{refused.status_code} {refused.json()['error']['message']}")
    results = cluster.crowd(6, meanwhile=before[0])
    step("6 requests while one replica is killed", results.count("ok") >= 3, _told(results))
    results = [cluster.ask() for _ in range(6)]
    step("6 requests after that", results == ["ok"] * 6, _told(results))
    step("a new replica came", cluster.wait_for_another(before[0]), f"processes {cluster.replicas()}")
    results = cluster.crowd(16)
    time.sleep(1)
    new = {name: count for name, count in cluster.answered().items() if name not in answered}
    right = results == ["ok"] * 16 and len(new) == 1 and min(new.values()) > 0
    step("16 requests to both", right, f"{_told(results)}; by the new replica {new}")
    return all(good)


def _told(results: list[str]) -> str:
    kinds = dict.fromkeys(results)
    return ", ".join(f"{results.count(kind)} {kind}" for kind in kinds)


if __name__ == "__main__":
    sys.exit(main())
