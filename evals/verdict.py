"""A gate's verdict for people and for programs: a table, JUnit XML, and Markdown as CI systems show it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from llmlite.evals.gate import Check, Verdict, number
from llmlite.evals.markdown import cell, row

NOT_IN_XML = re.compile(r"[^\t\n\r\x20-\uD7FF\uE000-\uFFFD\U00010000-\U0010FFFF]")  # XML 1.0, production 2


def verdict_table(verdict: Verdict) -> Table:
    """A row per check."""
    failed = sum(not check.passed for check in verdict.checks)
    of = f"{len(verdict.checks)} checks"
    caption = f"gate passed: {of}" if verdict.passed else f"gate FAILED: {failed} of {of}"
    table = Table(title=Text(verdict.artifact), caption=caption, box=SIMPLE_HEAD)
    for name in ("figure", "value", "bound", "", "why"):
        table.add_column(name, justify="right" if name == "value" else "left", overflow="fold")
    for check in verdict.checks:
        style = "" if check.passed else "red"
        words = (check.figure, number(check.value), check.limit, "passed" if check.passed else "FAILED", _why(check))
        table.add_row(*(Text(word, style=style) for word in words))
    return table


def _why(check: Check) -> str:
    return "" if check.passed else "; ".join(part for part in (check.reason, check.because) if part)


def write_junit(verdicts: Sequence[Verdict], file: Path) -> None:
    """JUnit XML as CI systems read it: a suite per artifact, a test case per check."""
    root = ElementTree.Element("testsuites", name="llmlite gate")
    for verdict in verdicts:
        failed = sum(not check.passed for check in verdict.checks)
        suite = ElementTree.SubElement(
            root, "testsuite", name=_xml(verdict.artifact), tests=str(len(verdict.checks)), failures=str(failed),
            errors="0", skipped="0",
        )  # fmt: skip
        for check in verdict.checks:
            name = _xml(f"{check.figure} {check.limit}")
            case = ElementTree.SubElement(suite, "testcase", classname=_xml(verdict.artifact), name=name, time="0")
            if not check.passed:
                message = _xml(f"{check.figure} is {number(check.value)}: {_why(check)}")
                ElementTree.SubElement(case, "failure", message=message, type="bound").text = message
            else:
                ElementTree.SubElement(case, "system-out").text = _xml(f"{check.figure} is {number(check.value)}")
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(file, encoding="utf-8", xml_declaration=True)


def _xml(text: str) -> str:
    return NOT_IN_XML.sub("�", text)


def verdict_markdown(verdict: Verdict) -> str:
    """The verdict as GitHub shows it in a step's summary: a heading, one sentence, a table."""
    failed = sum(not check.passed for check in verdict.checks)
    mark = (
        f"✅ passed, {len(verdict.checks)} checks"
        if verdict.passed
        else f"❌ failed, {failed} of {len(verdict.checks)}"
    )
    lines = [f"### Gate: {cell(verdict.artifact)}", "", f"{mark}.", ""]
    lines += [row(["", "figure", "value", "bound", "why"]), row(["---"] * 5)]
    for check in verdict.checks:
        sign = "✅" if check.passed else "❌"
        lines.append(row([sign, cell(check.figure), number(check.value), cell(check.limit), cell(_why(check))]))
    return "\n".join(lines) + "\n"
