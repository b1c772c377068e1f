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
    """One suite: tests that passed, that are waived with the reason, that failed; notes in words."""

    name: str
    version: str
    passed: list[str]
    waived: list[Waived]
    failed: list[str]
    notes: list[str] = field(default_factory=list)


def read_outcomes(name: str, version: str, file: Path, notes: Sequence[str] = ()) -> Suite:
    """A suite from the file that the plugin wrote; a test that was skipped counts as waived, with pytest's reason."""
    found = json.loads(file.read_text("utf-8"))
    passed = [test["test"] for test in found if test["outcome"] == "passed"]
    failed = [test["test"] for test in found if test["outcome"] == "failed"]
    waived = [
        Waived(test["test"], (test["reason"] or "").removeprefix("Skipped: "))
        for test in found
        if test["outcome"] in ("waived", "skipped")
    ]
    return Suite(name, version, passed, waived, failed, list(notes))


def as_markdown(suites: Sequence[Suite], command: str, about: str) -> str:
    """The page: a table, what failed, and every waiver's reason with its tests."""
    lines = ["# Suites by others", "", about, "", f"    {command}", ""]
    lines += ["| suite | version | passed | waived | failed |", "|---|---|--:|--:|--:|"]
    for suite in suites:
        counts = f"{len(suite.passed)} | {len(suite.waived)} | {len(suite.failed)}"
        lines.append(f"| {suite.name} | {suite.version} | {counts} |")
    for suite in suites:
        lines += ["", f"## {suite.name}", "", *(f"- {note}" for note in suite.notes)]
        lines += [f"- FAILED {test}" for test in suite.failed]
        reasons = Counter(waived.reason for waived in suite.waived)
        for reason, count in reasons.most_common():
            names = sorted({_short(waived.test) for waived in suite.waived if waived.reason == reason})
            lines.append(f"- waived, {count}: {reason}: {', '.join(f'`{name}`' for name in names)}")
    return "\n".join(lines) + "\n"


def _short(test: str) -> str:
    return test.partition("[")[0].rpartition("/")[2].replace("langchain_suite.py::TestServer::", "")
