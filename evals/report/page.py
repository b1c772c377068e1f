"""Sections as one HTML page that needs nothing else, and as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files

import jinja2
from markupsafe import Markup

from llmlite import __version__
from llmlite.evals.gate import Verdict
from llmlite.evals.markdown import cell, row
from llmlite.evals.report.views import Section, Table

MARKS = {"bad": ("FAILED", "DIFFERS"), "good": ("passed",)}


def html_page(
    title: str, headline: Sequence[tuple[str, str, str]], sections: Sequence[Section], verdicts: Sequence[Verdict]
) -> str:
    """The whole page; every text is escaped, pictures stand inside, and nothing is loaded from anywhere."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["drawn"] = Markup  # SVG by matplotlib, which escapes the names in it
    source = files("llmlite.evals.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        title=title, headline=headline, sections=sections, verdicts=verdicts, version=__version__, marks=MARKS
    )


def markdown_page(
    title: str, headline: Sequence[tuple[str, str, str]], sections: Sequence[Section], level: int = 1
) -> str:
    """The same without pictures; ``level``: of the first heading. What was not measured is named at the end."""
    mark = "#" * level
    lines = [f"{mark} {cell(title)}", ""]
    lines += [
        f"- {cell(what)}: **{cell(figure)}**{f' ({cell(remark)})' if remark else ''}"
        for what, figure, remark in headline
    ]
    for section in sections:
        if section.tables:
            lines += ["", f"{mark}# {cell(section.title)}", ""]
            lines += [cell(section.text), ""] if section.text else []
            lines += ["\n\n".join(markdown_table(table) for table in section.tables)]
    absent = [section.title.lower() for section in sections if not section.measured]
    lines += ["", f"Not measured: {cell(', '.join(absent))}."] if absent else []
    return "\n".join([*lines, "", f"Made by llmlite {__version__}.", ""])


def markdown_table(table: Table) -> str:
    """A table as GitHub's Markdown has it."""
    rule = ["---:" if name in table.right else "---" for name in table.head]
    rows = [row([cell(name) for name in table.head]), row(rule)]
    rows += [row([cell(text) for text in of]) for of in table.rows]
    return "\n".join([f"**{cell(table.caption)}**", "", *rows] if table.caption else rows)
