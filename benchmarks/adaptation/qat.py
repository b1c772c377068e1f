"""Training codes through the rounding on the base's predictions, against error feedback at the same bytes and grid."""

from __future__ import annotations

from benchmarks.adaptation.repair import engine_of, rounded, weight_bytes
from benchmarks.adaptation.setup import LENGTH, Setup, apart, float32_engine
from benchmarks.quantization.texts import evaluation_text, token_rows
from llmlite.run.qat import TrainCodesSettings, train_quantized

BAR = 0.5
MINUTES = 10.0
TEXTS = ("english", "code")


def run(setup: Setup) -> dict:
    """3 bits: the bar."""
    return _measured(setup, "gptq:w3g64", BAR)


def run_2_bits(setup: Setup) -> dict:
    """2 bits, told as experimental: there is no bar but to be nearer than without."""
    return _measured(setup, "gptq:w2g64", 1.0)


def _measured(setup: Setup, target: str, most: float) -> dict:
    """KL to the base on texts that nothing is fitted to, before and after; the packaged text trains."""
    plain = rounded(setup, target)
    out = plain.with_name(f"{plain.name}-trained")
    told: dict = {}
    if not out.is_dir():
        settings = TrainCodesSettings(
            teacher=str(setup.base), to=target, student=str(plain), minutes=MINUTES, threads=setup.threads
        )
        told = train_quantized(out, settings).to_json()["training"]
    reference, table, shares = float32_engine(setup.base), [], {}
    for text in TEXTS:
        whole = evaluation_text(text, setup.data, reference.tokenizer)
        rows = token_rows(whole, reference.tokenizer, LENGTH, setup.windows)
        found = {}
        for name, folder in (("feedback", plain), ("trained", out)):
            found[name] = apart(reference, engine_of(setup, folder), rows, f"{text}, {name}")
            table.append({"model": f"{target}, {name}", "text": text, "bytes": weight_bytes(folder), **found[name]})
        shares[text] = found["trained"]["mean_kl"] / found["feedback"]["mean_kl"]
    held = shares["english"] <= most and weight_bytes(plain) == weight_bytes(out)
    bar = f"after {MINUTES:g} minutes, at the same bytes, mean KL on WikiText-2 at most {most:g} of error feedback's"
    return {"bar": bar, "held": held, "shares": shares, "training": told, "rows": table}
