"""Students of 24 of 30 layers trained for ten minutes on the teacher's predictions, and on the text alone.

`distill`: both on WikiText-2, and the first on the packaged mix of five kinds too, judged on three texts that none saw,
beside the student as it is cut and as it is made.
`shrink`: what students of each kind are worth before any training.
`teacher_logits`: the teacher's logits from disk against the teacher itself, the same steps.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.adaptation.setup import LENGTH, Setup, apart
from benchmarks.quantization.texts import evaluation_text, token_rows
from llmlite.adapt.influence import droppable, measure_layers
from llmlite.adapt.shape import Shape, shape_of, student_shape
from llmlite.adapt.shrink import Text, write_student
from llmlite.adapt.training import computing_dtype
from llmlite.calibrate.corpus import read_corpus
from llmlite.calibrate.rows import token_rows as text_rows
from llmlite.checkpoint.checkpoint import Checkpoint, open_checkpoint
from llmlite.evals.engines import TransformersEngine
from llmlite.evals.hf import load_tokenizer
from llmlite.run.distill import Distilled, DistillSettings, distill

TRAINING = "wikitext2/wiki.valid.raw"  # judged on its test part, and on code: another kind
TEXTS = ("english", "code", "book")
BOOK, LICENCE = "books_en/pride_and_prejudice_pg1342.txt", 8  # and the rows at its beginning that are no novel
DROPPED, MINUTES = 6, 10.0
SAME_KIND, OTHER_KIND = 0.45, 0.6
AGREEMENT = 0.12
CALIBRATION = 32768
LOSS, TIME = 0.02, 0.7
LOGITS_STEPS, LOGITS_TOKENS = 48, 16384


def run(setup: Setup) -> dict[str, Any]:
    """Divergence of students as they are cut, as they are made, and after ten minutes of training.

    The ten minutes hold what the least squares took. A student of WikiText-2 is judged on its test part and on code,
    another kind (though the mix by which every student is made has code); one of the mix on the first and on a novel.
    """
    kept = shape_of(open_checkpoint(setup.base).config).layers - DROPPED
    for name, data in (("wikitext", {}), ("mix", {"data": ()})):
        made = _distilled(setup, f"{name}-made", layers=kept, steps=0, **data)
        facts = json.loads((made / "llmlite.json").read_text())["made"]
        _cut(setup, f"{name}-cut", tuple(part["layer"] for part in facts["kept"]))
        minutes = MINUTES - facts["reconstructed"]["seconds"] / 60
        _distilled(setup, name, student=str(made), minutes=minutes, patience=0, **data)
        if name == "wikitext":
            _distilled(setup, "text", student=str(made), minutes=minutes, patience=0, data_share=1.0)
    rows, found = [], {}
    for name in ("wikitext-cut", "wikitext-made", "wikitext", "text", "mix-cut", "mix-made", "mix"):
        for text in TEXTS:
            found[name, text] = _judged(setup, setup.work / f"distill-{name}", text)
            rows.append({"student": name, "text": text, **found[name, text]})
    held = True
    for name, other in (("wikitext", "code"), ("mix", "book")):
        for text, share in (("english", SAME_KIND), (other, OTHER_KIND)):
            start, end = found[f"{name}-cut", text], found[name, text]
            held &= end["mean_kl"] <= share * start["mean_kl"]
            held &= end["same_top"] >= start["same_top"] + AGREEMENT
    bar = (
        f"after {MINUTES:g} minutes KL at most {SAME_KIND} of the cut student's on the training's kind of text, "
        f"{OTHER_KIND} on another, the same token first +{AGREEMENT}"
    )
    return {"rows": rows, "held": held, "bar": bar}


def shrink(setup: Setup) -> dict[str, Any]:
    """Each way to choose what goes, before any training, on English text."""
    teacher = open_checkpoint(setup.base)
    text, whole = _calibration(setup, teacher), shape_of(teacher.config)
    scores = measure_layers(teacher, text.ids[:16], 4, setup.work, text.device, text.dtype)
    able = droppable(teacher)
    by_influence = sorted(able, key=lambda layer: scores.influence[layer])
    ways = {
        "layers, by influence and single drops": scores.drop(DROPPED),
        "layers, by influence alone": by_influence[:DROPPED],
        "layers, at random": np.random.default_rng(0).choice(able, DROPPED, replace=False).tolist(),
        "layers, the last before the final": range(whole.layers - 1 - DROPPED, whole.layers - 1),
    }
    rows = []
    for name, gone in ways.items():
        kept = tuple(layer for layer in range(whole.layers) if layer not in gone)
        rows.append(
            _shrunk(setup, teacher, name, kept, Shape(len(kept), whole.ffn, whole.kv_heads), text, "activation")
        )
    size = rows[0]["parameters"] / sum(np.prod(entry.shape) for entry in teacher.tensors.values())
    everything = tuple(range(whole.layers))
    narrow = student_shape(teacher, share=float(size) + 1e-6)
    if narrow.layers != whole.layers:
        raise SystemExit(f"{setup.base}: its FFN channels alone don't make it as small as {DROPPED} layers do")
    for ordering in ("activation", "magnitude", "random"):
        name = f"FFN channels, by {ordering}"
        rows.append(_shrunk(setup, teacher, name, everything, narrow, text, ordering))
    heads = Shape(whole.layers, whole.ffn, whole.kv_heads - 1)
    rows.append(_shrunk(setup, teacher, "key/value heads, by activation", everything, heads, text, "activation"))
    value = {row["student"]: row["perplexity"] for row in rows}
    best = value["layers, by influence and single drops"]
    held = best < min(value["layers, at random"], value["layers, the last before the final"]) / 2
    held &= value["FFN channels, by activation"] < best
    bar = "checked layers below half the perplexity of random and last ones; FFN channels of the same size below them"
    return {"rows": rows, "held": held, "bar": bar}


def teacher_logits(setup: Setup) -> dict[str, Any]:
    """The same steps with the teacher's logits from disk and with the teacher itself."""
    kept = shape_of(open_checkpoint(setup.base).config).layers - DROPPED
    plain = _distilled(setup, "wikitext-made", layers=kept, steps=0)
    rows: list[dict[str, Any]] = []
    for kind in ("live", "disk"):
        begun = time.monotonic()
        done = distill(
            _fresh(setup.work / f"distill-{kind}-{int(begun)}"),
            _settings(
                setup,
                student=str(plain),
                steps=LOGITS_STEPS,
                data_tokens=LOGITS_TOKENS,
                teacher_logits=kind,
                patience=0,
            ),
        )
        assert done.trained is not None
        rows.append(
            {"teacher": kind, "held_out_kl": done.after.kl, "training_seconds": done.trained.seconds,
             "all_seconds": time.monotonic() - begun}
        )  # fmt: skip
    live, disk = rows
    held = disk["held_out_kl"] <= (1 + LOSS) * live["held_out_kl"]
    held &= disk["training_seconds"] < TIME * live["training_seconds"]
    return {"rows": rows, "held": held, "bar": "from disk: loss within 2% of the live teacher's, below 0.7 of its time"}


