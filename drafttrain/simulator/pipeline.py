"""Layer two, the RL step: generation and training one after another, or overlapping with a lag.

Synchronous: data, prepare, generation, log-prob and training follow each other.

Asynchronous with lag L: the rollouts of step j start when the policy reaches version j - L, so the
engines work on up to L + 1 steps' rollouts at once while the trainer works on older ones. The
trainer starts on step j when its last rollout has ended; the time it then has waited is *exposed*
generation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from drafttrain.simulator.fleet import Fleet, Speculation
from drafttrain.simulator.models import drafter_shape
from drafttrain.simulator.roofline import AtContext, Measured, Roofline, StepModel
from drafttrain.simulator.scenario import Scenario, changed

# A replica is like any other once lengths are drawn from the same quantiles; this many show the
# stragglers of a batch.
_REPLICAS = 16
# Asynchronous steps simulated before, and while, the step time is taken, for each step under way.
_ROUNDS = 2


@dataclass(frozen=True)
class RunningStep:
    """One RL step in the steady state.

    Attributes:
        seconds: from one policy version to the next.
        generation: seconds from a step's first prompt to its last rollout's end.
        exposed: seconds that the trainer waits for rollouts; all of generation when synchronous.
        stages: the other stages' seconds.
        parts: seconds of generation by part, mean over engines; what is missing to `generation` is
            waiting for the longest rollouts of other engines.
        tokens: generated in the step, all devices.
        acceptance_length: tokens that a request gains in a step, averaged over its steps.
        generation_gpus: devices that generate.
    """

    seconds: float
    generation: float
    exposed: float
    stages: dict[str, float]
    parts: dict[str, float]
    tokens: float
    acceptance_length: float
    generation_gpus: int

    @property
    def share_of_generation(self) -> float:
        """Part of the step in which nothing but generation goes on."""
        return self.exposed / self.seconds


def step_model(scenario: Scenario) -> StepModel:
    """What a step of one replica costs."""
    if scenario.engine_cost is not None:
        return Measured(scenario.engine_cost)
    cluster, drafter = scenario.cluster, scenario.drafter
    return Roofline(
        policy=scenario.policy,
        device=cluster.device,
        engine=scenario.engine,
        precision=cluster.precision,
        kv_precision=cluster.kv_precision,
        drafter=drafter_shape(drafter.kind, scenario.policy, drafter.draft_vocab, drafter.model),
        devices=cluster.tensor_parallel,
    )


@dataclass(frozen=True)
class Comparison:
    """The same RL job with and without speculation, each on its own best division of the devices.

    Attributes:
        baseline: no speculation.
        speculation: with it.
        rollouts: seconds that the baseline's engines need for a step's rollouts when they never
            wait for training, without speculation and with it.
    """

    baseline: RunningStep
    speculation: RunningStep
    rollouts: tuple[float, float]

    @property
    def generation_speedup(self) -> float:
        """Of rollouts alone, on the same engines."""
        return self.rollouts[0] / self.rollouts[1]

    @property
    def step_speedup(self) -> float:
        """End to end."""
        return self.baseline.seconds / self.speculation.seconds

    @property
    def bound(self) -> float:
        """The end-to-end speedup if a step with drafts cost what one without does.

        ``1 / (R / length + 1 - R)``, R the share of generation (arXiv 2604.26779).
        """
        share = self.baseline.share_of_generation
        return 1.0 / (share / self.speculation.acceptance_length + 1.0 - share)


def compare(
    scenario: Scenario, k: int | None, loss: float = 0.0, known: Comparison | None = None
) -> Comparison:
    """Run a scenario without speculation and with it.

    Args:
        k: draft tokens; None for the best at each running batch.
        loss: part of the drafter's acceptance that is missing.
        known: another comparison of this job, to take the runs without speculation from.
    """
    baseline = known.baseline if known else run_step(scenario, 0)
    speculation = run_step(scenario, k, loss)
    if scenario.pipeline.lag == 0:
        return Comparison(baseline, speculation, (baseline.generation, speculation.generation))
    alone = _without_training(scenario, baseline.generation_gpus)
    before = known.rollouts[0] if known else run_step(alone, 0).seconds
    return Comparison(baseline, speculation, (before, run_step(alone, k, loss).seconds))


def run_step(scenario: Scenario, k: int | None, loss: float = 0.0) -> RunningStep:
    """Simulate an RL step.

    Args:
        k: draft tokens; 0 for no speculation; None for the best at each running batch.
        loss: part of the drafter's acceptance that is missing.
    """
    cluster = scenario.cluster
    if cluster.generation_gpus == "best":
        return _best_division(scenario, k, loss)
    generation_gpus = cluster.gpus if cluster.generation_gpus == "all" else cluster.generation_gpus
    stages = _stages(scenario, cluster.gpus - generation_gpus or cluster.gpus)
    replicas = generation_gpus // cluster.tensor_parallel
    lengths = _lengths(scenario, replicas)
    model = step_model(scenario)
    speculation = _speculation(scenario, model, lengths, k, loss)
    fleet = Fleet(model, speculation, len(lengths), scenario.workload.prompt_tokens)
    run = _synchronous if scenario.pipeline.lag == 0 else _overlapping
    course = run(scenario, fleet, lengths, sum(stages.values()))
    workload = scenario.workload
    return RunningStep(
        seconds=course.seconds,
        generation=course.generation,
        exposed=course.exposed,
        stages=stages,
        parts={name: total / course.steps for name, total in fleet.parts.items()},
        tokens=float(lengths.mean()) * workload.prompts * workload.samples,
        acceptance_length=fleet.tokens / fleet.request_steps,
        generation_gpus=generation_gpus,
    )


def mean_context(scenario: Scenario) -> float:
    """Tokens in a running request's KV cache, averaged over all steps of all requests."""
    lengths = scenario.workload.responses.sample(1024)
    return float(scenario.workload.prompt_tokens + (lengths**2).sum() / lengths.sum() / 2)


