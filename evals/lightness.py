"""Is it light enough? An artifact's figures against what phone, edge, 8 GB GPU and server give.

Pure functions of figures: nothing is measured here. Thresholds and their reasons are in lightness.toml.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import resources

from llmlite.evals.memory import Memory
from llmlite.evals.score import Score
from llmlite.evals.shape import Shape
from llmlite.evals.size import Size
from llmlite.evals.speed import PROMPT_TOKENS, Speed, main_context
from llmlite.plan.budget import parse_size


@dataclass(frozen=True)
class Figures:
    """What is known of an artifact; None where nobody measured it.

    ``bytes``: on disk; ``weights``: bytes that one token reads of them; ``flops_per_token``: of one more token at
    ``context``, the prompt's tokens that ``memory`` (bytes, the peak without the program), ``kv`` (cache, bytes),
    ``first_token_s`` and ``generate_tps`` were measured at, on ``device``; ``joules_per_token``: of the answer
    there; ``kept``: share of positions where artifact and base like the same token best, and ``mean_kl`` in nats,
    of the worst text.
    """

    parameters: int
    bytes: int
    weights: int
    bits_per_weight: float
    context: int
    flops_per_token: int | None = None
    memory: int | None = None
    kv: int | None = None
    device: str | None = None
    generate_tps: float | None = None
    first_token_s: float | None = None
    joules_per_token: float | None = None
    kept: float | None = None
    mean_kl: float | None = None


@dataclass(frozen=True)
class DeviceClass:
    """A row of lightness.toml; bytes, bytes per second, operations per second, tokens per second, seconds."""

    name: str
    about: str
    memory: int
    disk: int
    bandwidth: float
    flops: float
    generate_tps: float
    first_token_s: float
    kept: float


@dataclass(frozen=True)
class Verdict:
    """Whether an artifact is light enough for a class: True, False, or None where the memory is not known.

    ``decides``: the threshold that is missed by most, or met with the least room: "memory", "disk", "generate_tps",
    "first_token_s" or "kept"; ``value`` and ``threshold`` in its unit. ``unknown``: thresholds without a figure.
    """

    name: str
    about: str
    light: bool | None
    decides: str
    value: float
    threshold: float
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class Lightness:
    """The figures and a verdict per class."""

    figures: Figures
    verdicts: tuple[Verdict, ...]

    def to_json(self) -> dict:
        """Plain data; unknown figures have no key."""
        known = {key: value for key, value in asdict(self.figures).items() if value is not None}
        classes = {v.name: {**asdict(v), "unknown": list(v.unknown)} for v in self.verdicts}
        return {**known, "classes": classes}


@cache
def device_classes() -> tuple[DeviceClass, ...]:
    """The rows of lightness.toml in their order."""
    text = resources.files("llmlite.evals").joinpath("lightness.toml").read_text("utf-8")
    rows = tomllib.loads(text)
    sizes = {name: {key: parse_size(row[key]) for key in ("memory", "disk")} for name, row in rows.items()}
    return tuple(DeviceClass(name=name, **{**row, **sizes[name]}) for name, row in rows.items())


def gather(
    size: Size, shape: Shape | None, memory: Memory | None, speed: Speed | None, scores: Mapping[str, Score]
) -> Figures:
    """The figures of an evaluation, at its main context (512 where nothing was measured)."""
    contexts = [at.context for at in (memory.contexts if memory else speed.contexts if speed else ())]
    context = main_context(contexts) if contexts else PROMPT_TOKENS
    held = next((at for at in memory.contexts if at.context == context), None) if memory else None
    timed = next((at for at in speed.contexts if at.context == context), None) if speed else None
    apart = [scored.divergence for scored in scores.values() if scored.divergence is not None]
    return Figures(
        parameters=size.parameters,
        bytes=size.bytes,
        weights=memory.weights if memory else size.tensor_bytes,
        bits_per_weight=size.bits_per_weight,
        context=context,
        flops_per_token=shape.flops(context) if shape else None,
        memory=memory.peak - memory.program if memory else None,
        kv=held.kv if held else None,
        device=memory.device if memory else None,
        generate_tps=speed.generate_tps if speed else None,
        first_token_s=speed.first_token_s if speed else None,
        joules_per_token=timed.generate_joules if timed else None,
        kept=min((one.same_top for one in apart), default=None),
        mean_kl=max((one.mean_kl for one in apart), default=None),
    )


def lightness(figures: Figures, classes: Sequence[DeviceClass] | None = None) -> Lightness:
    """Judge ``figures`` for each class, by default lightness.toml's."""
    return Lightness(figures, tuple(_verdict(figures, one) for one in classes or device_classes()))


def fastest(figures: Figures, one: DeviceClass) -> tuple[float, float]:
    """Tokens per second of an answer and seconds to its first token that the class's memory and units allow at most.

    One token reads the weights and the cache once; a prompt reads the weights once at least. Where operations or
    cache are not known, the bound leaves them out.
    """
    flops = figures.flops_per_token or 0
    per_token = max((figures.weights + (figures.kv or 0)) / one.bandwidth, flops / one.flops)
    prompt = max(figures.weights / one.bandwidth, figures.context * flops / one.flops)
    return 1 / per_token, prompt


def _verdict(figures: Figures, one: DeviceClass) -> Verdict:
    generate_tps, first_token_s = fastest(figures, one)
    # value, threshold and the share of what the class gives: beyond 1 is too much
    asked: dict[str, tuple[float, float, float]] = {
        "disk": (figures.bytes, one.disk, figures.bytes / one.disk),
        "generate_tps": (generate_tps, one.generate_tps, one.generate_tps / generate_tps),
        "first_token_s": (first_token_s, one.first_token_s, first_token_s / one.first_token_s),
    }
    if figures.memory is not None:
        asked["memory"] = (figures.memory, one.memory, figures.memory / one.memory)
    if figures.kept is not None:
        asked["kept"] = (figures.kept, one.kept, one.kept / figures.kept if figures.kept else math.inf)
    decides = max(asked, key=lambda key: asked[key][2])
    value, threshold, share = asked[decides]
    unknown = tuple(key for key in ("memory", "kept") if key not in asked)
    light = False if share > 1 else None if "memory" in unknown else True
    return Verdict(one.name, one.about, light, decides, value, threshold, unknown)
