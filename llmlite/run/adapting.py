"""The two ways of `llmlite lora`: training an adapter, or with ``--init`` and ``--steps 0`` only making one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llmlite.run.error_adapters import made_facts, made_sentence
from llmlite.run.lora import LoraSettings, adapted_facts, adapted_sentence, lora, untrained


def run_lora(model: str, out: Path, settings: LoraSettings) -> tuple[dict[str, Any], str]:
    """Do what the settings ask for; what was done as plain values, and in a sentence."""
    if settings.init != "random" and settings.steps == 0:
        made = untrained(model, out, settings)
        return made_facts(out, made), made_sentence(out, made)
    done = lora(model, out, settings)
    return adapted_facts(done), adapted_sentence(done)
