"""Small models that guess for a larger one: guesses that are right, and what that does to the wall clock."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.adaptation.setup import Setup
from llmlite.run.distill import DistillSettings, distill
from llmlite.run.quantize import QuantizeSettings, quantize
from llmlite.serve.draft_figures import measure_draft, save_draft_figures

TEACHERS = ("gguf:f16", "gguf:q8_0")
STUDENT_LAYERS, STUDENT_MINUTES = 10, 10.0
CHATS = 8


def run(setup: Setup) -> dict:
    """The teacher's own 4-bit self, and a student of a third of its layers, as drafts for the teacher in 16 and 8 bits.

    Greedy replies to MT-Bench questions, which no training here has seen.
    """
    student = setup.work / f"draft-{STUDENT_LAYERS}-layers"
    if not student.is_dir():
        distill(student, DistillSettings(teacher=str(setup.base), layers=STUDENT_LAYERS, minutes=STUDENT_MINUTES))
    drafts = {
        "itself, q4_0": _gguf(setup, setup.base, "gguf:q4_0"),
        f"{STUDENT_LAYERS} layers, q8_0": _gguf(setup, student, "gguf:q8_0"),
    }
    lines = (setup.data / "chat" / "mt_bench_question.jsonl").read_text(encoding="utf-8").splitlines()
    chats = [[{"role": "user", "content": json.loads(line)["turns"][0]}] for line in lines[:: len(lines) // CHATS]]
    table = []
    for target in TEACHERS:
        teacher = _gguf(setup, setup.base, target)
        for name, draft in drafts.items():
            found = measure_draft(teacher, draft, chats[:CHATS], threads=setup.threads)
            save_draft_figures(draft, found)
            facts = {key: value for key, value in found.to_json().items() if key not in ("teacher", "draft")}
            table.append({"model": f"{name} for {target}", **facts})
    best = max(row["speed"] for row in table)
    return {"bar": "a draft makes its teacher faster by the wall clock", "held": best > 1, "rows": table}


def _gguf(setup: Setup, model: Path, target: str) -> Path:
    out = setup.work / f"{model.name}-{target.partition(':')[2]}"
    if not out.is_dir():
        quantize(model, out, QuantizeSettings(target, solver="rtn" if "q" in target else "auto", threads=setup.threads))
    return out
