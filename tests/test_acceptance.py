"""The replay estimator against a simulation of the engine's accept-and-reject loop."""

from __future__ import annotations

import making
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.control.acceptance import AcceptanceEstimate, replay_rounds
from drafttrain.control.gate import judge


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def simulate(w: torch.Tensor, prompt: int, length: int, runs: int) -> tuple[float, torch.Tensor]:
    """Rounds drawn one by one, as the engine would; means over `runs`."""
    k = w.shape[0]
    generator = torch.Generator().manual_seed(0)
    rounds, accepted = 0, torch.zeros(k)
    for _ in range(runs):
        t = prompt
        while t + k < length:
            drafts = 0
            while drafts < k and torch.rand((), generator=generator) < w[drafts, t]:
                accepted[drafts] += 1
                drafts += 1
            rounds += 1
            t += drafts + 1
    return rounds / runs, accepted / runs


def test_replay_agrees_with_simulation() -> None:
    k, prompt, length = 3, 2, 20
    batch = making.bare_batch([prompt], [length])
    # The round at slot s follows token s + 1.
    w = torch.zeros(k, length, dtype=torch.float64)
    w[:, batch.rounds + 1] = torch.rand(k, len(batch.rounds), generator=seeded(1)).double()
    rounds, accepted = replay_rounds(w[:, batch.rounds + 1], batch)
    expected_rounds, expected = simulate(w, prompt, length, runs=4000)
    assert abs(float(rounds[0]) - expected_rounds) < 0.1
    torch.testing.assert_close(accepted[0], expected.double(), atol=0.1, rtol=0)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(8, 30), st.sampled_from([0.0, 1.0]))
def test_certain_drafts_count_exactly(k: int, prompt: int, length: int, chance: float) -> None:
    batch = making.bare_batch([prompt], [length])
    w = torch.full((k, len(batch.rounds)), chance, dtype=torch.float64)
    rounds, accepted = replay_rounds(w, batch)
    step = k + 1 if chance else 1
    expected = len(range(prompt, length - k, step))
    assert float(rounds[0]) == expected
    assert accepted[0].tolist() == [expected * chance] * k


def test_a_rollout_is_counted_alike_alone_and_beside_another() -> None:
    k, short, long = 2, making.bare_batch([3], [12]), making.bare_batch([5], [21])
    w_short = torch.rand(k, len(short.rounds), generator=seeded(2), dtype=torch.float64)
    w_long = torch.rand(k, len(long.rounds), generator=seeded(3), dtype=torch.float64)
    both = replay_rounds(torch.cat([w_long, w_short], 1), making.bare_batch([5, 3], [21, 12]))
    for place, (w, batch) in enumerate([(w_long, long), (w_short, short)]):
        alone = replay_rounds(w, batch)
        torch.testing.assert_close(both[0][place], alone[0][0])
        torch.testing.assert_close(both[1][place], alone[1][0])


def estimate_of(per_group: list[float], noise: float, seed: int) -> AcceptanceEstimate:
    generator = torch.Generator().manual_seed(seed)
    groups = [f"g{i // 4}" for i in range(4 * len(per_group))]
    rates = torch.tensor(per_group, dtype=torch.float64).repeat_interleave(4)[:, None]
    rates = rates + noise * torch.randn(len(groups), 1, generator=generator, dtype=torch.float64)
    rounds = torch.full((len(groups),), 10.0, dtype=torch.float64)
    return AcceptanceEstimate(groups, rounds, rates * rounds[:, None])


def test_gate_publishes_a_clear_gain_and_refuses_noise() -> None:
    base = [0.3, 0.5, 0.7, 0.4, 0.6, 0.2, 0.8, 0.5]
    serving = estimate_of(base, 0.02, seed=0)
    better = judge(estimate_of([b + 0.1 for b in base], 0.02, seed=1), serving, margin=0.0)
    same = judge(estimate_of(base, 0.02, seed=2), serving, margin=0.01)
    assert better.publish
    assert better.interval[0] <= better.gain <= better.interval[1]
    assert abs(better.gain - 0.1) < 0.03
    assert not same.publish
