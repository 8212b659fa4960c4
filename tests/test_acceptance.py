"""The replay estimator against a simulation of the engine's accept-and-reject loop."""

from __future__ import annotations

from dataclasses import replace

import making
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import drafttrain.control.acceptance as acceptance
from drafttrain.control.acceptance import (
    AcceptanceEstimate,
    acceptance_weights,
    estimate_acceptance,
    replay_rounds,
)
from drafttrain.control.gate import judge
from drafttrain.drafters import Eagle3Drafter
from drafttrain.drafters.batch import make_batch
from drafttrain.rollouts.record import Rollout


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


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
@pytest.mark.parametrize("draft_ids", [None, torch.arange(0, 23, 2)], ids=["all", "every second"])
@pytest.mark.parametrize("logits_at_once", [1, 7 * 23, 1 << 24])
def test_weights_are_those_of_the_definition(
    method: str,
    draft_ids: torch.Tensor | None,
    logits_at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(acceptance, "_LOGITS_AT_ONCE", logits_at_once)
    policy, k = making.policy_shape(), 3
    torch.manual_seed(0)
    drafter = Eagle3Drafter.initialise(policy, layer_ids=making.LAYERS, draft_ids=draft_ids)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    temperatures = (1.0, 0.6, 1.4)
    sampled = [
        replace(rollout, temperature=temperature)
        for rollout, temperature in zip(making.rollouts(policy, 3), temperatures, strict=True)
    ]
    head = making.policy_head(policy)
    batch = make_batch(sampled, making.layout(policy), head)
    ids = list(range(policy.vocab_size)) if draft_ids is None else draft_ids.tolist()
    found = acceptance_weights(drafter, batch, head, k, method)
    with torch.no_grad():
        logits = drafter.unroll(batch, head.embed_tokens, k) @ drafter.head_weight(head.lm_head).T
    expected = torch.zeros(k, len(batch.rounds), dtype=torch.float64)
    for round_, slot in enumerate(batch.rounds.tolist()):
        rollout = int(batch.rollout_of[slot])
        for depth in range(k):
            place = slot + 2 + depth  # of the drafted token
            if (
                place >= batch.offsets[rollout + 1]
                or (token := int(batch.tokens[place])) not in ids
            ):
                continue
            z, row = logits[depth, round_], ids.index(token)
            if method == "greedy":
                expected[depth, round_] = float(z.argmax() == row)
            else:
                temperature = temperatures[rollout]
                p = (head.lm_head @ batch.last_hidden[place - 1] / temperature).softmax(-1)[token]
                expected[depth, round_] = min(1.0, float((z / temperature).softmax(-1)[row] / p))
    assert 0 < (expected == 1).sum() < expected.numel()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_rollouts_that_cannot_be_replayed_are_passed_over() -> None:
    policy, k = making.policy_shape(), 3
    whole, torn, short = making.rollouts(policy, 3)
    torn.captured[4] = False
    short = replace(short, prompt_length=short.length - k)

    def estimate(*rollouts: Rollout) -> AcceptanceEstimate:
        heads = {0: making.policy_head(policy)}
        return estimate_acceptance(
            making.drafter(policy), rollouts, making.layout(policy), heads, k=k
        )

    assert estimate(torn, whole, short).groups == [whole.group]
    for unusable in (torn, short):
        with pytest.raises(ValueError, match="complete enough"):
            estimate(unusable)


def test_each_policy_versions_rollouts_are_replayed_with_its_own_head() -> None:
    policy, k = making.policy_shape(), 2
    old, new = (making.rollouts(policy, 2, seed=version, version=version) for version in range(2))
    drafter, layout = making.drafter(policy), making.layout(policy)
    heads = {version: making.policy_head(policy, version) for version in range(2)}
    mixed = estimate_acceptance(drafter, [new[0], old[0], new[1], old[1]], layout, heads, k=k)
    for version, rollouts in enumerate((old, new)):
        alone = estimate_acceptance(drafter, rollouts, layout, {version: heads[version]}, k=k)
        rows = [mixed.groups.index(group) for group in alone.groups]
        torch.testing.assert_close(mixed.rounds[rows], alone.rounds)
        torch.testing.assert_close(mixed.accepted[rows], alone.accepted)


def test_figures_are_of_all_rounds_together() -> None:
    rounds = torch.tensor([10.0, 30.0, 10.0], dtype=torch.float64)
    accepted = torch.tensor([[8.0, 4.0], [12.0, 6.0], [5.0, 5.0]], dtype=torch.float64)
    estimate = AcceptanceEstimate(["a", "b", "a"], rounds, accepted)
    assert estimate.accepted_per_position == pytest.approx([0.5, 0.3])
    assert estimate.acceptance_length == pytest.approx(1.8)
    assert [sums.tolist() for sums in estimate.by_group()] == [[22.0, 18.0], [20.0, 30.0]]


def estimate_of(per_group: list[float], noise: float, seed: int) -> AcceptanceEstimate:
    generator = torch.Generator().manual_seed(seed)
    groups = [f"g{i // 4}" for i in range(4 * len(per_group))]
    rates = torch.tensor(per_group, dtype=torch.float64).repeat_interleave(4)[:, None]
    rates = rates + noise * torch.randn(len(groups), 1, generator=generator, dtype=torch.float64)
    rounds = torch.full((len(groups),), 10.0, dtype=torch.float64)
    return AcceptanceEstimate(groups, rounds, rates * rounds[:, None])


@pytest.mark.parametrize(("level", "deviations"), [(0.9, 1.645), (0.5, 0.674)])
def test_the_interval_is_that_of_a_mean_over_groups(level: float, deviations: float) -> None:
    rates = torch.rand(200, generator=seeded(0))
    low, high = estimate_of(rates.tolist(), 0.0, seed=0).interval(level)
    mean, error = 1.0 + float(rates.mean()), float(rates.std()) / len(rates) ** 0.5
    assert (low - mean) / error == pytest.approx(-deviations, abs=0.15)
    assert (high - mean) / error == pytest.approx(deviations, abs=0.15)


def test_gate_publishes_a_clear_gain_and_refuses_noise() -> None:
    base = [0.3, 0.5, 0.7, 0.4, 0.6, 0.2, 0.8, 0.5]
    serving = estimate_of(base, 0.02, seed=0)
    better = judge(estimate_of([b + 0.1 for b in base], 0.02, seed=1), serving, margin=0.0)
    same = judge(estimate_of(base, 0.02, seed=2), serving, margin=0.01)
    assert better.publish
    assert better.interval[0] <= better.gain <= better.interval[1]
    assert abs(better.gain - 0.1) < 0.03
    assert not same.publish
