"""What was measured of an artifact before, as its llmlite.json holds it.

Under ``evals`` and a protocol's name stands the JSON of an evaluation (`evaluate.Evaluation.to_json`): with the
SHA-256 of the artifact (``sha256``), its base (``base_sha256``) and each text (``texts.<name>.sha256``), the engine
with its version, and the protocol with its window, stride and number of windows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llmlite.checkpoint.artifact import GGUF_FILE, read_manifest, write_manifest
from llmlite.evals.locate import Location
from llmlite.evals.longcontext.result import LongContext
from llmlite.evals.longcontext.run import LongContextSettings
from llmlite.evals.score import Score
from llmlite.evals.texts import Text

OF_TEXTS = ("texts", "protocol", "base", "base_sha256", "structure")


@dataclass(frozen=True)
class Conditions:
    """What a score depends on beside its text; the fields are keys of the JSON."""

    sha256: str | None
    base_sha256: str | None
    engine: dict
    protocol: dict

    def hold_for(self, figures: dict) -> bool:
        """Whether earlier figures, with the manifest's keys, were measured under these."""
        return self.sha256 is not None and all(figures.get(name) == value for name, value in vars(self).items())


def earlier_scores(location: Location, conditions: Conditions, texts: Sequence[Text]) -> dict[str, Score]:
    """By name, the scores of those texts that were measured under the same conditions before.

    Figures that are no score by today's keys, as another version of this program wrote them, are measured again.
    """
    manifest = manifest_of(location)
    figures = (manifest or {}).get("evals", {}).get(conditions.protocol["name"], {})
    if not conditions.hold_for(figures):
        return {}
    known = {}
    for text in texts:
        earlier = figures.get("texts", {}).get(text.name, {})
        if earlier.get("sha256") == text.digest:
            try:
                known[text.name] = Score.from_json(earlier)
            except (KeyError, TypeError):
                continue
    return known


def earlier_long_context(location: Location, conditions: Conditions, wanted: LongContextSettings) -> LongContext | None:
    """The same questions, asked of the same artifact and base by the same engine before."""
    figures = (manifest_of(location) or {}).get("evals", {}).get(conditions.protocol["name"], {})
    same = conditions.sha256 is not None and figures.get("sha256") == conditions.sha256
    if not same or figures.get("engine") != conditions.engine or "long_context" not in figures:
        return None
    try:
        found = LongContext.from_json(figures["long_context"])
    except (KeyError, TypeError):
        return None
    return found if found.against_sha256 == conditions.base_sha256 and wanted.gave(found) else None


def save_figures(location: Location, protocol: str, figures: dict) -> bool:
    """Put an evaluation's JSON into the manifest; False where there is none that describes these weights."""
    manifest = manifest_of(location)
    if manifest is None:
        return False
    evals = manifest.get("evals", {})
    before = still_valid(evals.get(protocol, {}), figures)
    for section in ("texts", "tasks"):
        if section in figures:
            figures = {**figures, section: {**before.get(section, {}), **figures[section]}}
    write_manifest(location.directory, {**manifest, "evals": {**evals, protocol: {**before, **figures}}})
    return True


def still_valid(before: dict, now: dict) -> dict:
    """Earlier figures that may stand beside new ones: of the same artifact and engine, texts under the same conditions.

    New figures without texts say of the base only what it was that they were measured against, if any.
    """
    if any(before.get(name, now.get(name)) != now.get(name) for name in ("sha256", "engine")):
        return {}
    said = ("base_sha256", "protocol") if "texts" in now else ("base_sha256",) if "base_sha256" in now else ()
    same = all(before.get(name) == now.get(name) for name in said)
    return before if same else {key: value for key, value in before.items() if key not in (*OF_TEXTS, "lightness")}


def manifest_of(location: Location) -> dict | None:
    """The llmlite.json that describes these weights: a GGUF file beside an artifact's own is not described by it."""
    if location.engine == "llama.cpp" and location.path.name != GGUF_FILE:
        return None
    return read_manifest(location.directory)
