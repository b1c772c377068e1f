"""Text files, JSON lines, chats and named datasets -> documents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from llmlite.errors import InputError, OutsideError
from llmlite.extras import need
from llmlite.progress import note

Message = dict[str, str]
# The files of calibrate/data and their weights in the default mix; their origin is told in the README there.
DEFAULT = {"prose.jsonl": 2, "web.jsonl": 2, "code.jsonl": 2, "chinese.jsonl": 1, "chat.jsonl": 1}
DATASET_ROWS = 20_000  # of a named dataset that are read, from its beginning: far more than a calibration takes
ROLES = {"human": "user", "gpt": "assistant"}  # the names that ShareGPT files use


@dataclass(frozen=True)
class Document:
    """One piece of a corpus: running text, or the messages of a chat."""

    text: str | None = None
    messages: tuple[Message, ...] | None = None


@dataclass(frozen=True)
class Corpus:
    """The documents of one source; ``sha256`` is over their content.

    ``weight``: its share of the calibration tokens, relative to the others'. ``packaged``: part of the default mix.
    """

    source: str
    documents: tuple[Document, ...]
    sha256: str
    weight: int = 1
    packaged: bool = False


def default_corpora(chat: bool = True) -> list[Corpus]:
    """The mix that comes with the package: prose, web text, code, Chinese, and with ``chat`` chats."""
    folder = files("llmlite.calibrate") / "data"
    corpora = []
    for name, weight in DEFAULT.items():
        if chat or name != "chat.jsonl":
            corpus = _corpus(f"default:{name}", _parse(name, (folder / name).read_text(encoding="utf-8")))
            corpora.append(replace(corpus, weight=weight, packaged=True))
    return corpora


def read_corpus(source: str) -> Corpus:
    """A .txt, .jsonl or .json file, or the name of a dataset; `InputError` for one that can't be read.

    Plain text is one document. A JSON record is a text (``text``), a chat (``messages`` or ``conversations``), or
    an instruction with its answer (``instruction``, ``input``, ``output``, or ``instances`` of the last two; or
    ``prompt``, ``completion``).
    A dataset is named owner/name, owner/name:config or owner/name:config:split (needs the package ``datasets``); of one
    with more, the first `DATASET_ROWS` rows are read, and a note says so.
    """
    path = Path(source)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{source}: is not UTF-8 text (byte {error.start})") from None
        documents = _parse(source, text)
    elif path.suffix in (".txt", ".jsonl", ".json", ".raw", ".md") or source.startswith((".", "/")):
        raise InputError(f"{source}: no such text file")
    else:
        documents = _dataset(source)
    corpus = _corpus(source, documents)
    if not corpus.documents:
        raise InputError(f"{source}: holds no text")
    return corpus


def _corpus(source: str, documents: Iterator[Document]) -> Corpus:
    kept = tuple(d for d in documents if d.messages or (d.text and d.text.strip()))
    digest = hashlib.sha256()
    for document in kept:
        digest.update(json.dumps([document.text, document.messages]).encode())
    return Corpus(source, kept, digest.hexdigest())


def _parse(source: str, text: str) -> Iterator[Document]:
    if source.endswith(".jsonl"):
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _record(_json(line, f"{source}, line {number}"), f"{source}, line {number}")
    elif source.endswith(".json"):
        records = _json(text, source)
        if not isinstance(records, list):
            raise InputError(f"{source}: a JSON list of records is right")
        for number, record in enumerate(records, 1):
            yield _record(record, f"{source}, record {number}")
    else:
        yield Document(text=text)


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: is not JSON ({error})") from None


def _record(record: object, where: str) -> Document:
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return Document(text=record["text"])
        for key in ("messages", "conversations"):
            if isinstance(record.get(key), list):
                return Document(messages=tuple(_message(m, where) for m in record[key]))
        if "prompt" in record and "completion" in record:
            asked, answered = _turns(record["prompt"], "user", where), _turns(record["completion"], "assistant", where)
            return Document(messages=asked + answered)
        if isinstance(record.get("instruction"), str):
            return Document(messages=_instruction(record, where))
    raise InputError(f"{where}: none of the fields text, messages, conversations, prompt or instruction is there")


def _turns(part: object, role: str, where: str) -> tuple[Message, ...]:
    """A prompt or a completion: one message's text, or a list of messages."""
    if isinstance(part, str):
        return ({"role": role, "content": part},)
    if isinstance(part, list):
        return tuple(_message(message, where) for message in part)
    raise InputError(f"{where}: a prompt and a completion need to be strings, or lists of messages")


def _message(message: object, where: str) -> Message:
    if isinstance(message, dict):
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(role, str) and isinstance(content, str):
            return {"role": ROLES.get(role, role), "content": content}
    raise InputError(f"{where}: a message needs a role and a content, both strings")


def _instruction(record: dict, where: str) -> tuple[Message, ...]:
    instances = record.get("instances")
    first = instances[0] if isinstance(instances, list) and instances else record
    if not isinstance(first, dict) or not isinstance(first.get("output"), str):
        raise InputError(f"{where}: an instruction needs an output, a string")
    more = first.get("input") or ""
    if not isinstance(more, str):
        raise InputError(f"{where}: the input of an instruction needs to be a string")
    asked = "\n\n".join(part for part in (record["instruction"], more) if part)
    return ({"role": "user", "content": asked}, {"role": "assistant", "content": first["output"]})


def _dataset(name: str) -> Iterator[Document]:
    datasets = need("eval", "datasets")
    path, _, rest = name.partition(":")
    config, _, split = rest.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, 1):
            yield _record(row, f"{name}, row {number}")
            if number == DATASET_ROWS:
                note(f"of {name} only the first {number:,} rows are read")
                return
    except ConnectionError as error:
        raise OutsideError(f"{name}: no such file, and the dataset hub can't be reached ({error})") from None
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"{name}: neither a file nor a dataset that can be loaded ({error})") from None
