"""A Hugging Face tokenizer as GGUF metadata, so that llama.cpp gives the same ids; refused where it could not.

Two kinds exist on both sides: byte-level BPE (GGUF's model "gpt2", which follows the merges) and SentencePiece's
BPE (GGUF's model "llama", which joins the neighbours whose union has the highest score).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmlite.checkpoint import pretokenizers
from llmlite.checkpoint.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, UNUSED, USER_DEFINED
from llmlite.errors import InputError, first_line
from llmlite.formats.gguf.writer import Value

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
# Added tokens that some models forget to flag as special: llama.cpp's converter treats them as control tokens.
LOOKS_SPECIAL = re.compile(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL)


@dataclass(frozen=True)
class GgufTokenizer:
    """``metadata`` for the file; ``notes``: one sentence for each known difference that remains."""

    metadata: dict[str, Value]
    notes: tuple[str, ...]


def describe_tokenizer(directory: Path, config: dict[str, Any]) -> GgufTokenizer:
    """The tokenizer of a checkpoint directory; ``config`` is its config.json with every default filled in.

    Raises `InputError` for a missing tokenizer and for one that llama.cpp has no equal of.
    """
    tokenizer = _load(directory)
    where = f"{directory}: the tokenizer"
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise InputError(f"{where} is of type {spec['model']['type']}; GGUF export knows BPE only")
    byte_level = _is_byte_level(spec["pre_tokenizer"])
    metadata: dict[str, Value] = {}
    notes = _strip_notes(spec["added_tokens"])
    if byte_level:
        metadata |= _byte_level(spec, _own_rules(directory, spec), where)
    else:
        prefix, prefix_notes = _space_prefix(spec, where)
        metadata |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.pre": "default",
            "tokenizer.ggml.add_space_prefix": prefix,
        }
        notes += prefix_notes
    tokens, types = _tokens(spec, config["vocab_size"], byte_level, where)
    metadata["tokenizer.ggml.tokens"] = tokens
    if not byte_level:
        metadata["tokenizer.ggml.scores"] = _scores(spec, tokens, types, where)
    metadata["tokenizer.ggml.token_type"] = types
    metadata |= _special(tokenizer, config, where)
    metadata |= _end_of_turn(tokenizer, directory)
    metadata |= _chat_templates(tokenizer)
    return GgufTokenizer(metadata, tuple(notes))


def _load(directory: Path) -> Any:
    from transformers import AutoTokenizer

    if not (directory / "tokenizer.json").is_file() and not (directory / "tokenizer.model").is_file():
        raise InputError(f"{directory}: has neither tokenizer.json nor tokenizer.model, and a GGUF needs its tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"{directory}: the tokenizer can't be loaded ({first_line(error)})") from None
    if not tokenizer.is_fast:
        raise InputError(f"{directory}: the tokenizer has no tokenizer.json form; save it with transformers first")
    return tokenizer


def _is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    if pre_tokenizer is None:
        return False
    members = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    return any(member["type"] == "ByteLevel" for member in members)


def _own_rules(directory: Path, read: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json as it stands in the directory, or what transformers has made of older files."""
    file = directory / "tokenizer.json"
    return json.loads(file.read_text()) if file.is_file() else read


def _byte_level(spec: dict[str, Any], own: dict[str, Any], where: str) -> dict[str, Value]:
    """``spec`` is what transformers reads, ``own`` what the file says: for some model types it has rules of its own."""
    row, read = pretokenizers.from_json(own), pretokenizers.from_json(spec)
    if row is None:
        known = ", ".join(row.names[0] for row in pretokenizers.PRETOKENIZERS)
        raise InputError(
            f"{where} splits text in a way that has no known name in llama.cpp (known: {known}), so its GGUF would "
            "read text differently; convert a model with one of these"
        )
    if read is None or (read.steps, read.ignore_merges) != (row.steps, row.ignore_merges):
        raise InputError(
            f"{where} cuts text as {row.names[0]} by its tokenizer.json, and transformers reads it by other rules, "
            "those of the model type; a GGUF can follow one of them only"
        )
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": row.names[0],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_space_prefix": False,
    }


