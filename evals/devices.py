"""The GPU's memory, as llama.cpp's library and as PyTorch see it, and a process that takes a part of it away."""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from llmlite.errors import OutsideError

GPU = 1  # GGML_BACKEND_DEVICE_TYPE_GPU in ggml-backend.h
READY = "ready"


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of a device."""

    free: int
    total: int


def gpu_memory(api: ModuleType) -> DeviceMemory | None:
    """The first GPU that llama.cpp can use; None where it has none. ``api``: the module llama_cpp."""
    library = api.llama_cpp._lib
    library.ggml_backend_dev_count.restype = ctypes.c_size_t
    library.ggml_backend_dev_get.argtypes = [ctypes.c_size_t]
    library.ggml_backend_dev_get.restype = ctypes.c_void_p
    library.ggml_backend_dev_type.argtypes = [ctypes.c_void_p]
    library.ggml_backend_dev_type.restype = ctypes.c_int
    for number in range(library.ggml_backend_dev_count()):
        device = library.ggml_backend_dev_get(number)
        if library.ggml_backend_dev_type(device) == GPU:
            return device_memory(library, device)
    return None


def device_memory(library: ctypes.CDLL, device: int) -> DeviceMemory:
    """What ggml_backend_dev_memory says of a ggml_backend_dev_t."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    library.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2]
    library.ggml_backend_dev_memory.restype = None
    library.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
    return DeviceMemory(free.value, total.value)


@contextmanager
def ballast(budget: int) -> Iterator[None]:
    """While the block runs, a process of its own holds all of the first GPU but ``budget`` bytes.

    Raises `OutsideError` where less than that is free, or the process can't hold it.
    """
    command = [sys.executable, "-m", "llmlite.evals.devices", str(budget)]
    held = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert held.stdin is not None and held.stdout is not None and held.stderr is not None
    try:
        if held.stdout.readline().strip() != READY:
            lines = held.stderr.read().strip().splitlines()
            raise OutsideError(f"the rest of the GPU can't be held ({lines[-1] if lines else 'no reason given'})")
        yield
    finally:
        held.stdin.close()  # it waits for this
        held.wait()
        held.stdout.close()
        held.stderr.close()


def hold(free: int, budget: int) -> int:
    """Bytes to take of ``free`` ones so that ``budget`` stay; `OutsideError` where there are fewer."""
    if free < budget:
        raise OutsideError(f"{free:,} bytes of the GPU are free, fewer than the budget of {budget:,}")
    return free - budget


def main() -> int:
    parser = argparse.ArgumentParser(description="Hold all of the first GPU but BUDGET bytes until the input ends.")
    parser.add_argument("budget", type=int)
    args = parser.parse_args()
    import torch

    try:
        torch.zeros(1, device="cuda")  # the driver's own part of this process is taken before the rest is counted
        kept = torch.empty(hold(torch.cuda.mem_get_info()[0], args.budget), dtype=torch.uint8, device="cuda")
    except (OutsideError, RuntimeError) as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        return 1
    print(READY, flush=True)
    sys.stdin.read()
    del kept
    return 0


if __name__ == "__main__":
    sys.exit(main())
