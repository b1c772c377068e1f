"""How much memory an artifact takes: its weights, each position of the cache, and the peak while it answers."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from llmlite.errors import OutsideError


class NoRoomError(OutsideError):
    """A run needed more memory than its limit leaves it."""


@dataclass(frozen=True)
class MemoryAt:
    """Bytes at one context: a prompt of ``context`` tokens, read in chunks of 512, and the answer after it.

    ``kv``: the cache, of prompt and answer; layers with a sliding window hold no more than their window.
    ``activations``: what computing took beside weights and cache: llama.cpp's compute and output buffers, with
    transformers what the peak of the run lies above the loaded model and the cache.
    ``peak``: as in `Memory`. ``address_space`` (CPU): the largest that the process's address space ever was
    (VmPeak), reserved and never touched parts included. ``reserved`` (CUDA): most that PyTorch's allocator held of
    the device; ``driver`` (CUDA): by how much the device's free memory had shrunk at the end
    (torch.cuda.mem_get_info), whoever took it.
    """

    context: int
    kv: int
    activations: int
    peak: int
    address_space: int | None = None
    reserved: int | None = None
    driver: int | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes. ``peak`` is measured in a process of the artifact's own that loads it and answers one prompt.

    ``device``: where the weights lie. On "cpu" ``peak`` is the largest resident set that the kernel saw (VmHWM),
    of which ``program`` was there before anything of the artifact was read (the interpreter and its libraries);
    the weights are all in memory for this: llama.cpp reads them instead of mapping the file, and every page that
    transformers maps is touched, so that the peaks of both engines compare. On "cuda" ``peak`` is what PyTorch
    allocated at most, with llama.cpp what the driver gave, and ``program`` is 0.
    ``weights``: tensors as loaded, tied ones once; ``kv_per_token``: keys and values of one more position, all
    layers, as long as no sliding window is full. ``contexts``: one entry per context measured, each in a process of
    its own; ``peak`` and ``program`` are those of the main one (see `main_context`).
    """

    weights: int
    kv_per_token: int
    peak: int
    program: int
    device: str
    contexts: tuple[MemoryAt, ...] = ()

    def to_json(self) -> dict:
        """Plain data; what a device does not tell has no key."""
        said = asdict(self)
        contexts = [{key: value for key, value in at.items() if value is not None} for at in said["contexts"]]
        return {**said, "contexts": contexts}


def resident_bytes(peak: bool = False) -> int:
    """This process's resident set now, or the largest it ever had."""
    return _status("VmHWM" if peak else "VmRSS")


def address_space_bytes(peak: bool = False) -> int:
    """This process's address space now, or the largest it ever was."""
    return _status("VmPeak" if peak else "VmSize")


def forget_peak() -> None:
    """Let the largest resident set be counted anew from here (proc(5), /proc/pid/clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {key}"
    return int(found[1]) * 1024
