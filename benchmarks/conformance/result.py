"""What a suite gave, and the table of all of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Waived:
    test: str
    reason: str


@dataclass(frozen=True)
class Suite:
    """One suite: tests that passed, that failed, that are waived and that were not run with the reason; notes."""

    name: str
    version: str
    passed: list[str]
    failed: list[str]
    waived: list[Waived] = field(default_factory=list)
    skipped: list[Waived] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_outcomes(name: str, version: str, file: Path, notes: Sequence[str] = ()) -> Suite:
    """A suite from the file that the plugin wrote."""
    found = json.loads(file.read_text("utf-8"))

    def named(outcome: str) -> list[str]:
        return [test["test"] for test in found if test["outcome"] == outcome]

    def reasons(outcome: str) -> list[Waived]:
        told = [test for test in found if test["outcome"] == outcome]
        return [Waived(test["test"], (test["reason"] or "").removeprefix("Skipped: ")) for test in told]

    return Suite(
        name, version, named("passed"), named("failed"), reasons("waived"), reasons("skipped"), list(notes)
    )  # fmt: skip


def as_markdown(suites: Sequence[Suite], command: str, about: str) -> str:
    """The page: a table, what failed, and every reason with its tests."""
    lines = ["# Suites by others", "", f"    {command}", "", about, ""]
    lines += ["| suite | version | passed | waived | not run | failed |", "|---|---|--:|--:|--:|--:|"]
    for suite in suites:
        counts = " | ".join(str(len(part)) for part in (suite.passed, suite.waived, suite.skipped, suite.failed))
        lines.append(f"| {suite.name} | {suite.version} | {counts} |")
    for suite in suites:
        lines += ["", f"## {suite.name}", "", *(f"- {note}" for note in suite.notes)]
        lines += [f"- FAILED {test}" for test in suite.failed]
        for what, part in (("waived", suite.waived), ("not run", suite.skipped)):
            reasons = Counter(one.reason for one in part)
            for reason, count in reasons.most_common():
                names = sorted({_short(one.test) for one in part if one.reason == reason})
                lines.append(f"- {what}, {count}: {reason}: {', '.join(f'`{name}`' for name in names)}")
    return "\n".join(lines) + "\n"


def _short(test: str) -> str:
    return test.partition("[")[0].rpartition("/")[2].replace("langchain_suite.py::TestServer::", "")
