"""The loop that all trainers share: AdamW, warmup and cosine, early stop, a state on disk to go on from.

A `Task` says what is trained and what the loss is. The same process run under ``accelerate launch`` is one of several
that share each batch: every one computes the loss of its rows, and the gradients are added up.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from llmlite.adapt.training_state import State, best_file, load_state, read_tensors, save_state, write_tensors
from llmlite.errors import InputError, OutsideError, first_line
from llmlite.progress import advancing, console

BETAS = (0.9, 0.95)


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast to train; what a trainer adds or presets stands in a subclass of its own."""

    steps: int = field(default=100, metadata={"help": "steps of the optimizer"})
    batch_rows: int = field(default=4, metadata={"help": "rows of the data in one forward pass"})
    accumulate: int = field(default=1, metadata={"help": "forward passes whose gradients make one step"})
    rate: float = field(default=2e-4, metadata={"help": "learning rate at its highest"})
    warmup: float = field(default=0.05, metadata={"help": "share of the steps in which the rate rises"})
    clip: float = field(default=1.0, metadata={"help": "longest gradient; longer ones are shortened; 0: as they are"})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's pull towards 0"})
    seed: int = field(default=0, metadata={"help": "chooses the order of the rows and what is random in a step"})
    judge_every: int = field(default=10, metadata={"help": "steps between two looks at the held-out rows"})
    patience: int = field(default=3, metadata={"help": "looks without a gain after which training stops; 0: never"})
    save_every: int = field(default=10, metadata={"help": "steps after which the state for --resume is written"})
    minutes: float | None = field(default=None, metadata={"help": "in place of STEPS: train for so long"})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "what is multiplied in; auto: bfloat16 where the machine has instructions"}
    )


class Task(Protocol):
    """What is trained."""

    @property
    def rows(self) -> int:
        """How many rows there are to train on."""

    def parameters(self) -> Mapping[str, torch.nn.Parameter]:
        """What is trained, by names that a later process finds again."""

    def groups(self) -> list[dict[str, Any]]:
        """AdamW's groups: ``params``, and ``rate`` where it is another multiple of the settings' rate than 1."""

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """The mean loss of these rows, a scalar with a gradient."""

    def judge(self) -> float:
        """The loss on held-out rows; called without gradient."""


@dataclass(frozen=True)
class Trained:
    """Held-out loss ``before`` and ``after``, with the parameters of ``best_step`` (0: as they were) put back.

    ``losses``: of each step's batch; ``judged``: (step, held-out loss), (0, before) first; ``seconds``: of training,
    with that of the runs it went on from.
    """

    before: float
    after: float
    steps: int
    best_step: int
    losses: tuple[float, ...]
    judged: tuple[tuple[int, float], ...]
    seconds: float
    note: str = ""


def check_training(settings: TrainSettings) -> None:
    """`InputError` for settings that can't be followed, whatever the task."""
    for name in ("steps", "batch_rows", "accumulate", "judge_every", "save_every"):
        value = asdict(settings)[name]
        if value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value}: at least 1 is right")
    if not (settings.rate > 0 and math.isfinite(settings.rate)):
        raise InputError(f"--rate {settings.rate}: a number above 0 is right")
    if not 0 <= settings.warmup < 1:
        raise InputError(f"--warmup {settings.warmup}: a share from 0 to below 1 is right")
    for name in ("clip", "weight_decay", "patience", "seed"):
        value = asdict(settings)[name]
        if not value >= 0:
            raise InputError(f"--{name.replace('_', '-')} {value}: 0 or more is right")
    if settings.seed >= 2**32:
        raise InputError(f"--seed {settings.seed}: below {2**32} is right")
    if settings.minutes is not None and not settings.minutes > 0:
        raise InputError(f"--minutes {settings.minutes}: more than 0 is right")


