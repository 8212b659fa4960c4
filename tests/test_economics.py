"""What drafting costs and brings, from an engine's step timings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.control.economics import EngineCost, StepCost, StepTiming, acceptance_length
from drafttrain.errors import ConfigError

costs = st.builds(
    EngineCost,
    step=st.floats(1e-4, 1.0),
    request=st.floats(0, 1e-2),
    token=st.floats(0, 1e-2),
    speculation=st.floats(0, 1.0),
    draft=st.floats(0, 1.0),
)
batches = st.integers(1, 512)
chances = st.floats(0.0, 1.0)


def survive(chance: float, k: int) -> list[float]:
    return [chance**j for j in range(1, k + 1)]


@given(costs, batches, st.integers(0, 6), chances)
def test_a_step_takes_the_sum_of_its_costs(
    cost: EngineCost, batch: int, k: int, chance: float
) -> None:
    seconds = cost.step + cost.request * batch + cost.token * batch * (k + 1)
    seconds += cost.draft * k + (cost.speculation if k else 0.0)
    assert cost.step_seconds(batch, k) == pytest.approx(seconds)
    accepted = survive(chance, 6)
    tokens = batch * (1 + sum(accepted[:k]))
    assert cost.tokens_per_second(batch, k, accepted) == pytest.approx(tokens / seconds)


@given(costs)
def test_fit_finds_the_costs_that_made_the_timings(cost: EngineCost) -> None:
    timings = [StepTiming(b, k, cost.step_seconds(b, k)) for b in (1, 8, 64) for k in (0, 1, 3, 5)]
    fitted = EngineCost.fit(timings)
    for batch, k in ((2, 2), (32, 4), (64, 0)):
        assert fitted.step_seconds(batch, k) == pytest.approx(cost.step_seconds(batch, k), rel=1e-6)


def test_fit_of_noisy_timings_predicts_what_it_has_not_seen() -> None:
    cost = EngineCost(step=8e-3, token=2e-5, draft=1e-3)
    noise = np.random.default_rng(0).normal(1.0, 0.05, 200)
    shapes = [(b, k) for b in (1, 2, 4, 8, 16) for k in (0, 2, 5)]
    timings = [
        StepTiming(*shapes[i % len(shapes)], cost.step_seconds(*shapes[i % len(shapes)]) * n)
        for i, n in enumerate(noise)
    ]
    fitted = EngineCost.fit(timings)
    for batch in (3, 12):
        for k in (1, 3, 4):
            assert fitted.step_seconds(batch, k) == pytest.approx(
                cost.step_seconds(batch, k), rel=0.03
            )


def test_a_cost_is_never_negative() -> None:
    # Bigger batches that seem faster must not make tokens pay.
    fitted = EngineCost.fit([StepTiming(1, 0, 0.02), StepTiming(64, 0, 0.01)])
    assert fitted.token == 0.0
    assert fitted.step > 0.0


@pytest.mark.parametrize(
    "timings",
    [
        [],
        [StepTiming(1, 0, 0.1)],
        [StepTiming(1, 0, 0.1), StepTiming(1, 1, 0.0)],
        [StepTiming(1, 0, 0.1), StepTiming(1, -1, 0.1)],
    ],
)
def test_timings_that_say_nothing_are_refused(timings: list[StepTiming]) -> None:
    with pytest.raises(ValueError, match="timing"):
        EngineCost.fit(timings)


@given(costs, batches, chances)
def test_best_k_is_the_fastest(cost: EngineCost, batch: int, chance: float) -> None:
    accepted = survive(chance, 6)
    best = cost.best_k(batch, accepted)
    fastest = cost.tokens_per_second(batch, best, accepted)
    assert all(cost.tokens_per_second(batch, k, accepted) <= fastest for k in range(7))


@given(costs, batches)
def test_worthless_drafts_are_never_made(cost: EngineCost, batch: int) -> None:
    assert cost.best_k(batch, survive(0.0, 6)) == 0


@given(batches, st.floats(0.01, 1.0))
def test_free_drafts_are_always_made(batch: int, chance: float) -> None:
    free = EngineCost(step=0.01, token=0, draft=0)
    assert free.best_k(batch, survive(chance, 6)) == 6
    assert free.speedup(batch, 6, survive(chance, 6)) == pytest.approx(
        acceptance_length(6, survive(chance, 6))
    )


@given(costs, batches, st.integers(1, 8), chances, chances)
def test_more_acceptance_is_faster(
    cost: EngineCost, batch: int, k: int, one: float, other: float
) -> None:
    low, high = sorted((one, other))
    slow = cost.tokens_per_second(batch, k, survive(low, k))
    assert cost.tokens_per_second(batch, k, survive(high, k)) >= slow


@given(costs, batches, st.integers(1, 8))
def test_break_even_is_where_speculation_neither_gains_nor_loses(
    cost: EngineCost, batch: int, k: int
) -> None:
    chance = cost.break_even_acceptance(batch, k)
    if chance is None:
        assert cost.speedup(batch, k, survive(1.0, k)) < 1.0
    else:
        assert cost.speedup(batch, k, survive(chance, k)) == pytest.approx(1.0, abs=1e-6)


def test_a_step_that_gets_cheaper_with_drafts_pays_at_once() -> None:
    @dataclass(frozen=True)
    class Odd(StepCost):
        def step_seconds(self, batch: float, k: int) -> float:
            return 1.0 if k == 0 else 0.5

    assert Odd().break_even_acceptance(1, 3) == 0.0


def test_too_few_positions_are_named() -> None:
    with pytest.raises(ValueError, match="known at 2 positions; 3 draft tokens"):
        acceptance_length(3, [0.9, 0.8])


def test_costs_survive_the_file(tmp_path: Path) -> None:
    cost = EngineCost(step=0.0123, token=4.5e-5, draft=0.001)
    cost.save(tmp_path / "cost.json")
    assert EngineCost.load(tmp_path / "cost.json") == cost


@pytest.mark.parametrize(
    ("content", "field"),
    [
        ('{"step": -1, "token": 0, "draft": 0}', "step"),
        ('{"step": 1, "token": 0, "draft": 0, "tokne": 1}', "tokne"),
        ("not json", "file"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str, field: str) -> None:
    path = tmp_path / "cost.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=field) as caught:
        EngineCost.load(path)
    assert caught.value.where == str(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        EngineCost.load(tmp_path / "none.json")
