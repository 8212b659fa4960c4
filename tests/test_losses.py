"""Objectives and their gradients against an eager float64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from objective_reference import by_definition
from torch import Tensor

import drafttrain.training.losses as losses
from drafttrain.drafters.batch import Batch
from drafttrain.training.fused import Softmax, values_of
from drafttrain.training.losses import draft_loss
from drafttrain.training.objectives import OBJECTIVES, ObjectiveName

H, V, DEPTHS = 8, 17, 3
PROMPTS, LENGTHS, TEMPERATURES = [4, 2, 6], [14, 11, 9], [1.0, 0.7, 1.3]


def make_batch(
    scale: float,
    prompts: Sequence[int] = PROMPTS,
    lengths: Sequence[int] = LENGTHS,
    temperatures: Sequence[float] = TEMPERATURES,
) -> Batch:
    generator = torch.Generator().manual_seed(0)
    total, offsets = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    captured = torch.ones(total, dtype=torch.bool)
    captured[offsets[1:] - 1] = False
    captured[9:10] = False
    return Batch(
        tokens=torch.randint(V, (total,), generator=generator),
        offsets=offsets,
        captured=captured,
        last_hidden=torch.randn(total, H, generator=generator, dtype=torch.float64) * scale,
        aux_hidden=None,
        prompt_lengths=torch.tensor(prompts),
        temperatures=torch.tensor(temperatures, dtype=torch.float64),
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
    total, weight = 0.0 * (hidden.sum() + head.sum()), torch.zeros((), dtype=torch.float64)
    overlaps: list[list[Tensor]] = [[] for _ in hidden]
    drafted = torch.arange(V) if draft_ids is None else draft_ids
    if token_weights is None:
        token_weights = torch.ones(len(batch.tokens), dtype=torch.float64)
    starts, sampled = batch.rounds.tolist(), batch.runs > 0
    for b, length in enumerate(batch.lengths.tolist()):
        first, temperature = int(batch.offsets[b]), batch.temperatures[b]
        for depth in range(len(hidden)):
            for slot in range(first, first + length):
                row = slot + 1 + depth  # predicts the token after it
                if row + 1 >= first + length or not batch.captured[row] or slot not in starts:
                    continue
                if not sampled[slot + 1 : row + 2].all():  # others spoke in between
                    continue
                p = (policy_head @ batch.last_hidden[row] / temperature).softmax(-1)[drafted]
                q = (head @ hidden[depth, starts.index(slot)] / temperature).softmax(-1)
                here = token_weights[row + 1] * depth_decay**depth
                total = total + here * by_definition(objective, p, q, 1 - p.sum())
                weight += here
                overlaps[depth].append(torch.minimum(p, q).sum().detach())
    nothing = torch.zeros((), dtype=torch.float64)
    means = [torch.stack(o).mean() if o else nothing for o in overlaps]
    return total / weight if weight else total, torch.stack(means)


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


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["soft_cross_entropy", "lk"]),
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9)), min_size=1, max_size=3),
    st.sampled_from([[1.0] * 3, [0.6] * 3, TEMPERATURES]),
    st.sets(st.integers(0, 20), max_size=6),
    st.sets(st.integers(0, 30), max_size=3) | st.none(),
    st.sampled_from([1, 4 * V, 1 << 20]),
)
def test_any_rollouts_give_what_the_reference_gives(
    objective: ObjectiveName,
    sizes: list[tuple[int, int]],
    temperatures: list[float],
    missing: set[int],
    by_others: set[int] | None,
    elements_at_once: int,
) -> None:
    """Whatever is captured, the last rows too, and wherever others spoke in between."""
    prompts, lengths = [p for p, _ in sizes], [p + completion for p, completion in sizes]
    batch = make_batch(1.0, prompts, lengths, temperatures[: len(sizes)])
    index = torch.arange(len(batch.tokens))
    batch.captured[:] = ~torch.isin(index, torch.tensor(sorted(missing)))
    if by_others is not None:
        generated = (batch.runs > 0) & ~torch.isin(index, torch.tensor(sorted(by_others)))
        batch = replace(batch, generated=generated)
    assume(len(batch.rounds))
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(DEPTHS, len(batch.rounds), H, generator=generator, dtype=torch.float64)
    head, policy_head = torch.randn(2, V, H, generator=generator, dtype=torch.float64)
    inputs = hidden.requires_grad_(), head.requires_grad_()

    expected, overlap = reference_loss(*inputs, batch, policy_head, objective)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(losses, "_BLOCK_ELEMENTS_CPU", elements_at_once)
        result = draft_loss(*inputs, batch, policy_head, objective=objective)
    sampled = batch.runs > 0
    assert result.rows == int((batch.captured[:-1] & sampled[:-1] & sampled[1:]).sum())
    torch.testing.assert_close(result.loss, expected)
    torch.testing.assert_close(result.acceptance, overlap)
    expected_grads = torch.autograd.grad(expected, inputs)
    for grad, other in zip(torch.autograd.grad(result.loss, inputs), expected_grads, strict=True):
        torch.testing.assert_close(grad, other)


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
