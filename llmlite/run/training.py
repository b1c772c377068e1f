"""What the verbs that train share: where to compute, and the directory in which a killed run is gone on with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmlite.adapt.training_state import STATE
from llmlite.checkpoint.artifact import atomic_directory, partial_of
from llmlite.checkpoint.safetensors_index import read_index
from llmlite.progress import note, say
from llmlite.run.journal import begin, describe_files, read_journal
from llmlite.run.text import choose_device


def training_device(device: str, threads: int | None) -> str:
    """As `choose_device`; under ``accelerate launch`` "cuda" is then this process's own GPU. Call it first of all."""
    from accelerate import PartialState

    chosen = choose_device(device, threads)
    PartialState(cpu=chosen == "cpu")
    return chosen


def is_first_process() -> bool:
    """Whether this process is the one that writes and speaks, of those that ``accelerate launch`` started."""
    from accelerate import PartialState

    return PartialState().is_main_process


@contextmanager
def training_directory(out: Path, run: dict[str, Any], resume: bool) -> Iterator[Path]:
    """The partial directory of a trainer's artifact ``out``, with the state of an unfinished run where one goes on.

    ``run``: all that decides what is trained, as plain JSON values. Of several processes the first one writes; the
    others get the same path and must write nothing. `InputError` where ``resume`` finds another run's state.
    """
    from accelerate import PartialState

    processes = PartialState()
    if not processes.is_main_process:
        processes.wait_for_everyone()
        yield partial_of(out)
        processes.wait_for_everyone()
        return
    journal, found = begin(out, run, resume), read_journal(out)
    goes_on = resume and found is not None
    if goes_on and (partial_of(out) / STATE).is_file():
        say("resumed: goes on at the last step that was saved")
    elif goes_on:
        say("resumed: no step was saved yet; what was prepared for the training is taken as it is")
    elif resume:
        note(f"there is no unfinished run of {out} to resume; this one begins at the beginning")
    elif found is not None and not found.differences(journal):
        note(f"an unfinished run of {out} is removed; --resume would have gone on with it")
    try:
        with atomic_directory(out, resume=goes_on) as folder:
            journal.write(folder)
            processes.wait_for_everyone()
            yield folder
            processes.wait_for_everyone()
    except KeyboardInterrupt as inner:  # what was interrupted may have said where it goes on
        said = str(inner) or "interrupted; --resume goes on at the last step that was saved"
        raise KeyboardInterrupt(said) from None


def describe_model(source: str, directory: Path, gguf: Path | None = None) -> dict[str, Any]:
    """`describe_files` of a model whose weights lie in ``directory``."""
    return describe_files(source, directory, {entry.file for entry in read_index(directory).values()}, gguf)
