"""The rules of a gate, read from YAML: a figure, a bound on it, and why.

    measure: {windows: 24}             # settings of `llmlite eval`, for figures that are not there yet
    rules:
      - figure: texts.*.divergence.mean_kl
        at_most: 0.1
        because: the predictions must stay those of the base

A rule has one or more bounds: ``at_most``, ``at_least``, ``equals`` (true, false or a number), and against the same
figure of the base ``at_most_times_base`` and ``at_least_times_base``. Sizes may be written as 7.2 GiB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from llmlite.errors import InputError, first_line
from llmlite.evals.figures import check_address, nearest
from llmlite.plan.budget import parse_size

BOUNDS = ("at_most", "at_least", "equals", "at_most_times_base", "at_least_times_base")
OF_BASE = "_times_base"
KEYS = ("figure", "because", *BOUNDS)
READY = ("4bit", "8bit", "8gb", "kv")


@dataclass(frozen=True)
class Rule:
    """One demand: ``bounds`` maps names of `BOUNDS` to their values; ``source`` names the file that has it."""

    figure: str
    bounds: dict[str, float | bool]
    because: str = ""
    source: str = ""

    @property
    def needs_base(self) -> bool:
        """It can't be judged without the base's own figure."""
        return any(name.endswith(OF_BASE) for name in self.bounds)


@dataclass(frozen=True)
class Rules:
    """What a gate demands. ``measure``: settings of an evaluation by name, for what is not measured yet."""

    rules: tuple[Rule, ...]
    measure: dict[str, Any] = field(default_factory=dict)

    def needs(self, section: str) -> bool:
        """A rule has a figure of this section of the evaluation, as in "memory"."""
        return any(rule.figure.split(".")[0] == section for rule in self.rules)


def read_rules(sources: tuple[str, ...]) -> Rules:
    """Rules from files, or ready ones by their names, one after the other; `InputError` for what is no rule."""
    if not sources:
        raise InputError(f"no rules: name a file with --rules, or one of {', '.join(READY)}")
    read = [_read(source) for source in sources]
    measure: dict[str, Any] = {}
    for rules in read:
        for key, value in rules.measure.items():
            if measure.setdefault(key, value) != value:
                raise InputError(f"two sets of rules want {key} to be {measure[key]!r} and {value!r}: gate them apart")
    return Rules(tuple(rule for rules in read for rule in rules.rules), measure)


def _read(source: str) -> Rules:
    ready = files("llmlite.evals").joinpath(f"rules/{source}.yaml") if source in READY else Path(source)
    if source not in READY and "." not in source and not Path(source).is_file():
        raise InputError(f"--rules {source}: neither a file nor a ready set of rules{nearest(source, list(READY))}")
    try:
        content = yaml.safe_load(ready.read_text())
    except OSError as error:
        raise InputError(f"--rules {source}: can't be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"--rules {source}: is not YAML ({first_line(error)})") from None
    return parse_rules(content, source)


def parse_rules(content: Any, source: str) -> Rules:
    """Rules from what YAML gave; ``source`` names it in what is said of it."""
    if not isinstance(content, Mapping) or not isinstance(content.get("rules"), list) or not content["rules"]:
        raise InputError(f"{source}: a key 'rules' with a list of rules is right")
    for key in content:
        if key not in ("rules", "measure"):
            raise InputError(f"{source}: unknown key {key!r}{nearest(str(key), ['rules', 'measure'])}")
    measure = content.get("measure") or {}
    if not isinstance(measure, Mapping):
        raise InputError(f"{source}: measure: settings of `llmlite eval` as 'key: value' lines are right")
    rules = tuple(_rule(rule, f"{source}, rule {number}") for number, rule in enumerate(content["rules"], 1))
    return Rules(rules, {str(key).replace("-", "_"): value for key, value in measure.items()})


def _rule(content: Any, where: str) -> Rule:
    if not isinstance(content, Mapping):
        raise InputError(f"{where}: 'figure: ADDRESS' and a bound are right")
    for key in content:
        if key not in KEYS:
            raise InputError(f"{where}: unknown key {key!r}{nearest(str(key), list(KEYS))}")
    figure = content.get("figure")
    if not isinstance(figure, str) or not all(figure.split(".")):
        raise InputError(f"{where}: figure is {figure!r}; an address as in texts.*.divergence.mean_kl is right")
    bounds = {name: _bound(content[name], name, where) for name in BOUNDS if name in content}
    if not bounds:
        raise InputError(f"{where}: {figure} has no bound; one of {', '.join(BOUNDS)} is right")
    because = content.get("because", "")
    if not isinstance(because, str):
        raise InputError(f"{where}: because is {because!r}; a sentence is right")
    return Rule(figure, bounds, because, where)


def _bound(value: Any, name: str, where: str) -> float | bool:
    if isinstance(value, bool):
        if name == "equals":
            return value
    elif isinstance(value, int | float) and math.isfinite(value):
        return value
    elif isinstance(value, str) and not name.endswith(OF_BASE):
        try:
            return parse_size(value)
        except InputError:
            pass  # told below, with the place
    right = "true, false or a number" if name == "equals" else "a number"
    raise InputError(f"{where}: {name} is {value!r}; {right} is right")


def check_rules(rules: Rules, facts: Mapping[str, Any] | None) -> None:
    """`InputError` for a figure that no evaluation has; ``facts`` may have more than what is known beforehand."""
    for rule in rules.rules:
        check_address(rule.figure, facts, rule.source)
