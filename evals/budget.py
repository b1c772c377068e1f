"""Does an artifact fit into a budget of memory, and up to which context? Told by a prediction, then tried.

The limit is real while the artifact runs. On a CPU it is RLIMIT_AS: the budget, the interpreter included, and on top
the address space that is reserved and never touched (thread stacks, the allocator's arenas), which costs no memory.
On a GPU it is PyTorch's per-process fraction for transformers, and for llama.cpp a second process that holds the rest
of the card.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from llmlite.evals.devices import ballast
from llmlite.evals.locate import Location
from llmlite.evals.memory import NoRoomError
from llmlite.evals.predict import Prediction, longest, predict
from llmlite.evals.probe import probe_one
from llmlite.evals.runners import Limit

TOLERANCE, FLOOR = 0.03, 64 << 20  # how far predictions lie from measurements at most

SPARE = (0, 1, 4, 16)  # room left by one trial after the other, in 1% of the budget and 4 MiB


@dataclass(frozen=True)
class Fit:
    """Bytes. Whether a prompt of ``context`` tokens with its answer runs within ``budget``.

    ``predicted``: the peak that was told beforehand; ``peak``: the measured one, None where the limit was hit or a
    run had no chance; ``short_by``: how much more than the budget is predicted, 0 where it fits.
    ``longest``: the longest prompt, at most as long as the model was trained for with its answer, that was seen to
    run within the budget, 0 where none was; ``longest_peak``: the peak of that run.
    """

    name: str
    budget: int
    context: int
    fits: bool
    predicted: int
    peak: int | None
    short_by: int
    longest: int
    longest_peak: int | None

    @property
    def sentence(self) -> str:
        """What was found, for a reader."""
        where = f"{self.name}: a prompt of {self.context:,} tokens"
        if self.fits:
            assert self.peak is not None
            said = f"{where} fits into {_mib(self.budget)}: {_mib(self.peak)} at the peak"
        elif self.short_by:
            said = f"{where} does not fit into {_mib(self.budget)}: {_mib(self.short_by)} too few"
        else:
            said = f"{where} does not fit into {_mib(self.budget)}, although {_mib(self.predicted)} were predicted"
        if not self.longest:
            return f"{said}; not even a prompt of one token fits"
        return f"{said}; the longest that ran within it has {self.longest:,} tokens"


def measure_fit(location: Location, budget: int, context: int, threads: int | None = None) -> Fit:
    """Try a prompt of ``context`` tokens within ``budget`` bytes, and the longest that is expected to fit.

    Raises `InputError` where the artifact can't be loaded.
    """
    trial = _Trial(location, budget, threads, predict(location.path, [context], threads)[0])
    needed = trial.prediction.peak
    peak = trial.run(context) if needed - _slack(needed) <= budget else None
    found, found_peak = _longest(trial, context, peak)
    return Fit(
        name=location.path.name,
        budget=budget,
        context=context,
        fits=peak is not None,
        predicted=needed,
        peak=peak,
        short_by=0 if peak is not None else max(0, needed - budget),
        longest=found,
        longest_peak=found_peak,
    )


@dataclass(frozen=True)
class _Trial:
    location: Location
    budget: int
    threads: int | None
    prediction: Prediction

    def run(self, context: int) -> int | None:
        """The measured peak, None where the limit was hit."""
        held = (
            ballast(self.budget)
            if self.prediction.device == "cuda" and self.location.engine == "llama.cpp"
            else nullcontext()
        )
        try:
            with held:
                limit = Limit(self.budget, self.prediction.untouched)
                done = probe_one(self.location.path, self.threads, 0, context, limit)
        except NoRoomError:
            return None
        return done.memory.peak if done.memory.peak <= self.budget else None


def _longest(trial: _Trial, context: int, peak: int | None) -> tuple[int, int | None]:
    """The search by prediction, tried; with more and more room to spare where the trial fails."""
    tried = {context: peak}
    missed = max(0, peak - trial.prediction.peak) if peak is not None else 0
    for spare in SPARE:
        room = trial.budget - missed - spare * (trial.budget // 100 + (4 << 20))
        found = longest(trial.location.path, room, trial.threads).context if room > 0 else 0
        if peak is not None and found <= context:
            return context, peak
        if not found:
            break
        if found not in tried:
            tried[found] = trial.run(found)
        if tried[found] is not None:
            return found, tried[found]
    return (context, peak) if peak is not None else (0, None)


def _slack(bytes_: int) -> int:
    return int(bytes_ * TOLERANCE) + FLOOR


def _mib(bytes_: int) -> str:
    return f"{bytes_ / 2**20:,.0f} MiB"
