"""Objectives and their gradients against an eager float64 reference."""

from __future__ import annotations

import pytest
import torch
from objective_reference import by_definition
from torch import Tensor

from drafttrain.drafters.batch import Batch
from drafttrain.training.fused import Softmax, values_of
from drafttrain.training.losses import draft_loss
from drafttrain.training.objectives import OBJECTIVES, ObjectiveName

H, V, DEPTHS = 8, 17, 3
PROMPTS, LENGTHS = [4, 2, 6], [14, 11, 9]


def make_batch(scale: float, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0)
    captured = torch.ones(sum(LENGTHS), dtype=torch.bool)
    captured[offsets[1:] - 1] = False
    captured[9] = False
    return Batch(
        tokens=torch.randint(V, (sum(LENGTHS),), generator=generator),
        offsets=offsets,
        captured=captured,
        last_hidden=torch.randn(sum(LENGTHS), H, generator=generator, dtype=torch.float64) * scale,
        aux_hidden=None,
        prompt_lengths=torch.tensor(PROMPTS),
        temperatures=torch.tensor([1.0, 0.7, 1.3], dtype=torch.float64),
    )


def reference_loss(
    hidden: Tensor,
    head: Tensor,
    batch: Batch,
    policy_head: Tensor,
    objective: ObjectiveName,
    draft_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    depth_decay: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """One row, one depth at a time, straight from the definitions; float64."""
    values, weights, overlaps = [], [], [[] for _ in range(DEPTHS)]
    drafted = torch.arange(V) if draft_ids is None else draft_ids
    if token_weights is None:
        token_weights = torch.ones(len(batch.tokens), dtype=torch.float64)
    starts = batch.rounds.tolist()
    for b, (prompt, length) in enumerate(zip(PROMPTS, LENGTHS, strict=True)):
        first, temperature = int(batch.offsets[b]), batch.temperatures[b]
        for depth in range(DEPTHS):
            # The first round starts after the first sampled token, tokens[prompt].
            for slot in range(prompt - 1, length):
                row = slot + 1 + depth
                if row >= length or not batch.captured[first + row] or first + slot not in starts:
                    continue
                p = (policy_head @ batch.last_hidden[first + row] / temperature).softmax(-1)[
                    drafted
                ]
                drafting = hidden[depth, starts.index(first + slot)]
                q = (head @ drafting / temperature).softmax(-1)
                values.append(by_definition(objective, p, q, 1 - p.sum()))
                weights.append(token_weights[first + row + 1] * depth_decay**depth)
                overlaps[depth].append(torch.minimum(p, q).sum().detach())
    weight = torch.stack(weights)
    loss = (torch.stack(values) * weight).sum() / weight.sum()
    return loss, torch.stack([torch.stack(o).mean() for o in overlaps])


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0], ids=["flat", "mixed", "peaked"])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_loss_and_gradients_equal_the_eager_reference(
    objective: ObjectiveName, scale: float, chunk: int
) -> None:
    batch = make_batch(scale)
    generator = torch.Generator().manual_seed(1)
    hidden = (
        torch.randn(DEPTHS, len(batch.rounds), H, generator=generator, dtype=torch.float64) * scale
    )
    head = torch.randn(V, H, generator=generator, dtype=torch.float64)
    policy_head = torch.randn(V, H, generator=generator, dtype=torch.float64)
    hidden.requires_grad_()
    head.requires_grad_()

    expected, overlap = reference_loss(hidden, head, batch, policy_head, objective)
    expected_grads = torch.autograd.grad(expected, (hidden, head))
    result = draft_loss(hidden, head, batch, policy_head, objective=objective, chunk=chunk)
    grads = torch.autograd.grad(result.loss, (hidden, head))

    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.acceptance, overlap)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0], ids=["flat", "mixed", "peaked"])
def test_a_draft_vocabulary_and_weights(objective: ObjectiveName, scale: float) -> None:
    batch = make_batch(scale)
    generator = torch.Generator().manual_seed(1)
    draft_ids = torch.tensor([0, 3, 4, 9, 16])
    token_weights = torch.rand(len(batch.tokens), generator=generator, dtype=torch.float64)
    hidden = torch.randn(DEPTHS, len(batch.rounds), H, generator=generator, dtype=torch.float64)
    head = torch.randn(len(draft_ids), H, generator=generator, dtype=torch.float64)
    policy_head = torch.randn(V, H, generator=generator, dtype=torch.float64)
    hidden.requires_grad_()
    head.requires_grad_()

    more = {"draft_ids": draft_ids, "token_weights": token_weights, "depth_decay": 0.7}
    expected, overlap = reference_loss(hidden, head, batch, policy_head, objective, **more)
    expected_grads = torch.autograd.grad(expected, (hidden, head))
    result = draft_loss(hidden, head, batch, policy_head, objective=objective, chunk=4, **more)
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.acceptance, overlap)
    grads = torch.autograd.grad(result.loss, (hidden, head))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad)


def test_a_frozen_head_gets_no_gradient() -> None:
    batch = make_batch(1.0)
    hidden = torch.randn(DEPTHS, len(batch.rounds), H, dtype=torch.float64, requires_grad=True)
    head = torch.randn(V, H, dtype=torch.float64)
    draft_loss(hidden, head, batch, head, objective="lk").loss.backward()
    assert hidden.grad is not None
    assert head.grad is None


@pytest.mark.parametrize("objective", list(OBJECTIVES))
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0], ids=["flat", "mixed", "peaked"])
def test_float32_stays_near_float64(objective: ObjectiveName, scale: float) -> None:
    """What trains, from logits on; of logarithms near -100 a unit in the last place is 8e-6."""
    generator = torch.Generator().manual_seed(1)
    given = torch.randn(2, DEPTHS, 20, V, generator=generator) * 4 * scale
    logits = given.double()
    log_p, log_q = logits[0, 0].log_softmax(-1), logits[1].log_softmax(-1)
    plain = OBJECTIVES[objective]
    shared = torch.minimum(log_p, log_q).exp().sum(-1)
    exact = plain.value(log_p, log_q), shared, plain.gradient(log_p, log_q)
    found = values_of(objective)(*(Softmax.of(z, torch.float32) for z in (given[0, 0], given[1])))
    for got, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-5)


def test_lk_where_some_rows_share_no_mass() -> None:
    log_p = torch.tensor([[300.0, 0.0, -300.0], [1.0, 0.0, 2.0]]).log_softmax(-1)
    log_q = torch.tensor([[-300.0, -20.0, 300.0], [0.0, 0.5, 1.0]]).log_softmax(-1)
    for rows in (slice(0, 1), slice(1, 2), slice(0, 2)):
        p, q = (Softmax.of(x[rows], torch.float32) for x in (log_p, log_q))
        value, overlap, slope = values_of("lk")(p, q)
        exact = OBJECTIVES["lk"]
        torch.testing.assert_close(value, exact.value(log_p[rows], log_q[rows]))
        torch.testing.assert_close(slope, exact.gradient(log_p[rows], log_q[rows]))
        shared = torch.minimum(log_p[rows].exp(), log_q[rows].exp()).sum(-1)
        torch.testing.assert_close(overlap, shared)
