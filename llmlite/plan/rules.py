"""Types by pattern, over what a preset gives: ``\\.mlp\\.down_proj=q6_k``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from llmlite.errors import InputError
from llmlite.formats.gguf.types import TYPES


@dataclass(frozen=True)
class TypeRule:
    """Matrices whose Hugging Face name the regular expression ``pattern`` finds become ``type``."""

    pattern: str
    type: str


def parse_rules(texts: Iterable[str]) -> tuple[TypeRule, ...]:
    """Rules from PATTERN=TYPE (or PATTERN: TYPE); `InputError` for what is not a pattern or not a type."""
    return tuple(_parse(text) for text in texts)


def _parse(text: str) -> TypeRule:
    match = re.fullmatch(r"(.+?)\s*[=:]\s*(\w+)", text.strip())
    if match is None:
        raise InputError(f"types {text!r}: PATTERN=TYPE is right, as in down_proj=q6_k")
    pattern, kind = match[1], match[2].lower()
    if kind not in TYPES:
        near = get_close_matches(kind, TYPES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise InputError(f"types {text!r}: {match[2]!r} is not a type; known are {', '.join(TYPES)}{hint}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"types {text!r}: {pattern!r} is not a regular expression ({error})") from None
    return TypeRule(pattern, kind)


def apply_rules(rules: Iterable[TypeRule], shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, str]:
    """The type of each matrix that some rule matches; of several the last holds.

    ``shapes``: Hugging Face tensor name -> shape. `InputError` for a pattern that matches no matrix: vectors (norms
    and biases) are f32 in every GGUF file.
    """
    out: dict[str, str] = {}
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    for rule in rules:
        found = [name for name in matrices if re.search(rule.pattern, name)]
        if not found:
            raise InputError(f"types {rule.pattern}={rule.type}: {_why_nothing(rule, shapes, matrices, where)}")
        out.update(dict.fromkeys(found, rule.type))
    return out


def _why_nothing(rule: TypeRule, shapes: Iterable[str], matrices: list[str], where: str) -> str:
    if any(re.search(rule.pattern, name) for name in shapes):
        return "the pattern matches norms or biases only, which are f32 in GGUF"
    paths = [re.sub(r"^model\.(layers\.\d+\.)?", "", name.removesuffix(".weight")) for name in matrices]
    plain = re.sub(r"\\(.)", r"\1", rule.pattern).strip("^$.*")
    near = get_close_matches(plain, dict.fromkeys([*paths, *(p.rpartition(".")[2] for p in paths), *matrices]), 1)
    hint = f"; did you mean {near[0]}?" if near else f"; its matrices are {', '.join(dict.fromkeys(paths))}"
    return f"the pattern matches no tensor of {where}{hint}"
