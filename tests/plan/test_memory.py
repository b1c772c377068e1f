import subprocess
import sys
import textwrap

import numpy as np
import pytest

from llmlite.checkpoint.checkpoint import open_checkpoint
from llmlite.plan.memory import working_memory
from llmlite.plan.plan import make_plan, stored_dtype
from llmlite.plan.target import parse_target
from llmlite.plan.types import type_table
from llmlite.run.quantize import BATCH_TOKENS
from tests.tiny import save_tiny

MEASURED = """
    import sys
    from llmlite.run.quantize import QuantizeSettings, quantize

    def memory(field):
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))

    small, large, out, to, drift, ids = sys.argv[1:]
    settings = QuantizeSettings(to, calibration=(ids,), drift=float(drift), sweeps=2, threads=1)
    quantize(small, out + "-small", settings)  # the program itself: everything is imported and has run once
    before = memory("VmRSS")
    quantize(large, out, settings)
    print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize(
    ("to", "drift"),
    [
        ("gguf:q4_0-pure", 0.3),
        pytest.param("gguf:q4_0", 0.3, marks=pytest.mark.slow),
        pytest.param("gguf:q4_0", 0.0, marks=pytest.mark.slow),
        ("compressed-tensors:w4a16", 0.3),
    ],
)
def test_the_memory_that_is_told_is_the_memory_that_is_used(tmp_path, to, drift):
    save_tiny(tmp_path / "small")
    size = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 1}
    large = save_tiny(tmp_path / "large", **size)
    np.save(tmp_path / "ids.npy", np.random.default_rng(0).integers(0, 320, (16, 128)))
    script = textwrap.dedent(MEASURED)
    given = [str(tmp_path / name) for name in ("small", "large", "out")] + [to, str(drift), str(tmp_path / "ids.npy")]
    run = subprocess.run([sys.executable, "-c", script, *given], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    checkpoint, target = open_checkpoint(large), parse_target(to)
    plan = make_plan(checkpoint, target, type_table(target, stored_dtype(checkpoint, target), False))
    told, used = working_memory(checkpoint, plan, BATCH_TOKENS, 2 if drift else 1), int(run.stdout.split()[-1])
    assert 0.75 * used < told < 1.5 * used, f"told {told / 1e6:.0f} MB, used {used / 1e6:.0f} MB"
