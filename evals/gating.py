"""What `llmlite gate` does: find or measure the figures that the rules name, then judge them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from llmlite.checkpoint.artifact import read_manifest
from llmlite.errors import InputError
from llmlite.evals.digests import digest_of
from llmlite.evals.evaluate import EvalSettings, evaluate
from llmlite.evals.figures import lookup
from llmlite.evals.gate import Verdict, base_figure, judge
from llmlite.evals.locate import Location, find
from llmlite.evals.obtain import measured, read_evaluation
from llmlite.evals.ruleset import OF_BASE, Rules, check_rules
from llmlite.evals.structure import Structure, compare_structure
from llmlite.evals.verdict import verdict_markdown, write_junit
from llmlite.options import check_values

MEASURED_ALONE = ("memory", "speed", "lightness")  # settings that need nothing named beside them
SAME_IDS = ("tokenizer", "prefix_token")


@dataclass(frozen=True)
class GateSettings(EvalSettings):
    """What `gate` can be told: the rules, where the verdict goes, and all that an evaluation can be told."""

    rules: tuple[str, ...] = field(
        default=(), metadata={"help": "YAML files of rules, or ready ones: 4bit, 8bit, 8gb, kv"}
    )
    measured: Path | None = field(
        default=None, metadata={"help": "judge this JSON of llmlite eval; nothing is measured"}
    )
    base_measured: Path | None = field(
        default=None, metadata={"help": "the base's own evaluation as JSON, for bounds against it"}
    )
    junit: Path | None = field(default=None, metadata={"help": "write the verdict as JUnit XML"})
    summary: Path | None = field(default=None, metadata={"help": "write the verdict as Markdown"})
    github_summary: bool = field(
        default=False, metadata={"help": "append the Markdown to the file that GITHUB_STEP_SUMMARY names"}
    )

    def check(self) -> None:
        """`InputError` for what can't be measured, or can't be written when all is measured."""
        super().check()
        for file in (self.junit, self.summary):
            if file is not None and not file.absolute().parent.is_dir():
                raise InputError(f"{file}: its folder is not there")
        if self.github_summary:
            _step_summary()

    def _check_base(self) -> None:
        """A base without a text is right here: the structure is compared, and kept figures may do."""


def run_gate(artifact: str, rules: Rules, settings: GateSettings) -> Verdict:
    """Judge an artifact by ``rules``; `InputError` for rules or an artifact that can't be used."""
    settings.check()
    if settings.measured is not None:
        facts = read_evaluation(settings.measured)
        check_rules(rules, facts)
        return judge(rules, facts, _given_base(settings))
    check_rules(rules, None)
    location = find(artifact)
    wanted = _eval_settings(rules, settings, location)
    facts, missing = _measure(artifact, location, rules, wanted)
    base = _given_base(settings)
    if base is None and wanted.base is not None and _lacks_base(rules, facts):
        base = evaluate(wanted.base, replace(wanted, base=None)).to_json()
    return judge(rules, facts, base, missing)


def measure_values(rules: Rules) -> dict[str, Any]:
    """What the rules say about measuring, as settings of an evaluation; `InputError` for what is none."""
    return check_values(rules.measure, EvalSettings, "rules, measure")


def write_verdict(verdict: Verdict, settings: GateSettings) -> None:
    """JUnit XML and Markdown, where asked for; `InputError` where there is no step summary to append to."""
    if settings.junit is not None:
        write_junit([verdict], settings.junit)
    if settings.summary is not None:
        settings.summary.write_text(verdict_markdown(verdict), encoding="utf-8")
    if settings.github_summary:
        with open(_step_summary(), "a", encoding="utf-8") as file:
            file.write(verdict_markdown(verdict))


def _step_summary() -> Path:
    name = os.environ.get("GITHUB_STEP_SUMMARY", "")
    if not name:
        raise InputError("--github-summary: GITHUB_STEP_SUMMARY names no file; a workflow of GitHub Actions sets it")
    return Path(name)


def _given_base(settings: GateSettings) -> dict[str, Any] | None:
    return read_evaluation(settings.base_measured) if settings.base_measured is not None else None


def _eval_settings(rules: Rules, settings: GateSettings, location: Location) -> EvalSettings:
    """The part of the settings that an evaluation knows, with what the rules need; the base is the manifest's."""
    known = {name: getattr(settings, name) for name in EvalSettings.__dataclass_fields__}
    for section in MEASURED_ALONE:
        if section in known:
            known[section] = known[section] or rules.needs(section)
    needs_base = rules.needs("structure") or any(
        rule.needs_base or ".divergence." in rule.figure for rule in rules.rules
    )
    if known["base"] is None and needs_base:
        source = (read_manifest(location.directory) or {}).get("base", {}).get("source")
        if isinstance(source, str) and Path(source).exists():
            known["base"] = source
    return EvalSettings(**known)


def _measure(
    artifact: str, location: Location, rules: Rules, wanted: EvalSettings
) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures, and why sections are missing. Structure comes first: unlike tokens can't be compared at all."""
    missing: dict[str, str] = {}
    structure: Structure | None = None
    if wanted.base is not None:
        structure = compare_structure(find(wanted.base), location)
        for name in SAME_IDS:
            aspect = structure.aspects.get(name)
            if aspect is not None and not aspect.equal:
                missing["texts"] = f"its predictions can't be compared with the base's: {aspect.detail}"
        missing["structure"] = "; ".join(structure.unknown.values())
    elif rules.needs("structure"):
        missing["structure"] = "name the base with --base"
    if "texts" in missing:
        wanted = replace(wanted, text=())
    facts = dict(measured(artifact, wanted))
    if structure is not None:
        facts["structure"] = structure.to_json()
    kept = facts.get("texts") if wanted.base is not None and not wanted.text else None
    if kept and facts.get("base_sha256") != digest_of(find(str(wanted.base))):
        missing.setdefault("texts", "the figures that llmlite.json holds are against another base")
        del facts["texts"]
    if rules.needs("texts"):
        missing.setdefault("texts", "name a text with --text, and the base with --base")
    return facts, {section: reason for section, reason in missing.items() if reason}


def _lacks_base(rules: Rules, facts: dict[str, Any]) -> bool:
    """A rule compares with a figure of the base that the artifact's own evaluation does not tell."""
    return any(
        base_figure(facts, None, figure) is None
        for rule in rules.rules
        if any(name.endswith(OF_BASE) for name in rule.bounds)
        for figure in lookup(facts, rule.figure)
    )
