"""How much memory an artifact takes: its weights, each position of the cache, and the peak while it answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Memory:
    """Bytes. ``peak`` is measured in a process of the artifact's own that loads it and answers one prompt.

    ``device``: where the weights lie. On "cpu" ``peak`` is the largest resident set that the kernel saw (VmHWM),
    of which ``program`` was there before anything of the artifact was read (the interpreter and its libraries);
    llama.cpp reads GGUF weights into memory for this instead of mapping the file, so that the peaks of both engines
    compare. On "cuda" ``peak`` is what PyTorch allocated at most, and ``program`` is 0.
    ``weights``: tensors as loaded, tied ones once; ``kv_per_token``: keys and values of one more position, all
    layers, as long as no sliding window is full.
    """

    weights: int
    kv_per_token: int
    peak: int
    program: int
    device: str


def resident_bytes(peak: bool = False) -> int:
    """This process's resident set now, or the largest it ever had."""
    key = "VmHWM" if peak else "VmRSS"
    found = re.search(rf"^{key}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {key}"
    return int(found[1]) * 1024
