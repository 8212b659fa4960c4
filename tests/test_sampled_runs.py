"""Where others speak between the policy's own tokens, nothing is trained on and nothing counted."""

from __future__ import annotations

from dataclasses import replace

import making
import pytest
import torch

from drafttrain.config import TrainingConfig
from drafttrain.control.acceptance import estimate_acceptance
from drafttrain.rollouts.record import Rollout
from drafttrain.rollouts.segment import read_segment
from drafttrain.rollouts.spool import SpoolWriter
from drafttrain.training.trainer import Trainer

POLICY = making.policy_shape()
LAYOUT = making.layout(POLICY)
HEADS = {0: making.policy_head(POLICY)}


def with_gap(rollout: Rollout, start: int = 8, stop: int = 11) -> Rollout:
    generated = torch.arange(rollout.length) >= rollout.prompt_length
    generated[start:stop] = False
    return replace(rollout, generated=generated)


def up_to(rollout: Rollout, prompt_length: int, length: int) -> Rollout:
    """The same rollout, ended early, with another part of it as the prompt."""
    assert rollout.aux_hidden is not None
    captured = rollout.captured[:length].clone()
    captured[-1] = False
    return replace(
        rollout,
        tokens=rollout.tokens[:length],
        prompt_length=prompt_length,
        captured=captured,
        last_hidden=rollout.last_hidden[:length],
        aux_hidden=rollout.aux_hidden[:length],
        generated=None,
    )


@pytest.mark.parametrize("method", ["probabilistic", "greedy"])
def test_acceptance_is_that_of_each_run_by_itself(method: str) -> None:
    drafter = making.drafter(POLICY)
    rollouts = making.rollouts(POLICY, 8)

    def estimate(some: list[Rollout]) -> tuple[float, list[float]]:
        found = estimate_acceptance(drafter, some, LAYOUT, HEADS, k=1, method=method)
        return float(found.rounds.sum()), found.accepted.sum(0).tolist()

    together = estimate([with_gap(rollout) for rollout in rollouts])
    runs = [up_to(rollout, rollout.prompt_length, 8) for rollout in rollouts]
    runs += [up_to(rollout, 11, rollout.length) for rollout in rollouts if rollout.length > 13]
    short = [rollout for rollout in rollouts if rollout.length <= 13]
    assert not short
    apart = estimate(runs)
    assert together[0] == pytest.approx(apart[0])
    assert together[1] == pytest.approx(apart[1])


def test_what_the_policy_thought_of_others_words_is_not_trained_on() -> None:
    def loss(rollouts: list[Rollout]) -> float:
        config = TrainingConfig(draft_tokens=3)
        return Trainer(making.drafter(POLICY), config).step(rollouts, LAYOUT, HEADS).loss

    rollouts = [with_gap(rollout) for rollout in making.rollouts(POLICY, 4)]
    expected = loss(rollouts)
    for rollout in rollouts:
        # Row r predicts token r + 1; the first token of a run is never drafted.
        rollout.last_hidden[7:11] = 100.0
    assert loss(rollouts) == expected
    rollouts[0].last_hidden[11] = 100.0
    assert loss(rollouts) != expected


def test_without_a_gap_a_mask_changes_nothing() -> None:
    plain = making.rollouts(POLICY, 4)
    masked = [with_gap(rollout, 0, 0) for rollout in plain]
    losses = [
        Trainer(making.drafter(POLICY), TrainingConfig()).step(some, LAYOUT, HEADS).loss
        for some in (plain, masked)
    ]
    assert losses[0] == losses[1]


def test_a_segment_keeps_mask_and_domain(tmp_path) -> None:
    first, second = making.rollouts(POLICY, 2)
    first = replace(with_gap(first), domain="tools")
    path = SpoolWriter(tmp_path, "e").write([first, second], LAYOUT)
    found = list(read_segment(path).rollouts)
    assert [rollout.domain for rollout in found] == ["tools", None]
    for before, after in zip((first, second), found, strict=True):
        assert after.sampled_runs.tolist() == before.sampled_runs.tolist()
