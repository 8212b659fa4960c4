"""Objectives and their closed gradients against definitions written out in float64."""

from __future__ import annotations

import pytest
import torch
from objective_reference import by_definition
from torch import Tensor

from drafttrain.training.objectives import OBJECTIVES, ObjectiveName

ROWS, VOCAB = 40, 23
REGIMES = ["peaked", "flat", "long_tail"]
objectives = pytest.mark.parametrize("name", list(OBJECTIVES))


def policy_and_draft(regime: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """The policy's log-probabilities and the draft's logits: [ROWS, VOCAB]."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, ROWS, VOCAB, generator=generator, dtype=torch.float64)
    rank = torch.arange(1, VOCAB + 1, dtype=torch.float64)
    policy, draft = {
        "peaked": 15 * noise,
        "flat": 0.05 * noise,
        "long_tail": -2 * rank.log() + 0.5 * noise,
    }[regime]
    return policy.to(dtype).log_softmax(-1), draft.to(dtype)


@objectives
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("draft_vocabulary", [VOCAB, 9])
def test_values_and_gradients_are_those_of_the_definition(
    name: ObjectiveName, regime: str, draft_vocabulary: int
) -> None:
    log_p, logits = policy_and_draft(regime)
    log_p, logits = log_p[:, :draft_vocabulary], logits[:, :draft_vocabulary]
    logits.requires_grad_()
    log_q = logits.log_softmax(-1)
    p, q = log_p.exp(), logits.softmax(-1)
    rows = zip(p, q, 1 - p.sum(-1), strict=True)
    expected = torch.stack([by_definition(name, *row) for row in rows])
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(OBJECTIVES[name].value(log_p, log_q), expected)
    gradient = OBJECTIVES[name].gradient(log_p, log_q)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-6, atol=1e-10)


@objectives
@pytest.mark.parametrize("regime", REGIMES)
def test_float32_stays_close_to_float64(name: ObjectiveName, regime: str) -> None:
    log_p, logits = policy_and_draft(regime)
    exact = OBJECTIVES[name].gradient(log_p, logits.log_softmax(-1))
    log_p, logits = policy_and_draft(regime, torch.float32)
    rounded = OBJECTIVES[name].gradient(log_p, logits.log_softmax(-1))
    torch.testing.assert_close(rounded.double(), exact, rtol=1e-4, atol=1e-5)


@objectives
def test_gradients_are_finite_where_no_mass_is_shared(name: ObjectiveName) -> None:
    log_p = torch.tensor([[300.0, 0.0, -300.0]]).log_softmax(-1)
    log_q = torch.tensor([[-300.0, -20.0, 300.0]]).log_softmax(-1)
    assert OBJECTIVES[name].value(log_p, log_q).isfinite().all()
    gradient = OBJECTIVES[name].gradient(log_p, log_q)
    assert gradient.isfinite().all()
    vanishes = name in {"tv", "jsd", "reverse_kl"}  # which is why lk exists
    assert (gradient.abs().max() < 0.1) == vanishes


def test_a_perfect_draft_is_a_minimum_of_every_divergence() -> None:
    log_p, _ = policy_and_draft("long_tail")
    for name in ("kl", "reverse_kl", "jsd", "tv", "lk"):
        zero = torch.zeros(ROWS, dtype=log_p.dtype)
        torch.testing.assert_close(OBJECTIVES[name].value(log_p, log_p), zero)
    for name in ("soft_cross_entropy", "kl", "reverse_kl", "jsd"):
        gradient = OBJECTIVES[name].gradient(log_p, log_p)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))
