"""Layer two of the simulator: engines and the RL step, event by event."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.control.economics import EngineCost
from drafttrain.simulator.acceptance import Acceptance
from drafttrain.simulator.fleet import Fleet, Speculation
from drafttrain.simulator.pipeline import compare, run_step
from drafttrain.simulator.roofline import Measured
from drafttrain.simulator.scenario import Responses, Scenario, changed, load_preset
from drafttrain.simulator.study import study

COST = EngineCost(step=10e-3, token=1e-4, draft=1e-3)


def by_hand(lengths: list[int], k: int, tokens: float, slots: int, prompt: int) -> float:
    """One replica, one engine step after another."""
    waiting, running, now = list(lengths), [], 0.0
    while waiting or running:
        while waiting and len(running) < slots:
            running.append(float(waiting.pop(0)))
            now += COST.token * prompt
        # A fraction of a step ends with the request that ends in it.
        steps = min(1.0, min(running) / tokens)
        now += steps * COST.step_seconds(len(running), k)
        running = [left - steps * tokens for left in running]
        running = [left for left in running if left > 1e-9]
    return now


def fleet(k: int, tokens: float, slots: int, replicas: int = 1, prompt: int = 5) -> Fleet:
    return Fleet(Measured(COST), Speculation.fixed(k, tokens, slots), replicas, prompt)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=12),
    st.integers(0, 4),
    st.floats(0.0, 1.0),
    st.integers(1, 12),
)
def test_events_give_what_single_steps_give(
    lengths: list[int], k: int, part: float, slots: int
) -> None:
    tokens = 1 + k * part
    engine = fleet(k, tokens, slots)
    engine.submit(np.array([lengths], dtype=float), at=0.0)
    assert engine.complete(len(lengths)) == pytest.approx(by_hand(lengths, k, tokens, slots, 5))
    assert engine.tokens == pytest.approx(sum(lengths))
    assert engine.busy.sum() == pytest.approx(sum(engine.parts.values()))


def test_replicas_do_not_wait_for_each_other() -> None:
    together = fleet(0, 1.0, 4, replicas=2)
    together.submit(np.array([[10.0, 20.0], [5.0, 90.0]]), at=0.0)
    alone = fleet(0, 1.0, 4)
    alone.submit(np.array([[5.0, 90.0]]), at=0.0)
    assert together.complete(2) == pytest.approx(alone.complete(2))
    assert together.busy[0] < together.busy[1]


def test_later_requests_slow_down_those_that_run() -> None:
    quiet, disturbed = fleet(0, 1.0, 8), fleet(0, 1.0, 8)
    for engine in (quiet, disturbed):
        engine.submit(np.full((1, 4), 100.0), at=0.0)
    disturbed.submit(np.full((1, 4), 100.0), at=0.3)
    first = quiet.complete(4)
    assert first < disturbed.complete(4)
    # The others began at 0.3 s and end later.
    assert disturbed.complete(4) > first + 0.2


def test_requests_that_come_to_an_idle_engine_start_then() -> None:
    engine = fleet(0, 1.0, 8)
    engine.submit(np.full((1, 1), 10.0), at=50.0)
    assert engine.complete(1) == pytest.approx(50.0 + by_hand([10], 0, 1.0, 8, 5))


# --- the RL step ---------------------------------------------------------------------------------


def small(**changes: Any) -> Scenario:
    """A colocated job of 256 responses on 8 devices."""
    document = {
        "policy": "qwen3-8b",
        "engine": "vllm",
        "cluster": {"device": "h100", "gpus": 8},
        "workload": {
            "prompts": 32,
            "samples": 8,
            "responses": {"median": 600, "spread": 0.8, "cap": 2048},
        },
        "drafter": {"acceptance": {"constant": 0.8}},
        "pipeline": {"train_gpu_seconds": 80.0, "logprob_gpu_seconds": 16.0, "prepare": 1.0},
    }
    for key, value in changes.items():
        section, _, field = key.partition("__")
        if field:
            document[section] = {**document[section], field: value}
        else:
            document[section] = value
    return Scenario.model_validate(document)


def test_a_synchronous_step_is_its_stages() -> None:
    run = run_step(small(), 3)
    assert run.stages == {"data": 0.0, "prepare": 1.0, "logprob": 2.0, "train": 10.0}
    assert run.seconds == pytest.approx(13.0 + run.generation)
    assert sum(run.parts.values()) <= run.generation


def test_nothing_beats_the_bound() -> None:
    for k in (1, 3, 7):
        comparison = compare(small(), k)
        assert comparison.step_speedup <= comparison.bound


def test_free_drafts_and_verification_reach_the_bound() -> None:
    free = small(engine_cost={"step": 0.01, "token": 0, "draft": 0})
    for k in (1, 3, 7):
        comparison = compare(free, k)
        assert comparison.step_speedup == pytest.approx(comparison.bound)
        length = 1 + sum(0.8**j for j in range(1, k + 1))
        assert comparison.generation_speedup == pytest.approx(length)


def test_perfect_drafts_gain_k_plus_one_where_steps_cost_the_same() -> None:
    free = small(
        engine_cost={"step": 0.01, "token": 0, "draft": 0},
        drafter={"acceptance": {"constant": 1.0}},
    )
    assert compare(free, 3).generation_speedup == pytest.approx(4.0)


def test_worthless_drafts_only_cost() -> None:
    worthless = small(drafter={"acceptance": {"constant": 0.0}})
    assert compare(worthless, 3).step_speedup < 1.0
    # ... unless k follows the batch: then none are made.
    assert compare(worthless, None).step_speedup == pytest.approx(1.0)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 0.95), st.integers(1, 7))
def test_acceptance_is_never_bad(chance: float, k: int) -> None:
    def speedup(acceptance: float) -> float:
        drafter = changed(small().drafter, acceptance=Acceptance(constant=acceptance))
        return compare(changed(small(), drafter=drafter), k).generation_speedup

    assert speedup(chance) < speedup(min(1.0, chance + 0.05))


def test_k_by_batch_is_at_least_as_fast_as_no_speculation() -> None:
    for chance in (0.1, 0.4, 0.7):
        drafter = changed(small().drafter, acceptance=Acceptance(constant=chance), k=7)
        assert compare(changed(small(), drafter=drafter), None).step_speedup >= 0.99


@pytest.mark.parametrize(
    ("device", "slower"),
    [("h200", False), ("a100", True)],
)
def test_devices_are_told_apart(device: str, slower: bool) -> None:
    here, there = run_step(small(), 0), run_step(small(cluster__device=device), 0)
    assert (there.generation > here.generation) == slower


def test_long_tails_leave_devices_idle() -> None:
    even = small(workload__responses={"median": 800, "spread": 0.0})
    mean = small().workload.responses.sample(1000).mean()
    tail = small(workload__responses={"median": 800, "spread": 1.2, "cap": 8000})
    run_even, run_tail = run_step(even, 0), run_step(tail, 0)
    assert mean < 1000
    assert run_tail.generation / run_tail.tokens > 1.5 * run_even.generation / run_even.tokens


def test_responses_are_what_was_measured() -> None:
    lengths = Responses(measured=(10, 20, 20, 400)).sample(1000)
    assert np.unique(lengths).tolist() == [10, 20, 400]
    assert lengths.mean() == pytest.approx(112.5)


def test_a_small_cache_holds_few_requests() -> None:
    tight = small(cluster__memory_for_kv=0.2)
    assert run_step(tight, 0).generation > run_step(small(), 0).generation


# --- asynchronous --------------------------------------------------------------------------------


def overlapping(lag: int, train: float, generation_gpus: int | str = 6) -> Scenario:
    return small(
        cluster__generation_gpus=generation_gpus,
        pipeline={"lag": lag, "train_gpu_seconds": train, "logprob_gpu_seconds": 0.0},
    )


def test_slow_training_hides_generation() -> None:
    run = run_step(overlapping(1, train=4000.0), 0)
    assert run.seconds == pytest.approx(2000.0)
    assert run.exposed == 0.0
    assert compare(overlapping(1, train=4000.0), 3).step_speedup == pytest.approx(1.0)


def test_fast_training_leaves_generation_alone_to_be_waited_for() -> None:
    free = overlapping(1, train=0.0)
    run = run_step(free, 0)
    assert run.exposed == pytest.approx(run.seconds)
    assert compare(free, 3).step_speedup == pytest.approx(compare(free, 3).generation_speedup)


def test_overlap_is_faster_than_one_after_another() -> None:
    alone = run_step(overlapping(0, train=40.0), 0)
    lagged = run_step(overlapping(1, train=40.0), 0)
    assert max(20.0, alone.generation / 2) < lagged.seconds < alone.seconds


def test_the_best_division_is_no_worse_than_any() -> None:
    best = run_step(overlapping(1, 60.0, "best"), 3)
    for gpus in (1, 3, 5, 7):
        assert best.seconds <= run_step(overlapping(1, 60.0, gpus), 3).seconds * 1.001


# --- the study -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers() -> Any:
    drifting = {"constant": 0.75, "drift": {"per_version": 0.01, "recovery": 0.5}}
    return study(
        small(drafter={"acceptance": drifting}, online={"gpu_seconds": 0.5, "versions": 60})
    )


def test_sensitivity_names_real_gains(answers: Any) -> None:
    saved = {entry.what: entry.saved for entry in answers.sensitivity}
    assert list(saved.values()) == sorted(saved.values(), reverse=True)
    assert saved["memory bandwidth"] > saved["engine: host time of a step"] > 0
    # A fifth less of 13 s.
    other = saved["stages other than generation"] * answers.comparison.speculation.seconds
    assert other == pytest.approx(2.6)


def test_break_even_is_where_the_grid_changes_sides(answers: Any) -> None:
    assert 0.3 < answers.break_even_acceptance < 0.75
    assert answers.comparison.generation_speedup > 1


def test_kinds_are_told_apart_by_what_they_cost(answers: Any) -> None:
    kinds = {kind.name: kind for kind in answers.kinds}
    assert kinds["eagle3"].step_speedup == pytest.approx(answers.comparison.step_speedup)
    # The multi-token prediction layer has the whole vocabulary to score, an eagle3 drafter part.
    assert kinds["eagle3"].break_even_acceptance < kinds["mtp"].break_even_acceptance


def test_where_k_stops_paying() -> None:
    # Beyond 128 requests three drafts leave the captured graphs.
    crowded = study(small(workload__responses={"median": 50, "spread": 0.0}))
    assert crowded.pays[0] == (1, 128)
    assert len(crowded.pays) > 1  # where no graph serves a step without drafts either, they pay
    hopeless = study(small(drafter={"acceptance": {"constant": 0.01}}))
    assert hopeless.pays == []


def test_best_k_covers_every_batch_once(answers: Any) -> None:
    ends = [0]
    for first, last, _ in answers.best_k:
        assert first == ends[-1] + 1
        ends.append(last)


def test_training_pays_back_when_drift_costs_more(answers: Any) -> None:
    online = answers.online
    assert online.frozen[-1] < online.trained[-1] <= online.trained[0] * 1.01
    assert 1 < online.pays_back_at < 60
    dear = changed(answers.scenario, online=changed(answers.scenario.online, gpu_seconds=1e6))
    assert study(dear).online.pays_back_at is None


def test_the_largest_preset_answers_from_the_same_code() -> None:
    run = run_step(load_preset("235b-2048"), 5)
    assert run.generation_gpus < 2048
    assert run.seconds > run.stages["train"] * 0.999
