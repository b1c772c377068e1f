"""What `llmlite report` does: read what was measured, and write it down for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmlite.errors import InputError
from llmlite.evals.compare import short_names
from llmlite.evals.gate import Verdict, judge
from llmlite.evals.locate import find
from llmlite.evals.obtain import read_evaluation, read_figures
from llmlite.evals.report.card import write_card
from llmlite.evals.report.page import html_page, markdown_page
from llmlite.evals.report.sections import headline, sections
from llmlite.evals.ruleset import check_rules, read_rules

IN_CARD = ("gate", "size", "divergence", "perplexity", "memory", "speed", "tasks", "long_context", "how")


@dataclass(frozen=True)
class ReportSettings:
    """What `report` can be told."""

    markdown: Path | None = field(default=None, metadata={"help": "also write the tables as Markdown"})
    model_card: bool = field(
        default=False, metadata={"help": "also write a section into the artifact's README.md, between markers"}
    )
    rules: tuple[str, ...] = field(
        default=(), metadata={"help": "YAML files of rules, or 4bit, 8bit, 8gb, kv: judge by them"}
    )
    base_measured: Path | None = field(
        default=None, metadata={"help": "the base's own evaluation as JSON, for rules against it"}
    )
    protocol: str | None = field(default=None, metadata={"help": "whose figures to take (default: llama.cpp's)"})
    title: str | None = field(default=None, metadata={"help": "heading of the page (default: the artifact's name)"})


@dataclass(frozen=True)
class Report:
    """Evaluations by name, verdicts of the gate, and the files that were written."""

    evaluations: Mapping[str, Mapping[str, Any]]
    verdicts: Sequence[Verdict]
    written: tuple[str, ...]

    def to_json(self) -> dict:
        """Plain data: artifacts, gate, written."""
        return {
            "artifacts": dict(self.evaluations),
            "gate": [verdict.to_json() for verdict in self.verdicts],
            "written": list(self.written),
        }


def write_report(sources: Sequence[str], out: Path | None, settings: ReportSettings) -> Report:
    """Write the page ``out`` and what ``settings`` name; nothing is measured.

    ``sources``: artifacts with an llmlite.json, or JSON files of `llmlite eval`; the first is what the report is of.
    `InputError` where there are no figures, or a file can't be written.
    """
    for file in (out, settings.markdown):
        if file is not None and (not file.absolute().parent.is_dir() or file.is_dir()):
            raise InputError(f"{file}: is a directory, or its folder is not there; a file to write is right")
    if settings.model_card and sources[0].endswith(".json"):
        raise InputError("--model-card: name the artifact itself, so that its README.md is known")
    found = [read_figures(source, settings.protocol) for source in sources]
    evaluations = dict(zip(short_names([str(facts["artifact"]) for facts in found]), found, strict=True))
    verdicts = _verdicts(evaluations, settings)
    name, facts = next(iter(evaluations.items()))
    title = settings.title or name
    parts, top = sections(evaluations, verdicts), headline(name, facts)
    written = []
    if out is not None:
        out.write_text(html_page(title, top, parts, verdicts), encoding="utf-8")
        written.append(str(out))
    if settings.markdown is not None:
        settings.markdown.write_text(markdown_page(title, top, parts), encoding="utf-8")
        written.append(str(settings.markdown))
    if settings.model_card:
        file = find(sources[0]).directory / "README.md"
        chosen = [part for part in parts if part.anchor in IN_CARD]
        write_card(file, markdown_page("What compression cost", top, chosen, level=2), title)
        written.append(str(file))
    return Report(evaluations, verdicts, tuple(written))


def _verdicts(evaluations: Mapping[str, Mapping[str, Any]], settings: ReportSettings) -> list[Verdict]:
    if not settings.rules:
        return []
    rules = read_rules(settings.rules)
    base = read_evaluation(settings.base_measured) if settings.base_measured is not None else None
    for facts in evaluations.values():
        check_rules(rules, facts)
    return [judge(rules, facts, base) for facts in evaluations.values()]