def computing_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """What "auto", "float32" or "bfloat16" means on this device."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def train(task: Task, settings: TrainSettings, folder: Path, what: str) -> Trained:
    """Train ``task``; afterwards it has the parameters of the least held-out loss.

    ``folder`` is the partial directory of an artifact. The state is written into it, and one that is found there is
    gone on with, to the same losses as those of an unbroken run (with ``minutes``: for the time that is left).
    ``what`` names the work on the screen. Raises `InputError` for settings that can't be followed or differ from those
    of the state that is found, `OutsideError` for a loss that is not a number and for a disk or memory that is full.
    """
    check_training(settings)
    try:
        return _Loop(task, settings, folder, what).run()
    except torch.OutOfMemoryError as error:
        raise OutsideError(
            f"{what}: does not fit into memory ({first_line(error)}); fewer --batch-rows, or shorter rows, may be right"
        ) from None


class _Loop:
    def __init__(self, task: Task, settings: TrainSettings, folder: Path, what: str):
        from accelerate import Accelerator

        self.task, self.settings, self.folder, self.what = task, settings, folder, what
        self.parameters = dict(task.parameters())
        if not self.parameters or task.rows < 1:
            raise InputError(f"{what}: there is nothing to train, or no row to train on")
        self.device = next(iter(self.parameters.values())).device
        self.accelerator = Accelerator(mixed_precision="no", cpu=self.device.type == "cpu")
        if settings.batch_rows < self.accelerator.num_processes:
            raise InputError(
                f"--batch-rows {settings.batch_rows}: at least {self.accelerator.num_processes} is right, one for each "
                "process"
            )
        groups = [dict(group) for group in task.groups()]
        self.multiples = [group.pop("rate", 1.0) for group in groups]
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.rate, betas=BETAS, weight_decay=settings.weight_decay, fused=True
        )
        self.state = State()

    def run(self) -> Trained:
        state, settings = self._begin(), self.settings
        began = time.monotonic() - state.seconds
        limit = settings.steps if settings.minutes is None else settings.minutes * 60
        with advancing(self.what, limit, shown=self.accelerator.is_main_process) as show:
            while not self._finished():
                share = self._share()
                self._step(share, self._share_after(share))
                state.seconds = time.monotonic() - began
                done = self._done()
                if state.step % settings.judge_every == 0 or done:
                    self._judge()
                    state.seconds = time.monotonic() - began
                if state.step % settings.save_every == 0 or done:
                    self._save()
                show(state.step if settings.minutes is None else state.seconds, self._told())
        return self._end()

    def _begin(self) -> State:
        """The state as found, put into parameters and optimizer, or a fresh one."""
        run = {item.name: asdict(self.settings)[item.name] for item in fields(TrainSettings)}
        run |= {"rows": self.task.rows, "processes": self.accelerator.num_processes}
        found = load_state(self.folder, run, self.parameters, self.optimizer)
        self.state = found or State(run=run)
        self.accelerator.wait_for_everyone()  # before the first process writes what another one would find
        if found is None:
            self._judge()
            self._save()
        return self.state

    def _finished(self) -> bool:
        """Whether there is no further step: all are done, or the last looks brought nothing."""
        judged, patience = self.state.judged, self.settings.patience
        since = len(judged) - 1 - _best(judged)
        return self._done() or bool(patience and since >= patience)

    def _done(self) -> bool:
        """Whether the steps or the minutes are used up, in all processes alike."""
        if self.settings.minutes is None:
            return self.state.step >= self.settings.steps
        return self._same(self.state.seconds) >= self.settings.minutes * 60

    def _share(self) -> float:
        if self.settings.minutes is None:
            return self.state.step / self.settings.steps
        return min(self._same(self.state.seconds) / (self.settings.minutes * 60), 1.0)

    def _share_after(self, share: float) -> float:
        """The share that this step brings it to; of a first step in minutes, whose time isn't known, a guess."""
        step = self.state.step
        if self.settings.minutes is None:
            return (step + 1) / self.settings.steps
        return share + (share / step if step else self.settings.warmup / 10)

    def _step(self, share: float, after: float) -> None:
        settings, step = self.settings, self.state.step
        factor = rate_factor(share, after, settings.warmup)
        for group, multiple in zip(self.optimizer.param_groups, self.multiples, strict=True):
            group["lr"] = settings.rate * multiple * factor
        torch.manual_seed(
            (settings.seed << 32) + step * self.accelerator.num_processes + self.accelerator.process_index
        )
        total = torch.zeros((), dtype=torch.float64)
        for rows in self._micro_batches(step):
            with self._computing():
                loss = self.task.loss(rows) * (len(rows) / (settings.batch_rows * settings.accumulate))
            self.accelerator.backward(loss)
            total += loss.detach().double().cpu()
        value = self._reduced(total)
        if not math.isfinite(value):
            raise self._not_a_number(f"the loss is {value}")
        length = self._shorten_gradient()
        if not math.isfinite(length):
            raise self._not_a_number(f"the length of the gradient is {length}")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.state.step += 1
        self.state.losses.append(value)

    def _micro_batches(self, step: int) -> Iterator[list[int]]:
        """The rows of each forward pass of a step that are this process's."""
        size, mine = self.settings.batch_rows, self.accelerator
        for number in range(self.settings.accumulate):
            start = (step * self.settings.accumulate + number) * size
            rows = [row_at(place, self.task.rows, self.settings.seed) for place in range(start, start + size)]
            yield rows[mine.process_index :: mine.num_processes]

    def _shorten_gradient(self) -> float:
        """Add the processes' gradients up, and cut the sum to the settings' length; returns the length it had."""
        parameters = list(self.parameters.values())
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, reduction="sum")
        return float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip or math.inf))

    @torch.no_grad()
    def _judge(self) -> None:
        """Judge the parameters as they are, and keep them on disk where they are the best so far."""
        with self._computing():
            value = float(self.task.judge())
        if not math.isfinite(value):
            raise self._not_a_number(f"the held-out loss is {value}")
        judged = self.state.judged
        judged.append((self.state.step, value))
        if _best(judged) == len(judged) - 1 and self.accelerator.is_main_process:
            write_tensors(best_file(self.folder, self.state.step), self._named())
        if self.accelerator.is_main_process and self.state.step:
            told = f"{self.what}: step {self.state.step}, {self._told()}"
            console.print(told, style="dim", markup=False, highlight=False)

    def _save(self) -> None:
        if self.accelerator.is_main_process:
            self.state.best_step = self.state.judged[_best(self.state.judged)][0]
            save_state(self.folder, self.state, self.parameters, self.optimizer)
        self.accelerator.wait_for_everyone()

    def _end(self) -> Trained:
        state = self.state
        self._save()
        best, after = state.judged[_best(state.judged)]
        found = read_tensors(best_file(self.folder, best))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(found[name])
        before = state.judged[0][1]
        note = (
            "" if best else f"{self.what}: {state.step} steps brought no gain on held-out rows, so nothing is changed"
        )
        return Trained(
            before, after, state.step, best, tuple(state.losses), tuple(state.judged), round(state.seconds, 1), note
        )

    def _named(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}

    def _computing(self) -> AbstractContextManager:
        dtype = computing_dtype(self.settings.dtype, self.device)
        return torch.autocast(self.device.type, dtype) if dtype != torch.float32 else nullcontext()

    def _reduced(self, value: torch.Tensor) -> float:
        if self.accelerator.num_processes == 1:
            return float(value)
        return float(self.accelerator.reduce(value.to(self.device, torch.float32), reduction="sum"))

    def _same(self, value: float) -> float:
        """The first process's value, in all of them: clocks differ."""
        if self.accelerator.num_processes == 1:
            return value
        from accelerate.utils import broadcast

        return float(broadcast(torch.tensor(value, device=self.device)))

    def _not_a_number(self, what: str) -> OutsideError:
        return OutsideError(
            f"{self.what}: {what} at step {self.state.step + 1}, so training stopped and nothing was kept; a lower "
            "--rate, or --dtype float32, may be right"
        )

    def _told(self) -> str:
        losses = self.state.losses[-self.settings.judge_every :]
        mean = f"loss {sum(losses) / len(losses):.4f}, " if losses else ""
        return f"{mean}held-out {self.state.judged[-1][1]:.4f}"


def _best(judged: Sequence[tuple[int, float]]) -> int:
    """The place of the least held-out loss, the first of equal ones."""
    return min(range(len(judged)), key=lambda place: judged[place][1])


def rate_factor(share: float, after: float, warmup: float) -> float:
    """The share of the highest rate in a step that goes from ``share`` to ``after`` of the training.

    It rises evenly over ``warmup`` of the training, then falls as half a cosine to 0.
    """
    rising = min(after / warmup, 1.0) if warmup else 1.0
    falling = 0.5 * (1 + math.cos(math.pi * min(max(share - warmup, 0.0) / (1 - warmup), 1.0)))
    return rising * falling


def row_at(place: int, rows: int, seed: int) -> int:
    """The row at a place in the endless order of training: each epoch has every row once, in its own order."""
    epoch, within = divmod(place, rows)
    return int(_permutation(rows, seed, epoch)[within])


@lru_cache(maxsize=4)
def _permutation(rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)