def _space_prefix(spec: dict[str, Any], where: str) -> tuple[bool, list[str]]:
    """Whether a space is put before the text, from the ways in which transformers writes SentencePiece's rules."""
    normalizer, pre = spec["normalizer"], spec["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    split_nothing = pre is None or (pre["type"] == "Split" and pre["pattern"] == {"String": " "})
    if split_nothing and steps == [{"type": "Prepend", "prepend": SPACE}, to_mark]:
        return True, []
    if split_nothing and steps == [to_mark]:
        return False, []
    if steps == [None] and pre is not None and pre["type"] == "Metaspace" and not pre["split"]:
        if pre["prepend_scheme"] == "never":
            return False, []
        return True, [
            "llama.cpp puts a space before text that follows a special token or starts with a space; this tokenizer "
            f"does so by its rule {pre['prepend_scheme']!r}"
        ]
    raise InputError(f"{where} is neither byte-level BPE nor SentencePiece's BPE, and llama.cpp has no equal of it")


def _tokens(spec: dict[str, Any], size: int, byte_level: bool, where: str) -> tuple[list[str], list[int]]:
    """Text and type of every id; ids up to the embedding's last row that the tokenizer never gives are unused."""
    by_id = {number: text for text, number in spec["model"]["vocab"].items()}
    added = {entry["id"]: entry for entry in spec["added_tokens"]}
    last = max([*by_id, *added])
    if last >= size:
        raise InputError(f"{where} gives ids up to {last} and the embedding has {size} rows")
    tokens: list[str] = []
    types: list[int] = []
    for number in range(size):
        text, kind = by_id.get(number), NORMAL
        if not byte_level and text == spec["model"]["unk_token"] and text is not None:
            kind = UNKNOWN
        elif number in added:
            text = added[number]["content"]
            if added[number]["special"] or LOOKS_SPECIAL.fullmatch(text):
                kind = CONTROL
            else:
                kind = USER_DEFINED
                text = text.replace(SPACE, " ")  # llama.cpp looks for added tokens in the text before its spaces change
        elif text is None:
            text, kind = f"[PAD{number}]", UNUSED
        elif not byte_level and BYTE_TOKEN.fullmatch(text):
            kind = BYTE
        tokens.append(text)
        types.append(kind)
    if len(set(tokens)) != size:
        doubled = next(text for place, text in enumerate(tokens) if text in tokens[:place])
        raise InputError(f"{where} has two ids for {doubled!r}, which llama.cpp does not load")
    return tokens, types


def _scores(spec: dict[str, Any], tokens: list[str], types: list[int], where: str) -> list[float]:
    """Scores that make llama.cpp join the same neighbours in the same order as the merges do.

    llama.cpp joins any two neighbours whose union is a token, the highest score first, the leftmost first among
    equals. That is what the merges say if they list every way to cut each token in two, all ways of one token
    together: so do those that transformers makes from a SentencePiece model. Anything else is refused.
    """
    rank: dict[str, int] = {}
    pairs = set()
    before = None
    for place, entry in enumerate(spec["model"]["merges"]):
        left, right = entry.split(" ") if isinstance(entry, str) else entry
        union = left + right
        pairs.add((left, right))
        if union in rank and union != before:
            raise InputError(f"{where}: {_NOT_SENTENCEPIECE} (the merges that make {union!r} stand apart)")
        rank.setdefault(union, place)
        before = union
    normal = {text for text, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    for text in normal:
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in normal and right in normal and (left, right) not in pairs:
                raise InputError(f"{where}: {_NOT_SENTENCEPIECE} (no merge of {left!r} and {right!r})")
    floor = -float(len(pairs)) - 1000
    return [-float(rank[text]) if text in rank else (0.0 if kind == BYTE else floor)
            for text, kind in zip(tokens, types, strict=True)]  # fmt: skip


_NOT_SENTENCEPIECE = "its merges are not those of a SentencePiece model, and llama.cpp can't follow any others here"


def _special(tokenizer: Any, config: dict[str, Any], where: str) -> dict[str, Value]:
    """Ids of bos, eos, unknown and padding, and which of them the tokenizer puts around a text."""
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    for name, key in (("bos", "bos_token_id"), ("eos", "eos_token_id"), ("padding", "pad_token_id")):
        fallback = config.get(key)
        if ids[name] is None and isinstance(fallback, int) and 0 <= fallback < config["vocab_size"]:
            ids[name] = fallback
    out: dict[str, Value] = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None}
    backend = tokenizer.backend_tokenizer
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    start = whole.index(plain[0])
    front, back = whole[:start], whole[start + len(plain) :]
    if front not in ([], [ids["bos"]]) or back not in ([], [ids["eos"]]):
        raise InputError(f"{where} puts the tokens {front} and {back} around a text; llama.cpp knows bos and eos only")
    out["tokenizer.ggml.add_bos_token"] = bool(front)
    out["tokenizer.ggml.add_eos_token"] = bool(back)
    return out


def _end_of_turn(tokenizer: Any, directory: Path) -> dict[str, Value]:
    """The token that ends a turn of a chat: of the ids that end a generation, the one that the template writes."""
    file = directory / "generation_config.json"
    listed = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    ids = listed if isinstance(listed, list) else [listed]
    candidates = [i for i in [*ids, tokenizer.eos_token_id] if i is not None]
    template = json.dumps(tokenizer.chat_template or "", ensure_ascii=False)
    for number in candidates:
        text = tokenizer.convert_ids_to_tokens(number)
        if text is not None and text in template:
            return {"tokenizer.ggml.eot_token_id": number}
    return {}


def _chat_templates(tokenizer: Any) -> dict[str, Value]:
    templates = tokenizer.chat_template
    if not templates:
        return {}
    if isinstance(templates, str):
        return {"tokenizer.chat_template": templates}
    named = sorted(name for name in templates if name != "default")
    out: dict[str, Value] = {"tokenizer.chat_templates": named} if named else {}
    for name, template in templates.items():
        out["tokenizer.chat_template" if name == "default" else f"tokenizer.chat_template.{name}"] = template
    return out


def _strip_notes(added: list[dict[str, Any]]) -> list[str]:
    swallow = [entry["content"] for entry in added if entry["lstrip"] or entry["rstrip"] or entry["single_word"]]
    if not swallow:
        return []
    names = ", ".join(swallow[:5])
    return [f"these added tokens swallow spaces or need word borders, which llama.cpp does not know: {names}"]
