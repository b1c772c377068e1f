"""The loop that all trainers share, on a task of a few numbers."""

import math
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from llmlite.adapt import training
from llmlite.adapt.training import TrainSettings, check_training, rate_factor, row_at, train
from llmlite.adapt.training_state import STATE, State, load_state, save_state
from llmlite.checkpoint.artifact import JOURNAL, atomic_directory, partial_of
from llmlite.errors import InputError, OutsideError

SETTINGS = TrainSettings(
    steps=12, batch_rows=3, accumulate=2, rate=0.05, judge_every=3, patience=0, save_every=2, dtype="float32"
)


class Killed(BaseException):
    """Stands for a kill: nothing after it runs that could tidy up."""


class Slope:
    """Finds the slope of y = 3 x from noisy rows, with a random part in each loss, as dropout is."""

    def __init__(self, rows: int = 10, kill_at: int | None = None):
        chance = torch.Generator().manual_seed(1)
        self.rows, self.seen, self.steps, self.kill_at = rows, [], 0, kill_at
        self.x = torch.randn(rows + 5, generator=chance)
        self.y = 3 * self.x + 0.1 * torch.randn(rows + 5, generator=chance)
        self.slope, self.bias = torch.nn.Parameter(torch.tensor([0.5])), torch.nn.Parameter(torch.tensor([0.0]))
        self.scale = 1.0

    def parameters(self):
        return {"slope": self.slope, "bias": self.bias}

    def groups(self):
        return [{"params": [self.slope]}, {"params": [self.bias], "rate": 0.1}]

    def loss(self, rows):
        if self.kill_at is not None and len(self.seen) == self.kill_at:
            raise Killed
        self.seen.append(list(rows))
        noise = 0.1 * torch.randn(())
        return self.scale * (self.slope * self.x[rows] + self.bias + noise - self.y[rows]).square().mean()

    def judge(self):
        assert not torch.is_grad_enabled()
        return float((self.slope * self.x[self.rows :] + self.bias - self.y[self.rows :]).square().mean())


def test_it_learns_and_puts_the_best_parameters_back(tmp_path: Path):
    task = Slope()
    trained = train(task, SETTINGS, tmp_path, "slope")
    assert trained.after < 0.8 * trained.before and trained.steps == len(trained.losses) == 12
    assert [step for step, _ in trained.judged] == [0, 3, 6, 9, 12]
    with torch.no_grad():
        assert task.judge() == pytest.approx(trained.after, rel=1e-6)
    assert trained.after == min(loss for _, loss in trained.judged) and trained.note == ""


@pytest.mark.parametrize("kill_at", range(1, 24, 3))  # forward passes; two of them are a step
def test_a_killed_run_goes_on_with_the_losses_of_an_unbroken_one(tmp_path: Path, kill_at: int):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    unbroken = Slope()
    expected = train(unbroken, SETTINGS, whole, "slope")
    with pytest.raises(Killed):
        train(Slope(kill_at=kill_at), SETTINGS, broken, "slope")
    assert (broken / JOURNAL).is_file()
    torch.manual_seed(99)  # another process
    resumed = Slope()
    found = train(resumed, SETTINGS, broken, "slope")
    assert (found.losses, found.judged, found.best_step) == (expected.losses, expected.judged, expected.best_step)
    assert torch.equal(resumed.slope, unbroken.slope)
    assert len(resumed.seen) == 24 - kill_at // 4 * 4  # it began at the last state, not at the beginning


def test_a_run_killed_after_training_trains_no_more(tmp_path: Path):
    expected, again = train(Slope(), SETTINGS, tmp_path, "slope"), Slope()
    assert train(again, SETTINGS, tmp_path, "slope").judged == expected.judged
    assert again.seen == []


def test_the_state_is_not_in_the_finished_directory(tmp_path: Path):
    with atomic_directory(tmp_path / "out") as folder:
        train(Slope(), SETTINGS, folder, "slope")
        assert (folder / STATE).is_file()
        (folder / "result").write_text("x")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["result"]


def test_another_training_is_not_gone_on_with(tmp_path: Path):
    train(Slope(), SETTINGS, tmp_path, "slope")
    with pytest.raises(InputError, match="differs in rate, rows"):
        train(Slope(rows=9), replace(SETTINGS, rate=0.1), tmp_path, "slope")


def test_it_stops_early_and_keeps_the_best(tmp_path: Path):
    task = Slope()
    trained = train(task, replace(SETTINGS, rate=3.0, warmup=0.0, patience=1, judge_every=1), tmp_path, "slope")
    assert trained.steps < 12
    held = [loss for _, loss in trained.judged]
    assert held[-1] >= min(held[:-1]) and trained.after == min(held)


def test_no_gain_is_said_and_changes_nothing(tmp_path: Path):
    task = Slope()
    trained = train(task, replace(SETTINGS, rate=1e3, warmup=0.0, patience=1, judge_every=1), tmp_path, "slope")
    assert trained.best_step == 0 and trained.after == trained.before and "no gain" in trained.note
    assert task.slope.item() == 0.5


