"""An artifact's figures: from a file of `llmlite eval --json`, from its llmlite.json where they are still valid, or
measured now."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmlite.errors import InputError
from llmlite.evals.digests import digest_of
from llmlite.evals.engines import engine_version
from llmlite.evals.evaluate import EvalSettings, evaluate, save_in_manifest
from llmlite.evals.locate import Location, find
from llmlite.evals.measured import manifest_of, still_valid

KEPT = ("memory", "speed")  # sections that depend on nothing but the artifact and the machine
ASKS = ("text", "tasks", "long_context", "budget", "lightness", *KEPT)  # settings that want something measured
GROUPS = ("texts", "memory", "speed", "tasks", "long_context", "lightness", "structure", "protocol", "budget")


def read_evaluation(file: Path) -> dict[str, Any]:
    """The JSON that `llmlite eval --json` wrote; `InputError` for what is not one."""
    try:
        facts = json.loads(file.read_text())
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror})") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{file}: is not JSON ({error})") from None
    if not isinstance(facts, dict) or not isinstance(facts.get("engine"), dict) or "artifact" not in facts:
        raise InputError(f"{file}: is not an evaluation; what `llmlite eval --json {file}` writes is right")
    for group in GROUPS:
        if not isinstance(facts.get(group, {}), dict):
            raise InputError(f"{file}: {group} is not a JSON object: not an evaluation")
    for group in ("texts", "tasks"):
        for name, of in facts.get(group, {}).items():
            if not isinstance(of, dict):
                raise InputError(f"{file}: {group}.{name} is not a JSON object: not an evaluation")
    return facts


def kept_evaluations(location: Location) -> dict[str, dict[str, Any]]:
    """What llmlite.json has of these very weights, by protocol; empty where it says nothing or is of another file."""
    kept = (manifest_of(location) or {}).get("evals", {})
    found = {name: facts for name, facts in kept.items() if isinstance(facts, dict) and "sha256" in facts}
    own = digest_of(location) if found else ""
    return {name: facts for name, facts in found.items() if facts["sha256"] == own}


def read_figures(source: str, protocol: str | None = None) -> dict[str, Any]:
    """The evaluation that a JSON file or an artifact holds, nothing measured.

    Of an artifact with evaluations by several protocols, the one asked for, or llama.cpp's, or the first.
    """
    if source.endswith(".json"):
        return read_evaluation(Path(source))
    kept = kept_evaluations(find(source))
    if not kept:
        raise InputError(f"{source}: llmlite.json has no figures of these weights; `llmlite eval {source}` measures")
    if protocol is not None and protocol not in kept:
        raise InputError(f"{source}: has no figures by protocol {protocol!r}; there are those by {', '.join(kept)}")
    wanted = protocol or ("llama.cpp" if "llama.cpp" in kept else next(iter(kept)))
    return {**kept[wanted], "artifact": source}


def measured(artifact: str, settings: EvalSettings) -> dict[str, Any]:
    """The evaluation's JSON of all that ``settings`` ask for, and of what llmlite.json holds besides.

    Memory and speed are measured where llmlite.json has none by this engine, and where ``again`` asks for it; of texts
    `evaluate` says what is reused.
    """
    location = find(artifact)
    kept = kept_evaluations(location).get(settings.protocol, {})
    if kept and kept["engine"].get("version") != engine_version(location.engine):
        kept = {}
    known = [] if settings.again else [section for section in KEPT if _has(kept, section, settings)]
    wanted = replace(settings, **dict.fromkeys(known, False))
    if kept and not any(getattr(wanted, name) for name in ASKS):
        return {**kept, "artifact": artifact}
    alone = not wanted.text and not wanted.long_context
    found = evaluate(artifact, replace(wanted, base=None) if alone else wanted)
    save_in_manifest(artifact, found)
    figures = found.to_json()
    return {**still_valid(kept, figures), **figures}


def _has(kept: dict[str, Any], section: str, settings: EvalSettings) -> bool:
    """The section was measured, at every context that the settings name."""
    at = {one.get("context") for one in kept.get(section, {}).get("contexts") or []}
    return section in kept and at.issuperset(settings.contexts)
