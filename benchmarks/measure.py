"""Medians of interleaved repetitions: everyone takes a step, then everyone takes the next.

Where that cannot be (:attr:`Cell.apart`), one contender takes all of its steps, then the next does.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace

from benchmarks.peers import FLOOR, OURS, PRECISIONS, Variant
from benchmarks.worker import TooLarge, Worker
from benchmarks.workload import DEVICE, Cell, Precision

LONG_STEP = 90.0
"""Seconds from which on the first step is the measurement."""
BUDGET = 10.0
"""Seconds after which a contender's repetitions in a cell end; one at least."""
MOST_REPETITIONS = 15
HOPELESS = 20.0
"""How many times another precision's step a step may take to be tried again; where a processor has
no bfloat16 products, it is fifty."""


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
    """The precision in which each contender takes the shorter step of `pilot`; the floor: ours.

    On a GPU it is bfloat16 for everyone, as is usual there.
    """
    if DEVICE.type == "cuda":
        return dict.fromkeys([FLOOR, *names], "bfloat16")
    chosen: dict[str, Precision] = {}
    fastest: dict[str, float] = {}
    variants = [(name, precision) for name in names for precision in PRECISIONS]
    with ExitStack() as stack:
        workers = [Worker(name, pilot, Variant(precision)) for name, precision in variants]
        for worker in workers:
            stack.enter_context(closing(worker.wait()))
        for worker, (name, precision) in zip(workers, variants, strict=True):
            worker.step()  # a peer may compile in it
            seconds = worker.step().seconds
            if seconds < HOPELESS * fastest.get(name, math.inf):
                seconds = min(seconds, worker.step().seconds)
            if seconds < fastest.get(name, math.inf):
                fastest[name], chosen[name] = seconds, precision
    return {FLOOR: chosen[OURS]} | chosen


def measure(cell: Cell, precisions: dict[str, Precision]) -> dict[str, Result]:
    """Measure the contenders named in `precisions`, each in its precision.

    One that does not fit the memory limit takes its step in micro-batches, as few as fit; it is
    left out when a single rollout is too much.
    """
    if not cell.apart:
        return _interleaved(cell, precisions)
    alone = [_interleaved(cell, {name: precision}) for name, precision in precisions.items()]
    return {name: result for results in alone for name, result in results.items()}


def _interleaved(cell: Cell, precisions: dict[str, Precision]) -> dict[str, Result]:
    with ExitStack() as stack:
        workers = [Worker(name, cell, Variant(precisions[name])) for name in precisions]
        for worker in workers:
            worker.wait()
        started = [_start(stack, worker, cell) for worker in workers]
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
        """One more step, while the budget lasts."""
        if self.repeatable and sum(self.seconds) < BUDGET:
            self.seconds.append(self.worker.step().seconds)

    def result(self) -> Result:
        settings = str(self.worker.variant)
        median = statistics.median(self.seconds)
        return Result(settings, median, self.peak_bytes, len(self.seconds))


def _start(stack: ExitStack, worker: Worker, cell: Cell) -> _Run | None:
    """Warm up and measure memory, in more micro-batches until a step fits."""
    while True:
        try:
            first = worker.step(memory=True)
            repeatable = first.seconds < LONG_STEP
            # The first step also makes the optimizer's state.
            counted = worker.step(memory=True) if repeatable or cell.apart else first
        except TooLarge:
            worker.close()
            micro_batches = 2 * worker.variant.micro_batches
            if micro_batches > cell.rollouts:
                return None
            variant = replace(worker.variant, micro_batches=micro_batches)
            worker = Worker(worker.name, cell, variant).wait()
        else:
            stack.callback(worker.close)
            report = f"  {worker.name} ({worker.variant}): {counted.seconds:.2f} s a step"
            print(report, file=sys.stderr, flush=True)
            return _Run(worker, counted.peak_bytes, [counted.seconds], repeatable)
