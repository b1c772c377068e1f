"""The gate: rules applied to the figures of an evaluation. What was not measured has not passed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llmlite.evals.figures import expand, lookup
from llmlite.evals.ruleset import OF_BASE, Rule, Rules

WORDS = {"at_most": "at most", "at_least": "at least", "equals": "equal to"}


@dataclass(frozen=True)
class Check:
    """One figure against one bound. ``value`` is None where it was not measured; ``limit`` says the bound in words.

    ``reason``: why it failed, "" where it passed.
    """

    figure: str
    value: float | bool | None
    limit: str
    passed: bool
    reason: str
    because: str


@dataclass(frozen=True)
class Verdict:
    """What the gate found of an artifact: every check, in the rules' order."""

    artifact: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    def to_json(self) -> dict:
        """Plain data: artifact, passed, and the checks."""
        return {"artifact": self.artifact, "passed": self.passed, "checks": [vars(check) for check in self.checks]}


def judge(
    rules: Rules,
    facts: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    missing: Mapping[str, str] | None = None,
) -> Verdict:
    """Apply the rules to an evaluation's JSON.

    ``base``: the base's own evaluation, for bounds against it. ``missing``: why a section was not measured, by name.
    """
    checks = [check for rule in rules.rules for check in _apply(rule, facts, base, missing or {})]
    return Verdict(str(facts.get("artifact", "")), tuple(checks))


def _apply(
    rule: Rule, facts: Mapping[str, Any], base: Mapping[str, Any] | None, missing: Mapping[str, str]
) -> list[Check]:
    out = []
    for name, bound in rule.bounds.items():
        for figure, value in expand(facts, rule.figure).items():
            if value is None:
                section = rule.figure.split(".")[0]
                reason = f"not measured: {missing[section]}" if section in missing else "not measured"
                out.append(Check(figure, None, _limit(name, bound), False, reason, rule.because))
            else:
                out.append(_check(rule, name, bound, figure, value, base_figure(facts, base, figure)))
    return out


def _check(
    rule: Rule, name: str, bound: float | bool, figure: str, value: float | bool, base: float | bool | None
) -> Check:
    limit = _limit(name, bound)
    reason = ""
    if name.endswith(OF_BASE):
        if base is None:
            return Check(figure, value, limit, False, "the base's own figure was not measured", rule.because)
        name, bound, limit = name.removesuffix(OF_BASE), bound * base, f"{limit} = {number(bound * base)}"
    if not math.isfinite(value):
        reason = f"is {value}"
    elif name == "at_most" and not value <= bound:
        reason = f"above by {number(value - bound)}"
    elif name == "at_least" and not value >= bound:
        reason = f"below by {number(bound - value)}"
    elif name == "equals" and value != bound:
        reason = f"is {number(value)}"
    return Check(figure, value, limit, not reason, reason, rule.because)


def _limit(name: str, bound: float | bool) -> str:
    words = f"{WORDS[name.removesuffix(OF_BASE)]} {number(bound)}"
    return f"{words} x the base's" if name.endswith(OF_BASE) else words


def base_figure(facts: Mapping[str, Any], base: Mapping[str, Any] | None, figure: str) -> float | bool | None:
    """The base's figure of the same address, None where it is not known.

    A perplexity is also known from the divergence on the same windows.
    """
    text, _, rest = figure.removeprefix("texts.").partition(".")
    if figure.startswith("texts.") and rest == "perplexity.value":
        own = f"texts.{text}.divergence.base_perplexity"
        if found := lookup(facts, own):
            return found[own]
    return lookup(base, figure).get(figure) if base is not None else None


def number(value: float | bool | None) -> str:
    """Short, for people: true and false as words, 5 digits, thousands apart."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.5g}"