def _settings(setup: Setup, **changes: Any) -> DistillSettings:
    data = (str(setup.data / TRAINING),)
    return DistillSettings(**{"teacher": str(setup.base), "data": data, "threads": setup.threads, **changes})


def _distilled(setup: Setup, name: str, **changes: Any) -> Path:
    """A student in the work folder, made where it is not there yet."""
    out = setup.work / f"distill-{name}"
    if not out.is_dir():
        done: Distilled = distill(out, _settings(setup, **changes))
        print(done)
    return out


def _cut(setup: Setup, name: str, layers: tuple[int, ...]) -> None:
    """These layers as the teacher has them, in the work folder."""
    out = setup.work / f"distill-{name}"
    if not (out / "config.json").is_file():
        out.mkdir(exist_ok=True)
        teacher = open_checkpoint(setup.base)
        shape = replace(shape_of(teacher.config), layers=len(layers))
        write_student(teacher, out, layers, shape, Text(np.empty((0, LENGTH), np.int64)))


def _fresh(out: Path) -> Path:
    if out.exists():
        raise SystemExit(f"{out}: is there already")
    return out


def _calibration(setup: Setup, teacher: Checkpoint) -> Text:
    corpus = read_corpus(str(setup.data / TRAINING))
    rows = text_rows([corpus], load_tokenizer(teacher.directory), CALIBRATION, LENGTH, 0)
    return Text(rows.ids, "cpu", computing_dtype("auto", torch.device("cpu")))


def _shrunk(
    setup: Setup, teacher: Checkpoint, name: str, layers: tuple[int, ...], shape: Shape, text: Text, ordering: Any
) -> dict[str, Any]:
    out = setup.work / f"shrink-{name.replace(' ', '-').replace('/', '-').replace(',', '')}"
    if not (out / "config.json").is_file():
        out.mkdir(exist_ok=True)
        write_student(teacher, out, layers, shape, text, ordering)
    count = sum(int(np.prod(entry.shape)) for entry in open_checkpoint(out).tensors.values())
    return {"student": name, "parameters": count, **_judged(setup, out, "english")}


def _judged(setup: Setup, student: Path, name: str) -> dict[str, float]:
    tokenizer = load_tokenizer(setup.base)
    if name == "book":
        whole = (setup.data / BOOK).read_text(encoding="utf-8")
        rows = token_rows(whole, tokenizer, LENGTH, LICENCE + setup.windows)[LICENCE:]
    else:
        rows = token_rows(evaluation_text(name, setup.data, tokenizer), tokenizer, LENGTH, setup.windows)
    engines = [TransformersEngine(path) for path in (setup.base, student)]
    for engine in engines:
        engine.model.float()
    return apart(engines[0], engines[1], rows, f"{student.name}, {name}")
