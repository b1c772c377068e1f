"""Byte-level BPE pre-tokenizers, read from pretokenizers.toml: between GGUF's names and tokenizer.json's steps."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class PreTokenizer:
    """One row of pretokenizers.toml, where the fields are described."""

    names: tuple[str, ...]
    steps: tuple[str, ...]
    normalizer: str
    ignore_merges: bool
    add_bos: bool


def _load() -> tuple[tuple[PreTokenizer, ...], frozenset[str]]:
    table = tomllib.loads(files("llmlite.checkpoint").joinpath("pretokenizers.toml").read_text())
    rows = (
        PreTokenizer(
            names=tuple(row["names"]),
            steps=tuple(row["steps"]),
            normalizer=row["normalizer"],
            ignore_merges=row["ignore_merges"],
            add_bos=row["add_bos"],
        )
        for row in table["bpe"]
    )
    return tuple(rows), frozenset(table["end"]["tokens"])


PRETOKENIZERS, END_TOKENS = _load()
BY_NAME = {name: row for row in PRETOKENIZERS for name in row.names}
NORMALIZERS: dict[str, Any] = {"": None, "NFC": {"type": "NFC"}}


def to_json(row: PreTokenizer) -> dict[str, Any]:
    """The normalizer and pre_tokenizer entries of a tokenizer.json that cuts as this row does."""
    steps: list[dict[str, Any]] = []
    for step in row.steps:
        if step == "digits":
            steps.append({"type": "Digits", "individual_digits": True})
        elif step != "gpt2":
            steps.append({"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False})
    own_pattern = row.steps[-1] == "gpt2"
    steps.append({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": own_pattern})
    pre_tokenizer = steps[0] if len(steps) == 1 else {"type": "Sequence", "pretokenizers": steps}
    return {"normalizer": NORMALIZERS[row.normalizer], "pre_tokenizer": pre_tokenizer}


def from_json(tokenizer: dict[str, Any]) -> PreTokenizer | None:
    """The row that cuts exactly as this tokenizer.json does, None where there is none: never the nearest."""
    steps = _steps(tokenizer["pre_tokenizer"])
    normalizer = _normalizer(tokenizer["normalizer"])
    ignore_merges = tokenizer["model"].get("ignore_merges", False)
    for row in PRETOKENIZERS:
        if (row.steps, row.normalizer, row.ignore_merges) == (steps, normalizer, ignore_merges):
            return row
    return None


def _normalizer(entry: dict[str, Any] | None) -> str | None:
    if entry is None:
        return ""
    if entry["type"] == "Sequence" and len(entry["normalizers"]) < 2:
        return _normalizer(entry["normalizers"][0]) if entry["normalizers"] else ""
    return "NFC" if entry["type"] == "NFC" else None


def _steps(entry: dict[str, Any] | None) -> tuple[str, ...] | None:
    """The steps of a pre_tokenizer entry in the table's words, None for one that the table has no words for."""
    if entry is None:
        return None
    members = entry["pretokenizers"] if entry["type"] == "Sequence" else [entry]
    if not members or members[-1]["type"] != "ByteLevel" or members[-1]["add_prefix_space"]:
        return None
    steps: list[str] = []
    for member in members[:-1]:
        if member["type"] == "Digits" and member["individual_digits"]:
            steps.append("digits")
        elif member["type"] == "Split" and member["behavior"] == "Isolated" and "Regex" in member["pattern"]:
            steps.append(member["pattern"]["Regex"])
        else:
            return None
    if members[-1].get("use_regex", True):
        steps.append("gpt2")
    return tuple(steps)
