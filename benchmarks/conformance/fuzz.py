"""What schemathesis found: one test for each operation of the OpenAPI document."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.conformance.result import Suite

WAIVED = {
    "positive_data_acceptance": "a schema can't say that a model of that name is served, that token ids lie in its "
    "vocabulary, that a prompt fits the context or that one field needs another",
}
"""Checks that are left out, each with its reason."""


def read_operations(version: str, report: Path, log: Path) -> Suite:
    """From the JUnit report; the log tells how many requests there were."""
    passed: list[str] = []
    failed: list[str] = []
    for case in ElementTree.parse(report).iter("testcase"):
        problems = [*case.iter("failure"), *case.iter("error")]
        told = "; ".join(" ".join((problem.text or "").split())[:300] for problem in problems)
        (failed if problems else passed).append(case.attrib["name"] + (f": {told}" if problems else ""))
    counted = re.search(r"(\d+) generated", log.read_text("utf-8"))
    notes = [f"{counted.group(1)} requests" if counted else "the log does not tell how many requests"]
    notes += [f"the check {name} is left out: {reason}" for name, reason in WAIVED.items()]
    return Suite("schemathesis on /openapi.json, by operation", version, passed, failed, notes=notes)
