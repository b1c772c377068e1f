"""Keep the process's memory at what is in use."""

from __future__ import annotations

import ctypes
import gc
import platform

import psutil

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
THRESHOLD = 4 * 2**20
KEPT = 256 * 2**20


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def keep_heap_small() -> None:
    """Let glibc map each block of four megabytes or more on its own, so that freeing it gives it back at once.

    By default that threshold grows up to 32 MB with the blocks that are freed, and the heap fragments: compressing
    a model of 24 layers was seen to peak at 708 MB where 484 MB are enough, and to grow with every layer. A
    threshold of one megabyte costs half as much time again. What is freed at the heap's end is kept for the next block,
    up to 256 MB: set by hand, the first threshold stops glibc from raising that one, and each batch's memory was given
    back and fetched again. Does nothing where the C library is another one.
    """
    if libc := _glibc():
        libc.mallopt(M_MMAP_THRESHOLD, THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT)


def give_freed_memory_back() -> None:
    """Return to the system the heap's free pages, and what only cycles of references still hold.

    A layer's module is such a cycle: left to the collector's own rhythm, several layers' weights lay about.
    """
    gc.collect()
    if libc := _glibc():
        libc.malloc_trim(0)


def free_memory(device: str) -> int:
    """Bytes free now, of the processor's memory, or of the GPU's for a device "cuda" or "cuda:N"."""
    if not device.startswith("cuda"):
        return psutil.virtual_memory().available
    import torch  # not before it is needed: it takes a second

    free: int = torch.cuda.mem_get_info(device)[0]
    return free
