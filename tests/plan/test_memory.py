import subprocess
import sys
import textwrap

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

    small, large, out, to = sys.argv[1:]
    settings = QuantizeSettings(to, calibration_tokens=2048, row_length=512, threads=1)
    quantize(small, out + "-small", settings)  # the program itself: everything is imported and has run once
    before = memory("VmRSS")
    quantize(large, out, settings)
    print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize("to", ["gguf:q4_0", "compressed-tensors:w8a16"])
def test_the_memory_that_is_told_is_the_memory_that_is_used(tmp_path, to):
    small = save_tiny(tmp_path / "small", max_position_embeddings=1024)
    size = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2, "max_position_embeddings": 1024}
    large = save_tiny(tmp_path / "large", **size)
    script = textwrap.dedent(MEASURED)
    command = [sys.executable, "-c", script, str(small), str(large), str(tmp_path / "out"), to]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    checkpoint, target = open_checkpoint(large), parse_target(to)
    plan = make_plan(checkpoint, target, type_table(target, stored_dtype(checkpoint, target), False))
    told, used = working_memory(checkpoint, plan, BATCH_TOKENS), int(run.stdout.split()[-1])
    assert 0.75 * used < told < 1.5 * used, f"told {told / 1e6:.0f} MB, used {used / 1e6:.0f} MB"
