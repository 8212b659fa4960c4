"""Medians of interleaved repetitions: everyone takes a step, then everyone takes the next."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass

from benchmarks.peers import FLOOR, OURS, PRECISIONS, Variant
from benchmarks.worker import TooLarge, Worker
from benchmarks.workload import Cell, Precision

LONG_STEP = 90.0
"""Seconds after which a first step is not repeated: it is the measurement."""
BUDGET = 12.0
"""Seconds of repetitions for one contender in one cell; one at least."""
MOST_REPETITIONS = 15


@dataclass(frozen=True)
class Result:
    """One contender in one cell.

    Attributes:
        settings: precision and micro-batches.
        seconds: median over `repetitions` steps.
        peak_bytes: above the resident model (see :mod:`benchmarks.worker`).
    """

    settings: str
    seconds: float
    peak_bytes: int
    repetitions: int


def faster_precisions(names: Iterable[str], pilot: Cell) -> dict[str, Precision]:
    """The precision in which each contender takes the shorter step of `pilot`; the floor: ours."""
    chosen = {name: _faster_precision(name, pilot) for name in names if name != FLOOR}
    return {FLOOR: chosen[OURS]} | chosen


def _faster_precision(name: str, pilot: Cell) -> Precision:
    seconds: dict[Precision, float] = {}
    for precision in PRECISIONS:
        with closing(Worker(name, pilot, Variant(precision))) as worker:
            worker.step()
            seconds[precision] = min(worker.step().seconds for _ in range(2))
    return min(PRECISIONS, key=lambda precision: seconds[precision])


def measure(cell: Cell, precisions: dict[str, Precision]) -> dict[str, Result]:
    """Measure the contenders named in `precisions`, each in its precision.

    One that does not fit the memory limit takes its step in micro-batches, as few as fit; it is
    left out when a single rollout is too much.
    """
    with ExitStack() as stack:
        started = [_start(stack, name, cell, precisions[name]) for name in precisions]
        runs = [run for run in started if run is not None]
        for _ in range(MOST_REPETITIONS - 1):
            for run in runs:
                run.repeat()
        return {run.worker.name: run.result() for run in runs}


@dataclass
class _Run:
    """A worker past its warm-up, and its steps so far."""

    worker: Worker
    peak_bytes: int
    seconds: list[float]
    repeatable: bool

    def repeat(self) -> None:
        """One more step, as long as the budget lasts."""
        if self.repeatable and sum(self.seconds) + self.seconds[0] < BUDGET:
            self.seconds.append(self.worker.step().seconds)

    def result(self) -> Result:
        settings = str(self.worker.variant)
        median = statistics.median(self.seconds)
        return Result(settings, median, self.peak_bytes, len(self.seconds))


def _start(stack: ExitStack, name: str, cell: Cell, precision: Precision) -> _Run | None:
    micro_batches = 1
    while micro_batches <= cell.rollouts:
        worker = Worker(name, cell, Variant(precision, micro_batches))
        try:
            first = worker.step(memory=True)
            if first.seconds > LONG_STEP:
                run = _Run(worker, first.peak_bytes, [first.seconds], repeatable=False)
            else:
                second = worker.step(memory=True)
                run = _Run(worker, second.peak_bytes, [second.seconds], repeatable=True)
        except TooLarge:
            worker.close()
            micro_batches *= 2
        else:
            stack.callback(worker.close)
            return run
    return None
