"""How a figure of an evaluation is addressed: by the keys that lead to it, with dots between them.

``texts.english.divergence.mean_kl`` is one figure, ``texts.*.divergence.mean_kl`` that of every text. A figure is a
number or true or false; text is none. A key that itself has dots in it is found, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from llmlite.errors import InputError

ANY = "**"  # whatever follows is known only from what was measured
_KNOWN = """
bytes
bits_per_weight
parameters
texts.*.perplexity.value,stderr,tokens,windows
texts.*.perplexity.by_position,by_window.**
texts.*.divergence.mean_kl,stderr,median_kl,p95_kl,p99_kl,p999_kl,max_kl,same_top,vocabulary
texts.*.divergence.mean_delta_p,rms_delta_p,base_perplexity
texts.*.divergence.by_position,by_window.**
memory.weights,kv_per_token,peak,program
memory.contexts,predicted,budget.**
speed.prompt_tps,generate_tps,first_token_s
speed.contexts.**
tasks.*.**
long_context.**
lightness.**
budget.budget,context,fits,predicted,peak,short_by,longest,longest_peak
structure.prefix_token,tokenizer,chat_template,rope,settings,shape.equal
structure.differences
"""


def _schema() -> dict:
    tree: dict = {}
    for line in _KNOWN.split():
        places = [tree]
        for part in line.split("."):
            places = [place.setdefault(key, {}) for place in places for key in part.split(",")]
    return tree


SCHEMA = _schema()


def lookup(facts: Mapping[str, Any], address: str) -> dict[str, float | bool]:
    """Every figure of an evaluation's JSON that ``address`` names, by its full address; empty where none is there."""
    return dict(_walk(facts, address, ""))


def _walk(value: Any, rest: str, path: str) -> Iterator[tuple[str, float | bool]]:
    if not rest:
        if isinstance(value, bool | int | float):
            yield path[:-1], value
        return
    if isinstance(value, list):
        value = {str(number): member for number, member in enumerate(value)}
    if not isinstance(value, Mapping):
        return
    head, _, tail = rest.partition(".")
    for key, member in value.items():
        if head == "*":
            yield from _walk(member, tail, f"{path}{key}.")
        elif rest == key or rest.startswith(f"{key}."):
            yield from _walk(member, rest[len(key) + 1 :], f"{path}{key}.")


def expand(facts: Mapping[str, Any], address: str) -> dict[str, float | bool | None]:
    """As `lookup`, with None for what ``address`` names and is not there: each text must have its own figure."""
    return _expand(facts, address, "")


def _expand(value: Any, rest: str, path: str) -> dict[str, float | bool | None]:
    absent: dict[str, float | bool | None] = {path + rest: None}
    if "*" not in rest.split("."):
        return dict(_walk(value, rest, path)) or absent
    if isinstance(value, list):
        value = {str(number): member for number, member in enumerate(value)}
    if not isinstance(value, Mapping):
        return absent
    out: dict[str, float | bool | None] = {}
    head, _, tail = rest.partition(".")
    for key, member in value.items():
        if head == "*":
            out |= _expand(member, tail, f"{path}{key}.")
        elif rest.startswith(f"{key}."):
            out |= _expand(member, rest[len(key) + 1 :], f"{path}{key}.")
    return out or absent


def check_address(address: str, facts: Mapping[str, Any] | None, where: str) -> None:
    """`InputError` with the nearest known name for an address that no evaluation has, ``facts`` neither."""
    if facts is not None and lookup(facts, address):
        return
    place: dict = SCHEMA
    done: list[str] = []
    for part in address.split("."):
        if ANY in place:
            return
        if not place:
            raise InputError(f"{where}: figure {address!r} is unknown: {'.'.join(done)} is a figure, nothing is below")
        if part not in place and "*" not in place:
            raise InputError(f"{where}: figure {address!r} is unknown{nearest(part, place)}")
        done.append(part)
        place = place.get(part) or place.get("*") or {}
    if place and ANY not in place:
        raise InputError(f"{where}: figure {address!r} is a group: name one of {', '.join(place)} below it")


def nearest(word: str, known: Mapping[str, Any] | list[str]) -> str:
    """The end of a sentence that refuses ``word``: the nearest known name, or all of them."""
    near = get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
