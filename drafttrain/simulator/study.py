"""The answers a user came for: what speculation brings here, with which k, and what limits it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from drafttrain.simulator.acceptance import Acceptance
from drafttrain.simulator.models import DrafterKind
from drafttrain.simulator.pipeline import (
    Comparison,
    RunningStep,
    compare,
    mean_context,
    run_step,
    slots,
    step_model,
)
from drafttrain.simulator.roofline import AtContext
from drafttrain.simulator.scenario import Scenario, changed

GRID_K = (1, 2, 3, 5, 7)
GRID_ACCEPTANCE = (0.5, 0.6, 0.7, 0.8, 0.9)
# Kinds of drafters whose size follows from the policy.
KINDS: tuple[DrafterKind, ...] = ("eagle3", "mtp", "ngram")
# How much better each thing becomes in the sensitivity.
BETTER = 0.2


@dataclass(frozen=True)
class Cell:
    """One entry of the grid: k and a constant acceptance, with what they bring."""

    k: int
    acceptance: float
    generation_speedup: float
    step_speedup: float


@dataclass(frozen=True)
class Sensitivity:
    """An RL step with speculation, after one thing became a fifth better.

    Attributes:
        what: the thing.
        saved: part of the step's seconds that this saves.
    """

    what: str
    saved: float


@dataclass(frozen=True)
class Kind:
    """A kind of drafter at the scenario's k and acceptance.

    Attributes:
        break_even_acceptance: as in :class:`Study`.
    """

    name: DrafterKind
    generation_speedup: float
    step_speedup: float
    break_even_acceptance: float | None


@dataclass(frozen=True)
class Online:
    """A drafter trained beside the job against one frozen at the start, over RL steps.

    Attributes:
        frozen, trained: end-to-end speedup against no speculation at each version.
        pays_back_at: the first RL step by which training has saved more GPU time than it took; None
            within the steps looked at.
        saved_gpu_seconds: after the last step, net of what training took.
    """

    frozen: list[float]
    trained: list[float]
    pays_back_at: int | None
    saved_gpu_seconds: float


@dataclass(frozen=True)
class Study:
    """Everything ``drafttrain simulate`` prints.

    Attributes:
        comparison: at the scenario's k.
        by_k: for k = 1 to 8, with the scenario's acceptance.
        adaptive: with the best k at each running batch, up to the scenario's k.
        best_k: (smallest batch, largest batch, k), covering every batch of a replica.
        break_even_acceptance: chance of each draft at which the scenario's k pays at the engine's
            starting batch; None when nothing would.
        pays: (smallest, largest) running batch of a replica between which the scenario's k pays.
        batch: running requests of a replica at first.
        fits: most that a replica can run at once.
        kinds: other kinds of drafters, at the same acceptance.
    """

    scenario: Scenario
    comparison: Comparison
    by_k: dict[int, Comparison]
    adaptive: Comparison
    grid: list[Cell]
    sensitivity: list[Sensitivity]
    best_k: list[tuple[int, int, int]]
    break_even_acceptance: float | None
    pays: list[tuple[int, int]]
    batch: int
    fits: int
    online: Online
    kinds: list[Kind]


def study(scenario: Scenario) -> Study:
    """Answer every question about a scenario."""
    k = scenario.drafter.k
    loss = float(scenario.drafter.acceptance.drift.initial_loss)
    comparison = compare(scenario, k, loss)
    # The division of the devices is looked for once, not in every cell of a table.
    pinned = _pin(scenario, comparison.speculation)
    model, context = step_model(scenario), mean_context(scenario)
    cost = AtContext(model, context)
    batch = _starting_batch(scenario, comparison.speculation)
    fits = slots(scenario, model)
    accepted = list(scenario.drafter.acceptance.per_position_at(k, loss))
    return Study(
        scenario=scenario,
        comparison=comparison,
        by_k={n: compare(pinned, n, loss, comparison) for n in range(1, 9)},
        adaptive=compare(pinned, None, loss, comparison),
        grid=list(_grid(pinned, comparison)),
        sensitivity=_sensitivities(pinned, loss),
        best_k=_ranges(cost.best_k(b, accepted) for b in range(1, fits + 1)),
        break_even_acceptance=cost.break_even_acceptance(batch, k),
        pays=[
            (first, last)
            for first, last, gains in _ranges(
                cost.speedup(b, k, accepted) > 1.0 for b in range(1, fits + 1)
            )
            if gains
        ],
        batch=batch,
        fits=fits,
        online=_online(pinned, comparison.baseline),
        kinds=list(_kinds(pinned, comparison, batch, loss)),
    )


def _pin(scenario: Scenario, run: RunningStep) -> Scenario:
    if scenario.cluster.generation_gpus != "best":
        return scenario
    cluster = changed(scenario.cluster, generation_gpus=run.generation_gpus)
    return changed(scenario, cluster=cluster)


def _starting_batch(scenario: Scenario, run: RunningStep) -> int:
    replicas = run.generation_gpus // scenario.cluster.tensor_parallel
    requests = scenario.workload.prompts * scenario.workload.samples
    return min(-(-requests // replicas), slots(scenario, step_model(scenario)))


def _grid(scenario: Scenario, known: Comparison) -> Iterable[Cell]:
    for chance in GRID_ACCEPTANCE:
        drafter = changed(scenario.drafter, acceptance=Acceptance(constant=chance))
        for k in GRID_K:
            cell = compare(changed(scenario, drafter=drafter), k, known=known)
            yield Cell(k, chance, cell.generation_speedup, cell.step_speedup)


def _ranges(by_batch: Iterable[int]) -> list[tuple[int, int, int]]:
    """Runs of equal values over batches 1, 2, ...: (first batch, last batch, value)."""
    ranges = []
    for value, run in groupby(enumerate(by_batch, start=1), key=lambda entry: entry[1]):
        batches = [batch for batch, _ in run]
        ranges.append((batches[0], batches[-1], value))
    return ranges


def _kinds(scenario: Scenario, known: Comparison, batch: int, loss: float) -> Iterable[Kind]:
    if scenario.engine_cost is not None:
        return
    k, context = scenario.drafter.k, mean_context(scenario)
    for name in KINDS:
        other = changed(scenario, drafter=changed(scenario.drafter, kind=name))
        cell = compare(other, k, loss, known)
        needed = AtContext(step_model(other), context).break_even_acceptance(batch, k)
        yield Kind(name, cell.generation_speedup, cell.step_speedup, needed)


def _sensitivities(scenario: Scenario, loss: float) -> list[Sensitivity]:
    k = scenario.drafter.k
    before = run_step(scenario, k, loss).seconds
    found = [
        Sensitivity(what, 1.0 - run_step(better, k, better_loss).seconds / before)
        for what, better, better_loss in _improved(scenario, loss)
    ]
    return sorted(found, key=lambda entry: -entry.saved)


def _improved(scenario: Scenario, loss: float) -> Iterable[tuple[str, Scenario, float]]:
    """The scenario with one thing a fifth better at a time."""
    less, more = 1.0 - BETTER, 1.0 + BETTER
    cluster, engine, pipeline = scenario.cluster, scenario.engine, scenario.pipeline

    def device(**changes: Any) -> Scenario:
        return changed(
            scenario, cluster=changed(cluster, device=changed(cluster.device, **changes))
        )

    def software(**changes: float) -> Scenario:
        return changed(scenario, engine=changed(engine, **changes))

    if scenario.engine_cost is None:
        flops = {precision: rate * more for precision, rate in cluster.device.flops.items()}
        yield "memory bandwidth", device(bandwidth=cluster.device.bandwidth * more), loss
        yield "arithmetic rate", device(flops=flops), loss
        yield "engine: host time of a step", software(host=engine.host * less), loss
        yield "engine: cost of a drafting pass", software(draft=engine.draft * less), loss
        if engine.captured_tokens is not None:
            captured = int(engine.captured_tokens * more)
            yield "engine: largest captured graph", software(captured_tokens=captured), loss
    stages = {
        name: value * less
        for name in ("data", "prepare", "logprob_gpu_seconds", "train_gpu_seconds")
        if (value := getattr(pipeline, name)) is not None
    }
    faster = changed(pipeline, training_efficiency=pipeline.training_efficiency * more, **stages)
    yield "stages other than generation", changed(scenario, pipeline=faster), loss
    yield "drafts rejected", _fewer_rejections(scenario, loss), 0.0
    responses = scenario.workload.responses
    if responses.measured is None:
        shorter = changed(responses, cap=max(1, int(responses.cap * less)))
        workload = changed(scenario.workload, responses=shorter)
        yield "longest responses (cap)", changed(scenario, workload=workload), loss


def _fewer_rejections(scenario: Scenario, loss: float) -> Scenario:
    """A fifth fewer rejections at every position."""
    chances = scenario.drafter.acceptance.conditional(scenario.drafter.k) * (1.0 - loss)
    survive = np.minimum(np.cumprod(1.0 - (1.0 - chances) * (1.0 - BETTER)), 1.0)
    better = Acceptance(per_position=tuple(survive.tolist()))
    return changed(scenario, drafter=changed(scenario.drafter, acceptance=better))


def _online(scenario: Scenario, baseline: RunningStep) -> Online:
    online, k = scenario.online, scenario.drafter.k
    drift, gpus = scenario.drafter.acceptance.drift, scenario.cluster.gpus
    frozen = _step_seconds(scenario, k, drift.losses(online.versions, trained=False))
    trained = _step_seconds(scenario, k, drift.losses(online.versions, trained=True)) + online.swap
    saved = np.cumsum((frozen - trained) * gpus - online.gpu_seconds)
    # Paid back when it stays so.
    behind = np.flatnonzero(saved <= 0)
    first = int(behind[-1]) + 2 if len(behind) else 1
    return Online(
        frozen=(baseline.seconds / frozen).tolist(),
        trained=(baseline.seconds / trained).tolist(),
        pays_back_at=first if first <= online.versions else None,
        saved_gpu_seconds=float(saved[-1]),
    )


def _step_seconds(scenario: Scenario, k: int, losses: Any) -> Any:
    """Seconds of an RL step at each loss; interpolated between a few that are simulated."""
    known = np.unique(np.linspace(losses.min(), losses.max(), 5))
    return np.interp(losses, known, [run_step(scenario, k, loss).seconds for loss in known])
