"""Counters of energy: what the kernel's files and NVML's functions say, read as joules."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest

from llmlite.evals import energy
from llmlite.evals.energy import open_meter
from llmlite.evals.speed import ANSWER_TOKENS, measure_speed


def package(root, number, microjoules, most=1_000_000):
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(exist_ok=True)
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder


def test_packages_are_summed_and_a_counter_that_starts_again_goes_on(tmp_path):
    package(tmp_path, 0, 900_000)
    package(tmp_path, 1, 100)
    core = tmp_path / "intel-rapl:0:0"  # a part of package 0, counted there already
    core.mkdir()
    meter = open_meter(powercap=tmp_path)
    assert meter.joules() == 0
    package(tmp_path, 0, 950_000)
    package(tmp_path, 1, 50_100)
    assert meter.joules() == pytest.approx(0.1)
    package(tmp_path, 0, 30_000)
    assert meter.joules() == pytest.approx(0.18), "950,000 to 1,000,000 and on to 30,000"


def test_a_machine_without_counters_has_no_meter(tmp_path, monkeypatch):
    assert open_meter(powercap=tmp_path) is None
    package(tmp_path, 0, 1)

    def refuse(_):
        raise PermissionError

    monkeypatch.setattr(energy, "_number", refuse)
    assert open_meter(powercap=tmp_path) is None


def test_nvml_counts_the_gpu_that_is_used(monkeypatch):
    class NVMLError(Exception):
        pass

    asked = []

    def by_uuid(uuid):
        asked.append(uuid)
        return "handle"

    millijoules = iter([5_000, 6_000, 8_500])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(millijoules),
        NVMLError=NVMLError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(energy.importlib.util, "find_spec", lambda name: object())
    meter = open_meter("GPU-1")
    assert asked == ["GPU-1"]
    assert meter.joules() == 6
    assert meter.joules() == 8.5

    def refuse(handle):
        raise NVMLError

    nvml.nvmlDeviceGetTotalEnergyConsumption = refuse
    assert open_meter("GPU-1") is None, "a card that does not count"


def test_joules_per_token_are_those_of_the_prompt_and_of_the_answer():
    class Meter:
        name = "clockwork"

        def __init__(self):
            self.used = 0.0

        def joules(self):
            return self.used

    class Runner:
        vocab_size = 100

        def prompt(self, tokens):
            meter.used += 2.0 * len(tokens)
            return 1

        def step(self, token):
            meter.used += 3.0
            return token

    meter = Meter()
    found = measure_speed(Runner(), context=10, repeats=3, meter=meter)
    assert found.prompt_joules == pytest.approx(2.0)
    assert found.generate_joules == pytest.approx(3.0)
    assert found.meter == "clockwork"
    assert meter.used == pytest.approx(3 * (2.0 * 10 + 3.0 * ANSWER_TOKENS))
    without = measure_speed(Runner(), context=10, repeats=1)
    assert without.prompt_joules is None
    assert np.isfinite(without.prompt_tps.median)
