"""SHA-256 of what decides a model's predictions: two artifacts with the same digest give the same figures."""

from __future__ import annotations

import hashlib
from pathlib import Path

from llmlite.checkpoint.artifact import sha256_of
from llmlite.checkpoint.safetensors_index import read_index
from llmlite.evals.locate import Location

# Beside the weights' files: what the model is, how text and chats become token ids, and what ends an answer.
DECIDING = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def digest_of(location: Location) -> str:
    """Hexadecimal: of a GGUF file its own; of a directory, that of the digests of its files and their names.

    A directory's files are the safetensors files that it reads and `DECIDING`; the order is that of the names. The
    files are streamed. Raises `InputError` for a safetensors index that can't be read.
    """
    if location.engine == "llama.cpp":
        return sha256_of(location.path)
    total = hashlib.sha256()
    for file in _files(location.path):
        total.update(f"{sha256_of(file)} {file.name}\n".encode())
    return total.hexdigest()


def _files(directory: Path) -> list[Path]:
    weights = {tensor.file for tensor in read_index(directory).values()}
    return sorted(weights | {directory / name for name in DECIDING if (directory / name).is_file()})
