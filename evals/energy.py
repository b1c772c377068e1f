"""Energy that the machine itself counts: RAPL of the processor, NVML of an NVIDIA GPU. None where it can't tell.

RAPL: Linux's powercap interface (Documentation/power/powercap): each package is a folder intel-rapl:N (AMD's
processors too), with energy_uj, a counter in microjoules that starts again at max_energy_range_uj. Only the
superuser may read it on most systems. NVML: nvmlDeviceGetTotalEnergyConsumption, millijoules since the driver was
loaded (NVML API Reference, Device Queries). Both count everything that runs on the package or the card.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")


class Meter(Protocol):
    """``name``: what is counted."""

    name: str

    def joules(self) -> float:
        """Energy used so far, from any origin; never falls. Call it more often than the counter starts again
        (minutes)."""
        ...


class RaplMeter:
    """All packages of the processor together."""

    name = "RAPL, processor packages"

    def __init__(self, packages: list[Path]):
        self.packages = packages
        self.ranges = [_number(package / "max_energy_range_uj") for package in packages]
        self.last = self._read()
        self.total = 0

    def _read(self) -> list[int]:
        return [_number(package / "energy_uj") for package in self.packages]

    def joules(self) -> float:
        now = self._read()
        for value, before, span in zip(now, self.last, self.ranges, strict=True):
            self.total += value - before if value >= before else value + span - before
        self.last = now
        return self.total / 1e6


class NvmlMeter:
    """One GPU by its UUID ("GPU-..."), through the module pynvml of the package nvidia-ml-py."""

    name = "NVML, GPU"

    def __init__(self, nvml: Any, gpu: str):
        self.nvml = nvml
        self.handle = nvml.nvmlDeviceGetHandleByUUID(gpu)
        self.joules()  # a card that does not count energy says so here

    def joules(self) -> float:
        return self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle) / 1e3


def open_meter(gpu: str | None = None, powercap: Path = POWERCAP) -> Meter | None:
    """What counts the energy of the GPU of that UUID, or of the processor; None where nothing on this machine does."""
    return _rapl(powercap) if gpu is None else _nvml(gpu)


def _rapl(powercap: Path) -> RaplMeter | None:
    packages = sorted(path for path in powercap.glob("intel-rapl:*") if path.name.count(":") == 1)
    try:
        return RaplMeter(packages) if packages else None
    except PermissionError:  # a counter that this user may not read
        return None


def _nvml(gpu: str) -> NvmlMeter | None:
    if importlib.util.find_spec("pynvml") is None:
        return None
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
        return NvmlMeter(nvml, gpu)
    except nvml.NVMLError:  # no driver, or a card that does not count energy
        return None


def _number(file: Path) -> int:
    return int(file.read_text())
