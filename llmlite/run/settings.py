"""What `quantize` can be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from llmlite.errors import InputError
from llmlite.plan.plan import SolverName
from llmlite.run.text import check_row_length


@dataclass(frozen=True)
class RoundingSettings:
    """What `quantize` and `merge` can be told of how weights are rounded."""

    to: str | None = field(
        default=None, metadata={"help": "FORMAT:TYPE, as in gguf:q4_k_m, gptq:w4g128, compressed-tensors:w4a16g64"}
    )
    solver: SolverName = field(
        default="auto",
        metadata={
            "help": "rtn rounds to nearest; imatrix too, with scales weighted by the inputs; feedback (auto) makes "
            "error good by other weights"
        },
    )
    calibration: tuple[str, ...] = field(
        default=(),
        metadata={"help": "text, JSON lines or chat files, or dataset names (default: a small mix that is packaged)"},
    )
    calibration_tokens: int = field(default=32768, metadata={"help": "tokens of calibration text in all"})
    row_length: int = field(default=512, metadata={"help": "tokens in one calibration row"})
    types: tuple[str, ...] = field(
        default=(),
        metadata={"help": "gguf: PATTERN=TYPE over the type that TO gives, last match wins, as in down_proj=q6_k"},
    )
    seed: int = field(default=0, metadata={"help": "chooses the calibration rows"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, or auto: cuda where there is one"})
    threads: int | None = field(default=None, metadata={"help": "processor threads (default: torch's choice)"})
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of a hub id"})
    resume: bool = field(default=False, metadata={"help": "go on with the unfinished run that has the same -o"})


@dataclass(frozen=True)
class QuantizeSettings(RoundingSettings):
    """What `quantize` can be told."""

    target_size: str | None = field(
        default=None, metadata={"help": "in place of TO: size of the GGUF file, as in 2.5GB; each tensor gets a type"}
    )
    target_bpw: float | None = field(
        default=None, metadata={"help": "in place of TO: bits per weight of the GGUF file; each tensor gets a type"}
    )
    desc_act: bool = field(
        default=False, metadata={"help": "gptq files: groups of channels by falling activation, not of neighbours"}
    )
    sweeps: int = field(default=4, metadata={"help": "feedback: rounds of coordinate descent over all codes"})
    drift: float = field(
        default=1.0,
        metadata={"help": "feedback: how much is applied of the correction for what earlier layers lost, 0 to 1"},
    )
    damping: float = field(default=0.02, metadata={"help": "added to the moments' diagonal, as a share of its median"})
    repair: bool = field(
        default=False,
        metadata={"help": "then train norms, scales and minimums on the base's predictions, at the same bytes"},
    )
    repair_steps: int = field(default=128, metadata={"help": "repair: steps of training at most"})
    imatrix: str | None = field(
        default=None, metadata={"help": "a file of llama.cpp's: --solver imatrix goes by it, and needs no text"}
    )


def check(settings: QuantizeSettings) -> None:
    """`InputError` for settings that can't be followed, whatever the model."""
    wanted = [option for option, given in (
        ("--to", settings.to), ("--target-size", settings.target_size), ("--target-bpw", settings.target_bpw),
    ) if given is not None]  # fmt: skip
    if len(wanted) != 1:
        raise InputError(
            f"{' and '.join(wanted) or 'the target is missing'}: one of --to FORMAT:TYPE, --target-size and "
            "--target-bpw is right"
        )
    if settings.imatrix is not None and (settings.solver not in ("auto", "imatrix") or settings.calibration):
        raise InputError("--imatrix: goes with --solver imatrix, and without --calibration")
    check_row_length(settings.calibration_tokens, settings.row_length)
    if not 0 < settings.damping <= 1:
        raise InputError(f"--damping {settings.damping}: above 0 and at most 1 is right")
    if not 0 <= settings.drift <= 1:
        raise InputError(f"--drift {settings.drift}: from 0 to 1 is right")
    if settings.sweeps < 0:
        raise InputError(f"--sweeps {settings.sweeps}: 0 or more is right")