def slots(scenario: Scenario, model: StepModel) -> int:
    """Requests that run at once in a replica: the engine's limit, or what the KV cache holds."""
    limit = scenario.workload.slots
    if not isinstance(model, Roofline):
        return limit
    cluster = scenario.cluster
    room = cluster.memory_for_kv * cluster.device.memory - model.weight_bytes
    return max(1, min(limit, int(room / (model.kv_bytes * mean_context(scenario)))))


def _lengths(scenario: Scenario, replicas: int) -> NDArray[np.float64]:
    """Response lengths; float64 [replicas simulated, requests of each]."""
    workload = scenario.workload
    requests = math.ceil(workload.prompts * workload.samples / replicas)
    simulated = min(replicas, _REPLICAS)
    lengths = workload.responses.sample(simulated * requests)
    return np.random.default_rng(0).permutation(lengths).reshape(simulated, requests)


def _speculation(
    scenario: Scenario, model: StepModel, lengths: NDArray[np.float64], k: int | None, loss: float
) -> Speculation:
    waiting = lengths.shape[1] * (scenario.pipeline.lag + 1)
    running = min(slots(scenario, model), waiting)
    acceptance = scenario.drafter.acceptance
    if k is not None:
        accepted = acceptance.per_position_at(k, loss)
        return Speculation.fixed(k, 1.0 + float(accepted.sum()), running)
    accepted = acceptance.per_position_at(scenario.drafter.k, loss)
    cost = AtContext(model, mean_context(scenario))
    best = np.array([0] + [cost.best_k(batch, list(accepted)) for batch in range(1, running + 1)])
    tokens = 1.0 + np.concatenate([[0.0], np.cumsum(accepted)])
    return Speculation(best, tokens[best])


def _stages(scenario: Scenario, gpus: int) -> dict[str, float]:
    """Seconds of everything but generation, on the trainer's critical path."""
    pipeline, workload = scenario.pipeline, scenario.workload
    lengths = workload.responses.sample(1024)
    tokens = workload.prompts * workload.samples * (lengths.mean() + workload.prompt_tokens)
    device = scenario.cluster.device
    rate = device.flops.get("bf16", max(device.flops.values())) * pipeline.training_efficiency
    # 2 operations a weight and token forward, 4 backward.
    forward = 2 * scenario.policy.active_weights * tokens / rate
    logprob, train = pipeline.logprob_gpu_seconds, pipeline.train_gpu_seconds
    return {
        "data": pipeline.data,
        "prepare": pipeline.prepare,
        "logprob": (forward if logprob is None else logprob) / gpus,
        "train": (3 * forward if train is None else train) / gpus,
    }


class _Course(NamedTuple):
    """How a run went: the first three as in :class:`RunningStep`, and the steps it took."""

    seconds: float
    generation: float
    exposed: float
    steps: int


def _synchronous(
    scenario: Scenario, fleet: Fleet, lengths: NDArray[np.float64], other: float
) -> _Course:
    fleet.submit(lengths, at=0.0, prefill_share=1 / scenario.workload.samples)
    generation = fleet.complete(lengths.shape[1])
    return _Course(other + generation, generation, generation, steps=1)


def _overlapping(
    scenario: Scenario, fleet: Fleet, lengths: NDArray[np.float64], other: float
) -> _Course:
    lag, requests = scenario.pipeline.lag, lengths.shape[1]
    rng = np.random.default_rng(1)
    started: list[float] = []
    version, versions, generations, waits = 0.0, [0.0], [], []

    def dispatch(at: float) -> None:
        fleet.submit(rng.permuted(lengths, axis=0), at, 1 / scenario.workload.samples)
        started.append(at)

    for _ in range(lag + 1):
        dispatch(0.0)
    counted = _ROUNDS * (lag + 1)
    for step in range(2 * counted):
        ready = fleet.complete(requests)
        waits.append(max(0.0, ready - version))
        generations.append(ready - started[step])
        version = max(version, ready) + other
        versions.append(version)
        dispatch(version)
    seconds = (versions[-1] - versions[-1 - counted]) / counted
    generation, exposed = np.mean(generations[-counted:]), np.mean(waits[-counted:])
    return _Course(seconds, float(generation), float(exposed), steps=2 * counted)


def _without_training(scenario: Scenario, generation_gpus: int) -> Scenario:
    free = {"data": 0.0, "prepare": 0.0, "logprob_gpu_seconds": 0.0, "train_gpu_seconds": 0.0}
    cluster = changed(scenario.cluster, generation_gpus=generation_gpus)
    return changed(scenario, cluster=cluster, pipeline=changed(scenario.pipeline, **free))


def _best_division(scenario: Scenario, k: int | None, loss: float) -> RunningStep:
    """The shortest step over sixteenths of the devices.

    With more devices that generate, generation gets shorter and training longer, so the step has
    one minimum; it is found by halving.
    """
    gpus, parallel = scenario.cluster.gpus, scenario.cluster.tensor_parallel
    divisions = sorted({round(gpus * part / 16 / parallel) * parallel for part in range(1, 16)})
    divisions = [n for n in divisions if parallel <= n < gpus]

    @cache
    def run(index: int) -> RunningStep:
        cluster = changed(scenario.cluster, generation_gpus=divisions[index])
        return run_step(changed(scenario, cluster=cluster), k, loss)

    low, high = 0, len(divisions) - 1
    while low < high:
        middle = (low + high) // 2
        if run(middle).seconds <= run(middle + 1).seconds:
            high = middle
        else:
            low = middle + 1
    return run(low)
