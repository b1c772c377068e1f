"""The text that a model is judged on: a text file, a jsonl file, or a data set's name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from llmlite.calibrate.corpus import read_corpus
from llmlite.errors import InputError, OutsideError
from llmlite.extras import need

FILE_ENDINGS = (".txt", ".raw", ".md", ".json", ".jsonl")  # by these a missing file is told from a data set


@dataclass(frozen=True)
class Text:
    """``name``: the key of its results, without dots because those are addressed as texts.<name>.<figure>."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """SHA-256 of the UTF-8 bytes, hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def read_texts(sources: tuple[str, ...]) -> list[Text]:
    """Each source as one text; `InputError` for one that can't be read, and for two that share a name."""
    texts = [read_text(source) for source in sources]
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two texts are both called {name!r}, and results are kept by name: rename one file")
    return texts


def read_text(source: str) -> Text:
    """A text file whole, or the ``text`` fields of a .jsonl file or of a data set, joined by blank lines.

    Whatever is neither a file nor looks like one is a data set: name or owner/name, then perhaps :config or
    :config:split (the split test unless given).
    Its empty records are kept: so do the papers that report WikiText-2.
    """
    if Path(source).is_file():
        name, text = Path(source).stem, _file(source)
    elif source.startswith((".", "/", "~")) or source.endswith(FILE_ENDINGS):
        raise InputError(f"{source}: no such text file")
    else:
        name, text = source.split("/")[-1].replace(":", "-"), _dataset(source)
    return Text(name.replace(".", "_"), text)


def _file(source: str) -> str:
    corpus = read_corpus(source)
    parts = [document.text for document in corpus.documents if document.text is not None]
    if len(parts) < len(corpus.documents):
        raise InputError(f"{source}: holds chats; running text, or JSON lines with a field 'text', is right")
    return "\n\n".join(parts)


def _dataset(source: str) -> str:
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        datasets = need("eval", "datasets")
    except InputError as error:
        raise InputError(f"{source}: no such file; to load a data set of that name, {error}") from None
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "test")
    except ConnectionError as error:
        raise OutsideError(f"{source}: no such file, and the data set hub can't be reached ({error})") from None
    except (FileNotFoundError, ValueError) as error:
        raise InputError(f"{source}: neither a file nor a data set that can be loaded ({error})") from None
    if "text" not in rows.column_names:
        raise InputError(f"{source}: has the columns {', '.join(rows.column_names)}; one called text is needed")
    return "\n\n".join(rows["text"])
