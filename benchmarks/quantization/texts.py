"""The four texts that models are judged on, and the calibration text, as rows of token ids.

Nothing is in both: prose is WikiText-2's test part against its validation part, code is the standard library's modules
m to z against a to l, Chinese and chats come from different files.
"""

from __future__ import annotations

import json
import random
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llmlite.calibrate.corpus import Document, read_corpus
from llmlite.evals.hf import prefix_token

TEXTS = ("english", "code", "chinese", "chat")
# rows out of 128
SHARES = {"prose": 28, "web": 28, "code": 28, "chat": 28, "chinese": 16}
EXCERPT = 6000  # characters of one module or web page at most, so that many are seen


def evaluation_text(name: str, data: Path, tokenizer: Any) -> str:
    """One of `TEXTS`, whole; special tokens stand in it by their names."""
    if name == "english":
        return (data / "wikitext2" / "wiki.test.raw").read_text(encoding="utf-8")
    if name == "code":
        return "\n\n".join(_modules("m", "z"))
    if name == "chinese":
        return (data / "zh_cmrc2018" / "zh_wiki_eval.txt").read_text(encoding="utf-8")
    files = ("self_instruct_user_oriented", "mt_bench_question", "vicuna_bench_question")
    return "".join(_chats([data / "chat" / f"{file}.jsonl" for file in files], tokenizer))


def calibration_text(data: Path, tokenizer: Any, tokens: int) -> str:
    """All parts one behind the other, each of its share of ``tokens`` or up to one document more."""
    web = read_corpus(str(data / "calib" / "c4_demo.jsonl"))
    pages = [(document.text or "")[:EXCERPT] for document in web.documents]
    random.Random(0).shuffle(pages)
    files = [data / "chat" / "glaive_toolcall_en_demo.json", data / "chat" / "alpaca_seed_tasks.jsonl"]
    parts: dict[str, Iterable[str]] = {
        "prose": _sections((data / "wikitext2" / "wiki.valid.raw").read_text(encoding="utf-8"), "\n = "),
        "web": (f"{page}\n\n" for page in pages),
        "code": (f"{module}\n\n" for module in _modules("a", "l")),
        "chat": _chats(files, tokenizer),
        "chinese": _sections((data / "zh_cmrc2018" / "zh_wiki_calib.txt").read_text(encoding="utf-8"), "\n"),
    }
    whole = sum(SHARES.values())
    out = [_take(documents, tokenizer, -(-tokens * SHARES[name] // whole)) for name, documents in parts.items()]
    return "".join(out)


def token_rows(text: str, tokenizer: Any, length: int, limit: int) -> np.ndarray:
    """The first ``limit`` rows int64 [rows, length] of a text, cut as llama.cpp's tools cut a file into chunks.

    Names of special tokens in the text become those tokens. Where the tokenizer puts a token in front of a text, it
    stands there and again in place of the first token of every row.
    """
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    bos = prefix_token(tokenizer)
    if bos is not None:
        ids = [bos, *ids]
    count = min(len(ids) // length, limit)
    if count < limit:
        raise SystemExit(f"a text has {count} whole rows of {length} tokens, {limit} are wanted")
    rows = np.array(ids[: count * length], dtype=np.int64).reshape(count, length)
    if bos is not None:
        rows[:, 0] = bos
    return rows


def _modules(first: str, last: str) -> Iterator[str]:
    """An excerpt of each of the standard library's modules, from a whole line on, in one fixed disorder."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(file for file in folder.glob("*.py") if first <= file.name[0].lower() <= last)
    chance = random.Random(0)
    chance.shuffle(files)
    for file in files:
        text = file.read_text(encoding="utf-8")
        start = text.find("\n", chance.randrange(max(len(text) - EXCERPT, 1))) + 1
        yield text[start : start + EXCERPT].rpartition("\n")[0]


def _chats(files: list[Path], tokenizer: Any) -> Iterator[str]:
    """Chats through the model's template, mixed; a question that has no answer is a chat of one message."""
    chats = [messages for file in files for messages in _messages(file)]
    random.Random(0).shuffle(chats)
    for messages in chats:
        yield tokenizer.apply_chat_template(messages, tokenize=False)


def _messages(file: Path) -> Iterator[list[dict[str, str]]]:
    if "question" in file.name:
        for line in file.read_text(encoding="utf-8").splitlines():
            for turn in json.loads(line)["turns"]:
                yield [{"role": "user", "content": turn}]
        return
    yield from (_answered(document) for document in read_corpus(str(file)).documents)


def _answered(document: Document) -> list[dict[str, str]]:
    assert document.messages is not None
    return [dict(message) for message in document.messages]


def _sections(text: str, mark: str) -> list[str]:
    """The parts of a text that begin with ``mark``, mixed."""
    parts = [mark + part for part in text.split(mark) if part.strip()]
    random.Random(0).shuffle(parts)
    return parts


def _take(documents: Iterable[str], tokenizer: Any, tokens: int) -> str:
    taken: list[str] = []
    count = 0
    for document in documents:
        if count >= tokens:
            break
        taken.append(document)
        count += len(tokenizer(document, add_special_tokens=False, verbose=False).input_ids)
    if count < tokens:
        raise SystemExit(f"a part of the calibration text has {count:,} tokens, {tokens:,} are wanted")
    return "".join(taken)
