"""The rows of all cases as JSON and as a table."""

from __future__ import annotations

import json
from pathlib import Path


def row(what: str, llmlite: float, peer: float | None, bar: str, met: bool | None) -> dict:
    """One line: a figure of ours, the peer's, the bar that it is held to and whether it is met; None: no bar."""
    return {"what": what, "llmlite": llmlite, "peer": peer, "bar": bar, "met": met}


def write_report(out: Path, about: dict, found: dict) -> None:
    out.with_suffix(".json").write_text(json.dumps({**about, "cases": found}, indent=1) + "\n")
    lines = ["# llmlite's server beside llama-server", ""]
    lines += [f"- {key}: {f'`{value}`' if key == 'command' else value}" for key, value in about.items()]
    lines += ["", "| case | figure | llmlite | llama-server | bar | met |", "|---|---|--:|--:|---|---|"]
    for case, rows in found.items():
        for one in rows:
            peer = "" if one["peer"] is None else f"{one['peer']:.4g}"
            met = {True: "yes", False: "**no**", None: ""}[one["met"]]
            lines.append(f"| {case} | {one['what']} | {one['llmlite']:.4g} | {peer} | {one['bar']} | {met} |")
    out.with_suffix(".md").write_text("\n".join(lines) + "\n")
