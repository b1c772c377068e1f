"""The tokenizer inside a GGUF file as Hugging Face's files, with the ids that llama.cpp gives.

transformers reads GGUF tokenizers too, but ignores tokenizer.ggml.pre for several models (it leaves out SmolLM2's
cut at every digit, for one), so tokenizer.json is built here from the metadata.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from llmlite.checkpoint import pretokenizers
from llmlite.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama_token_type in llama.h
SPACE = "▁"  # U+2581, SentencePiece's space
NAMES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
LISTS: dict[str, tuple[type, str]] = {
    "tokenizer.ggml.tokens": (str, "a list of texts"),
    "tokenizer.ggml.merges": (str, "a list of texts"),
    "tokenizer.chat_templates": (str, "a list of names"),
    "tokenizer.ggml.token_type": (int, "a list of whole numbers"),
    "tokenizer.ggml.scores": (float, "a list of numbers"),
}
NO_LIMIT = int(1e30)  # what transformers writes where a tokenizer has no length of its own


@dataclass(frozen=True)
class ImportedTokenizer:
    """The files to write. ``ids``: bos, eos, unknown and padding where the file has them; ``ends``: every id that
    ends a generation."""

    tokenizer: dict[str, Any]
    config: dict[str, Any]
    templates: dict[str, str]
    ids: dict[str, int]
    ends: list[int]

    def save(self, directory: Path) -> None:
        """tokenizer.json, tokenizer_config.json, chat_template.jinja and the named templates, as far as there are."""
        _write(directory / "tokenizer.json", self.tokenizer)
        _write(directory / "tokenizer_config.json", self.config)
        for name, template in self.templates.items():
            file = directory / "chat_template.jinja"
            if name != "default":
                file = directory / "additional_chat_templates" / f"{name}.jinja"
                file.parent.mkdir(exist_ok=True)
            file.write_text(template)


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def import_tokenizer(metadata: dict[str, Any], where: str) -> ImportedTokenizer:
    """The tokenizer that a GGUF's metadata describes; `InputError` for one that can't be given back exactly."""
    _refuse_wrong_types(metadata, where)
    kind = metadata.get("tokenizer.ggml.model")
    tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
    if not isinstance(tokens, list) or not isinstance(types, list) or len(types) != len(tokens):
        raise InputError(f"{where}: has no token list with a type for each token (tokenizer.ggml.tokens, token_type)")
    ids = {}
    for name in NAMES.values():
        number = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None and 0 <= number < len(tokens):
            ids[name] = number
    vocab = {t: i for i, (t, kind_) in enumerate(zip(tokens, types, strict=True)) if not _is_padding(t, kind_, i)}
    if kind == "gpt2":
        spec, add_bos = _byte_level(metadata, vocab, where)
    elif kind == "llama":
        spec, add_bos = _sentencepiece(metadata, vocab, ids.get("unknown"), where)
        ids = {"bos": 1, "eos": 2, **ids}  # llama.cpp's own defaults for this kind
    else:
        raise InputError(
            f"{where}: tokenizer model {kind!r}; known are gpt2 (byte-level BPE) and llama (SentencePiece)"
        )
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", add_bos)
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    around = (ids.get("bos") if add_bos else None, ids.get("eos") if add_eos else None)
    if (add_bos and around[0] is None) or (add_eos and around[1] is None):
        raise InputError(f"{where}: adds a bos or eos token to every text and does not say which")
    spec["post_processor"] = _template(tokens, *around)
    spec["added_tokens"] = [
        _added(i, t, kind_) for i, (t, kind_) in enumerate(zip(tokens, types, strict=True))
        if kind_ in (CONTROL, USER_DEFINED, UNKNOWN)
    ]  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": NO_LIMIT,
        **{key: tokens[ids[name]] for key, name in NAMES.items() if name in ids},
    }
    return ImportedTokenizer(
        tokenizer={"version": "1.0", "truncation": None, "padding": None, **spec},
        config=config,
        templates=_templates(metadata),
        ids=ids,
        ends=_ends(metadata, ids, tokens, types),
    )


def _refuse_wrong_types(metadata: dict[str, Any], where: str) -> None:
    for key, value in metadata.items():
        if key in LISTS:
            kind, right = LISTS[key]
            good = isinstance(value, list) and all(isinstance(member, kind) for member in value)
        elif key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            good, right = isinstance(value, int), "a whole number"
        elif key.startswith("tokenizer.chat_template"):
            good, right = isinstance(value, str), "text"
        else:
            continue
        if not good:
            raise InputError(f"{where}: {key} is {str(value)[:40]!r}; {right} is right")


def _is_padding(text: str, kind: int, number: int) -> bool:
    """A row of the embedding that no text reaches, named so by the converters."""
    return kind == UNUSED and text == f"[PAD{number}]"


def _byte_level(metadata: dict[str, Any], vocab: dict[str, int], where: str) -> tuple[dict[str, Any], bool]:
    name = metadata.get("tokenizer.ggml.pre")
    row = pretokenizers.BY_NAME.get(name) if isinstance(name, str) else None
    if row is None:
        known = ", ".join(pretokenizers.BY_NAME)
        raise InputError(f"{where}: pre-tokenizer {name!r} (tokenizer.ggml.pre) is not known; known are {known}")
    merges = []
    for entry in metadata.get("tokenizer.ggml.merges", []):
        left, _, right = entry[1:].partition(" ")  # as llama.cpp cuts: at the first space after the first letter
        merges.append([entry[:1] + left, right])
    if not merges:
        raise InputError(f"{where}: has no merges (tokenizer.ggml.merges), which byte-level BPE needs")
    for left, right in merges:
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise InputError(f"{where}: the merge of {left!r} and {right!r} names a token that the list lacks")
    spec = {
        **pretokenizers.to_json(row),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": _bpe(vocab, merges, ignore_merges=row.ignore_merges),
    }
    return spec, row.add_bos


def _sentencepiece(
    metadata: dict[str, Any], vocab: dict[str, int], unknown: int | None, where: str
) -> tuple[dict[str, Any], bool]:
    """Merges from scores: llama.cpp joins the neighbours whose union has the highest score."""
    scores, types = metadata.get("tokenizer.ggml.scores"), metadata["tokenizer.ggml.token_type"]
    tokens = metadata["tokenizer.ggml.tokens"]
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise InputError(f"{where}: has no score for each token (tokenizer.ggml.scores), which SentencePiece needs")
    normal = {text for text, number in vocab.items() if types[number] == NORMAL}
    merges = _merges(normal, {text: scores[vocab[text]] for text in normal}, where)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    to_space = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders: list[dict[str, Any]] = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizer: dict[str, Any] = to_mark
    if prefix:
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, to_mark]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    fallback = BYTE in types
    if unknown is None:
        unknown = types.index(UNKNOWN) if UNKNOWN in types else None
    spec = {
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(vocab, merges, unk=None if unknown is None else tokens[unknown], byte_fallback=fallback),
    }
    return spec, True


def _merges(normal: set[str], score: dict[str, float], where: str) -> list[list[str]]:
    """Every way to cut every token in two, the highest score first.

    Among equal scores llama.cpp takes the leftmost pair, and a list of merges has no equals. For runs of one
    character (Llama 2 scores all its runs of spaces alike) the longest first comes to the same: a run that has
    begun on the left grows before another begins. Other ties are refused.
    """
    ways: dict[str, list[list[str]]] = {}
    for text in normal:
        cuts = ([text[:cut], text[cut:]] for cut in range(1, len(text)))
        pairs = [pair for pair in cuts if pair[0] in normal and pair[1] in normal]
        if pairs:
            ways[text] = pairs
    ordered = sorted(ways, key=lambda text: (-score[text], -len(text), text))
    for text, after in pairwise(ordered):
        if score[text] == score[after] and len({*text, *after}) > 1:
            raise InputError(
                f"{where}: the tokens {text!r} and {after!r} have the same score, so no list of merges can give "
                "llama.cpp's ids; a GGUF converted with its tokenizer.model has a score for each"
            )
    return [pair for text in ordered for pair in ways[text]]


def _bpe(
    vocab: dict[str, int], merges: list[list[str]], unk: str | None = None, byte_fallback: bool = False,
    ignore_merges: bool = False,
) -> dict[str, Any]:  # fmt: skip
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unk,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def _template(tokens: list[str], bos: int | None, eos: int | None) -> dict[str, Any]:
    """A post-processor that puts bos and eos around a text."""

    def special(number: int | None, of: int) -> list[dict[str, Any]]:
        return [] if number is None else [{"SpecialToken": {"id": tokens[number], "type_id": of}}]

    def whole(name: str, of: int) -> list[dict[str, Any]]:
        return [*special(bos, of), {"Sequence": {"id": name, "type_id": of}}, *special(eos, of)]

    used = {tokens[n]: {"id": tokens[n], "ids": [n], "tokens": [tokens[n]]} for n in (bos, eos) if n is not None}
    return {
        "type": "TemplateProcessing",
        "single": whole("A", 0),
        "pair": [*whole("A", 0), *whole("B", 1)],
        "special_tokens": used,
    }


def _added(number: int, text: str, kind: int) -> dict[str, Any]:
    return {
        "id": number,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": kind != USER_DEFINED,
    }


def _templates(metadata: dict[str, Any]) -> dict[str, str]:
    templates = {}
    if "tokenizer.chat_template" in metadata:
        templates["default"] = metadata["tokenizer.chat_template"]
    for name in metadata.get("tokenizer.chat_templates", []):
        if name.replace("_", "").replace("-", "").isalnum() and f"tokenizer.chat_template.{name}" in metadata:
            templates[name] = metadata[f"tokenizer.chat_template.{name}"]
    return templates


def _ends(metadata: dict[str, Any], ids: dict[str, int], tokens: list[str], types: list[int]) -> list[int]:
    """eos first, then whatever else llama.cpp takes for the end of a generation."""
    numbers = [ids.get("eos"), *(metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom"))]
    named = [i for i, t in enumerate(tokens) if types[i] == CONTROL and t in pretokenizers.END_TOKENS]
    return list(dict.fromkeys(n for n in [*numbers, *named] if n is not None and 0 <= n < len(tokens)))
