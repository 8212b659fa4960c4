"""Elementwise kernels and attention against their plain forms, in float64, with gradients."""

from __future__ import annotations

import making
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.models.llama.modeling_llama import rotate_half

import drafttrain.drafters.attention_plan as attention_plan
from drafttrain.drafters.attention import KeysValues, attend
from drafttrain.drafters.attention_plan import AttentionPlan
from drafttrain.drafters.batch import Batch
from drafttrain.drafters.kernels import rotate, swiglu, take_rows, unit_rms


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def assert_same(got: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    """Same values, and same gradients of a random projection of them."""
    torch.testing.assert_close(got, expected)
    direction = normal(*expected.shape, seed=9).detach()
    theirs = torch.autograd.grad(expected, inputs, direction)
    # An input that nothing came of (no slots at all) has a gradient of zero.
    ours = torch.autograd.grad(got, inputs, direction, materialize_grads=True)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


def test_unit_rms() -> None:
    x = normal(5, 7)
    assert_same(unit_rms(x, 1e-3), F.rms_norm(x, (7,), eps=1e-3), x)


def test_rotate() -> None:
    x, angle = normal(5, 3, 8), normal(5, 1, 4).detach()
    cos, sin = angle.cos().repeat(1, 1, 2), angle.sin().repeat(1, 1, 2)
    signed = torch.cat([-angle.sin(), angle.sin()], -1)
    assert_same(rotate(x, cos, signed), x * cos + rotate_half(x) * sin, x)


def test_swiglu() -> None:
    x = normal(4, 10)
    assert_same(swiglu(x), F.silu(x[:, :5]) * x[:, 5:], x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [3, 4])  # in float32, rows of whole words of 8 bytes and not
def test_take_rows(dtype: torch.dtype, width: int) -> None:
    x, rows = normal(6, 1, width).detach().to(dtype).requires_grad_(), torch.tensor([4, 0, 5, 1])
    taken, direction = take_rows(x, rows), normal(4, 1, width).detach().to(dtype)
    assert torch.equal(taken, x[rows])
    (ours,) = torch.autograd.grad(taken, x, direction)
    (theirs,) = torch.autograd.grad(x[rows], x, direction)
    assert torch.equal(ours, theirs)


def plain_attention(
    batch: Batch,
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    window: int | None = None,
) -> Tensor:
    """All keys of all depths in one row of scores, masked."""
    slots, rounds, depth = batch.slots, batch.rounds, len(keys) - 1
    window = len(batch.tokens) + len(keys) if window is None else window
    same = batch.rollout_of[rounds][:, None] == batch.rollout_of[slots]
    visible = same & (slots <= rounds[:, None]) & (rounds[:, None] + depth - slots < window)
    own = torch.eye(len(rounds), dtype=torch.bool)
    mask = torch.cat([visible, *(own & (depth - d < window) for d in range(1, depth + 1))], 1)
    key, value = torch.cat(keys).transpose(0, 1), torch.cat(values).transpose(0, 1)
    return F.scaled_dot_product_attention(query.transpose(0, 1), key, value, mask).transpose(0, 1)


def attended(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    batch: Batch,
    window: int | None = None,
) -> Tensor:
    kept, plan = KeysValues(), AttentionPlan(batch, query.dtype)
    for key, value in zip(keys, values, strict=True):
        kept.add(key, value, plan)
    return attend(query, kept, plan, window)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=7),
    st.integers(1, 3),
    st.sampled_from([1, 30, 200, 1 << 17]),
    st.sampled_from([None, 1, 2, 3, 7]),
    st.sets(st.integers(0, 60), max_size=4),
)
def test_attend(
    sizes: list[tuple[int, int]],
    depths: int,
    square_at_once: int,
    window: int | None,
    missing: set[int],
) -> None:
    prompts, lengths = [p for p, _ in sizes], [p + completion for p, completion in sizes]
    batch = making.bare_batch(prompts, lengths)
    batch.captured[[index for index in missing if index < len(batch.captured)]] = False
    slots, rounds = len(batch.slots), len(batch.rounds)
    query = normal(rounds, 2, 8)
    keys = [normal(slots if d == 0 else rounds, 2, 8, seed=10 + d) for d in range(depths)]
    values = [normal(slots if d == 0 else rounds, 2, 8, seed=20 + d) for d in range(depths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_plan, "square_at_once", lambda dtype: square_at_once)
        got = attended(query, keys, values, batch, window)
        expected = plain_attention(batch, query, keys, values, window)
        assert_same(got, expected, query, *keys, *values)


@pytest.mark.parametrize("ahead", [0.0, 3.0, 40.0, 900.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("square_at_once", [1 << 9, 1 << 19])  # of some queries, and of all
@pytest.mark.parametrize("window", [None, 9])
def test_attention_to_scores_far_above_a_rounds_own(
    dtype: torch.dtype,
    ahead: float,
    square_at_once: int,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What some slots' keys score more than a round's own, `ahead`, neither overflows nor is
    rounded away, and is not seen before its slot or beyond its window."""
    monkeypatch.setattr(attention_plan, "square_at_once", lambda dtype: square_at_once)
    batch = making.bare_batch([1], [40])
    query, key, value = (normal(len(batch.slots), 2, 32, seed=seed).detach() for seed in range(3))
    query[..., 0], key[..., 0] = 1.0, 0.0
    key[[0, 7, 30], :, 0] = ahead * 32**0.5
    exact = [tensor.to(dtype).double() for tensor in (query, key, value)]
    expected = plain_attention(batch, exact[0], exact[1:2], exact[2:], window)
    got = attended(query.to(dtype), [key.to(dtype)], [value.to(dtype)], batch, window).double()
    allowed = {torch.bfloat16: 0.01, torch.float32: 1e-4, torch.float64: 1e-9}[dtype]
    assert (got - expected).norm() < allowed * expected.norm()


@pytest.mark.parametrize("square_at_once", [1 << 15, 1 << 19])  # of some queries, and of all
@pytest.mark.parametrize("window", [None, 60])
def test_gradients_of_attention_in_bfloat16(
    square_at_once: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that lie far from zero together, as those of trained heads do.

    Rounded themselves, instead of what they differ from their log-sum-exp by, they would cost a
    gradient up to 29%.
    """
    monkeypatch.setattr(attention_plan, "square_at_once", lambda dtype: square_at_once)
    batch = making.bare_batch([1], [400])
    slots = len(batch.slots)
    exact = [normal(slots, 2, 32, seed=seed) + offset for seed, offset in enumerate((3, 3, 0, 0))]
    exact = [tensor.detach().bfloat16().double().requires_grad_() for tensor in exact]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]

    def gradients(inputs: list[Tensor]) -> tuple[Tensor, ...]:
        query, key, value, direction = inputs
        out = attended(query, [key], [value], batch, window)
        return torch.autograd.grad(out, (query, key, value), direction)

    # In float64 by the same code, which `test_attend` compares with plain attention.
    for got, expected in zip(gradients(rounded), gradients(exact), strict=True):
        assert (got.double() - expected).norm() < 0.03 * expected.norm()
