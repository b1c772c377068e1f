"""Where the base's predictions come from: beside the artifact, from the disk, or one layer at a time."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import psutil
import torch

from llmlite.checkpoint.checkpoint import read_config
from llmlite.checkpoint.safetensors_index import read_index
from llmlite.errors import InputError, OutsideError
from llmlite.evals.digests import digest_of
from llmlite.evals.divergence import check_tokenizers
from llmlite.evals.engines import Engine, LlamaCppEngine, TransformersEngine, engine_version, softcap_of
from llmlite.evals.kept import Facts, Kept, Store, Writer, key_of
from llmlite.evals.locate import Location, find
from llmlite.evals.perplexity import Window, Windows
from llmlite.evals.streamed import StreamedModel, chunk_memory, running_memory, streaming_memory
from llmlite.evals.texts import Text
from llmlite.progress import note


class Predictions(Protocol):
    """What the base predicts on the windows of one text; see `engines.Engine` for the vocabulary's numbers."""

    windows: Sequence[Window]
    vocab_size: int
    known_tokens: int

    def rows(self, number: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The scored predictions of a window, as `engines.Engine.log_probs` gives them. Windows come in order."""
        ...


class Base(Protocol):
    """A model that artifacts are compared with."""

    def predictions(self, artifact: Engine, text: Text, windows: Windows) -> AbstractContextManager[Predictions]:
        """What it predicts on a text, tokenized by its own tokenizer.

        `InputError` where the artifact's tokenizer is another one, or the text has less than a window.
        """
        ...


class SideBySide:
    """A loaded base that runs beside the artifact; nothing is kept."""

    def __init__(self, engine: Engine):
        self.engine = engine

    @contextmanager
    def predictions(self, artifact: Engine, text: Text, windows: Windows) -> Iterator[Predictions]:
        check_tokenizers(self.engine, artifact, text.text)
        yield _Live(self.engine, windows.cut(self.engine, text))


class _Live:
    def __init__(self, engine: Engine, windows: Sequence[Window]):
        self.engine, self.windows = engine, windows
        self.vocab_size, self.known_tokens = engine.vocab_size, engine.known_tokens

    def rows(self, number: int) -> Iterator[tuple[int, torch.Tensor]]:
        window = self.windows[number]
        return self.engine.log_probs(window.tokens[:-1], window.first)


class _Recorded(_Live):
    """Keeps what it gives."""

    def __init__(self, engine: Engine, windows: Sequence[Window], facts: Facts, writer: Writer):
        super().__init__(engine, windows)
        self.facts, self.writer = facts, writer

    def rows(self, number: int) -> Iterator[tuple[int, torch.Tensor]]:
        window = self.windows[number]
        if self.facts.encoding == "hidden":
            assert isinstance(self.engine, TransformersEngine)
            hidden = self.engine.hidden(window.tokens[:-1], window.first)
            self.writer.hidden(hidden)
            yield from self.engine.head.log_probs(hidden, window.first)
            return
        for start, rows in super().rows(number):
            self.writer.codes(rows)
            yield start, rows


class LazyBase:
    """A base whose predictions are taken from a store where they are there, and put there where they are not.

    It is loaded only if it must compute. Where it does not fit into the memory that is free then, it is streamed
    layer by layer, and a note says so. ``store`` None: nothing is kept. Close it after use.
    """

    def __init__(self, source: str, store: Store | None, *, threads: int | None = None, context: int = 2048):
        self.source, self.store = source, store
        self.threads, self.context = threads, context
        self.location = find(source)
        self.digest = digest_of(self.location)
        self._opened: Engine | StreamedModel | None = None

    @contextmanager
    def predictions(self, artifact: Engine, text: Text, windows: Windows) -> Iterator[Predictions]:
        with ExitStack() as stack:
            yield self._predictions(stack, artifact, text, windows)

    def _predictions(self, stack: ExitStack, artifact: Engine, text: Text, windows: Windows) -> Predictions:
        found = self._find(stack, windows.cut(artifact, text), text)
        if found is not None:  # kept under the same token ids, so it is the same tokenizer
            return found
        base = self._open()
        check_tokenizers(base, artifact, text.text)
        own = windows.cut(base, text)
        found = self._find(stack, own, text)  # the ids may differ where `check_tokenizers` does not look
        if found is not None:
            return found
        if isinstance(base, StreamedModel):
            return self._stream(stack, base, own)
        writer = self._writer(stack, base, own)
        return _Live(base, own) if writer is None else _Recorded(base, own, *writer)

    def _find(self, stack: ExitStack, windows: Sequence[Window], text: Text) -> Kept | None:
        if self.store is None:
            return None
        found = self.store.find(self._key(windows), windows, self.location.path)
        if found is not None:
            stack.callback(found.close)
            note(f"the base's predictions on {text.name} are those kept in {self.store.directory}")
        return found

    def _key(self, windows: Sequence[Window]) -> str:
        engine = engine_version(self.location.engine)
        if self.location.engine == "transformers":
            engine += f", torch {torch.__version__}, {'cuda' if torch.cuda.is_available() else 'cpu'}"
        return key_of(self.digest, engine, windows)

    def _open(self) -> Engine | StreamedModel:
        if self._opened is None:
            self._opened = self._load()
        return self._opened

    def _load(self) -> Engine | StreamedModel:
        path = self.location.path
        if self.location.engine == "llama.cpp":  # maps the file: the weights need not fit
            return LlamaCppEngine(path, threads=self.threads, context=self.context)
        needed, free = loaded_memory(self.location, self.context), free_memory()
        if needed <= free:
            return TransformersEngine(path, threads=self.threads)
        sizes = f"needs {needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB of memory are free"
        try:
            streamed = StreamedModel(path)
        except InputError as error:
            raise OutsideError(f"{self.source}: {sizes}, and it can't be run layer by layer ({error})") from None
        least = streaming_memory(streamed.checkpoint, self.context)
        if least > free:
            raise OutsideError(f"{self.source}: {sizes}; layer by layer it needs {least / 2**20:,.0f} MiB")
        note(f"the base {sizes}: it is run layer by layer, before the artifact")
        return streamed

    def _writer(self, stack: ExitStack, base: Engine, windows: Sequence[Window]) -> tuple[Facts, Writer] | None:
        """Where to keep what the base gives; None without a store, and where another process writes the same."""
        if self.store is None:
            return None
        facts = facts_of(base)
        try:
            writer = stack.enter_context(self.store.writing(self._key(windows), facts, windows))
        except InputError as error:
            note(f"the base's predictions are not kept: {error}")
            return None
        return facts, writer

    def _stream(self, stack: ExitStack, base: StreamedModel, windows: Sequence[Window]) -> Predictions:
        store = self.store
        if store is None:
            store = Store(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="llmlite-base-"))))
        key = self._key(windows)
        with store.writing(key, base.facts, windows) as writer:
            base.run(windows, writer, store.directory / f"{key}-hidden")
        found = store.find(key, windows, self.location.path)
        assert found is not None, "just written"
        stack.callback(found.close)
        return found

    def close(self) -> None:
        if self._opened is not None and not isinstance(self._opened, StreamedModel):
            self._opened.close()
        self._opened = None


def facts_of(engine: Engine) -> Facts:
    """How an engine's predictions are kept: as hidden states where its head can be read again, or as codes."""
    known = {"vocab_size": engine.vocab_size, "known_tokens": engine.known_tokens}
    head = engine.head_tensor() if isinstance(engine, TransformersEngine) else None
    if head is None:
        return Facts("codes", engine.vocab_size, "uint16", **known)
    assert isinstance(engine, TransformersEngine)
    config = engine.model.config.get_text_config()
    dtype = str(engine.model.dtype).removeprefix("torch.")
    return Facts("hidden", config.hidden_size, dtype, **known, head=head, softcap=softcap_of(config.to_dict()))


def default_directory() -> Path:
    """Where predictions are kept unless a directory is named: the user's cache directory by the XDG specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmlite" / "base"


def loaded_memory(location: Location, length: int) -> int:
    """Bytes that a safetensors checkpoint takes when transformers runs it on windows of ``length`` tokens."""
    config = read_config(location.path)
    text = config.get("text_config") or config
    weights = sum(tensor.nbytes for tensor in read_index(location.path).values())
    return weights + running_memory(text, length) + chunk_memory(text)


def free_memory() -> int:
    """Bytes that are free where models are loaded: on the GPU where there is one, in the machine otherwise."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else psutil.virtual_memory().available