def test_a_loss_that_is_not_a_number_stops_it_and_nothing_is_kept(tmp_path: Path):
    class Broken(Slope):
        def loss(self, rows):
            return super().loss(rows) * (math.nan if len(self.seen) > 8 else 1)

    with (
        pytest.raises(OutsideError, match=r"the loss is nan at step 5") as raised,
        atomic_directory(tmp_path / "out") as folder,
    ):
        train(Broken(), SETTINGS, folder, "slope")
    assert raised.value.exit_status == 3
    assert list(tmp_path.iterdir()) == []


def test_memory_that_is_full_is_one_sentence(tmp_path: Path):
    class Large(Slope):
        def loss(self, rows):
            raise torch.OutOfMemoryError("tried to allocate 9 GiB\nand more")

    with pytest.raises(OutsideError, match=r"slope: does not fit into memory \(tried to allocate 9 GiB\); fewer"):
        train(Large(), SETTINGS, tmp_path, "slope")


def test_a_state_is_put_where_its_parameters_are(tmp_path: Path):
    here = {"x": torch.nn.Parameter(torch.ones(2))}
    there = {"x": torch.nn.Parameter(torch.ones(2, device="meta"))}
    first, second = (torch.optim.AdamW(parameters.values()) for parameters in (here, there))
    here["x"].sum().backward()
    first.step()
    save_state(tmp_path, State(step=1), here, first)
    assert load_state(tmp_path, {}, there, second) is not None
    assert {value.device.type for value in second.state[there["x"]].values()} == {"meta"}


def test_a_gradient_that_is_not_a_number_stops_it(tmp_path: Path):
    class Steep(Slope):
        def loss(self, rows):
            return super().loss(rows) + (self.slope - self.slope.detach()).abs().sqrt().sum()  # 0, and no slope there

    with pytest.raises(OutsideError, match=r"gradient is (nan|inf) at step 1"):
        train(Steep(), SETTINGS, tmp_path, "slope")


def test_minutes_take_the_place_of_steps_and_end_the_schedule(tmp_path: Path):
    class Slow(Slope):
        def loss(self, rows):
            time.sleep(0.01)
            return super().loss(rows)

    trained = train(Slow(), replace(SETTINGS, steps=1, minutes=0.5 / 60), tmp_path, "slope")
    assert 1 < trained.steps < 26 and 0.5 <= trained.seconds < 5
    again = Slow()
    assert train(again, replace(SETTINGS, steps=1, minutes=0.5 / 60), tmp_path, "slope").steps == trained.steps
    assert again.seen == []


def test_a_disk_that_is_full_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_):
        raise training_state.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    from llmlite.adapt import training_state

    monkeypatch.setattr(training_state, "save_file", full)
    with pytest.raises(OutsideError, match="No space left"), atomic_directory(tmp_path / "out") as folder:
        train(Slope(), SETTINGS, folder, "slope")
    assert not partial_of(tmp_path / "out").exists()


def test_accumulated_batches_make_the_step_of_a_large_one(tmp_path: Path):
    class Exact(Slope):
        def loss(self, rows):
            return (self.slope * self.x[rows] + self.bias - self.y[rows]).square().mean()

    found = []
    for number, (batch, accumulate) in enumerate([(2, 3), (6, 1)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        found.append(train(Exact(), replace(SETTINGS, batch_rows=batch, accumulate=accumulate), folder, "slope").losses)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_every_epoch_has_each_row_once_in_another_order():
    epochs = [[row_at(place, 7, seed=3) for place in range(7 * epoch, 7 * epoch + 7)] for epoch in range(3)]
    assert all(sorted(rows) == list(range(7)) for rows in epochs) and epochs[0] != epochs[1] != epochs[2]


def test_the_rate_rises_and_falls():
    factors = [rate_factor(step / 20, (step + 1) / 20, 0.2) for step in range(20)]
    assert factors[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0]) and factors[4] == 1.0
    assert all(one > other for one, other in pairwise(factors[4:])) and 0 < factors[-1] < 0.02


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"steps": 0}, "--steps 0: at least 1"), ({"batch_rows": 0}, "--batch-rows 0"), ({"rate": 0.0}, "--rate"),
        ({"rate": math.nan}, "--rate nan"), ({"warmup": 1.0}, "--warmup"), ({"minutes": 0.0}, "--minutes"),
        ({"patience": -1}, "--patience"), ({"seed": 2**32}, "--seed 4294967296: below"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_followed_are_refused(changes, told):
    with pytest.raises(InputError, match=told):
        check_training(replace(SETTINGS, **changes))


def test_bfloat16_is_what_is_multiplied_in(tmp_path: Path):
    kinds = set()

    class Product(Slope):
        def loss(self, rows):
            made = self.x[rows][None] @ self.slope.expand(len(rows), 1)
            kinds.add(made.dtype)
            return super().loss(rows)

    train(Product(), replace(SETTINGS, steps=1, dtype="bfloat16"), tmp_path, "slope")
    assert kinds == {torch.bfloat16}
    assert training.computing_dtype("float32", torch.device("cpu")) == torch.float32
