"""Attention of training-time test: causal over the policy's features, diagonal over the drafts.

The round that starts at slot ``s`` sees the policy's features up to ``s`` (depth 0) and what it
drafted itself, one key for each earlier depth. So a further depth adds one column to the scores,
not another block of them, and the two parts are merged by their log-sum-exp.

Backward uses what makes ring attention work (Liu et al., arXiv 2310.01889): with the *merged*
output and log-sum-exp, each part's gradient can be taken alone, and its weights are recomputed
instead of stored. Rollouts are attended to one by one or in groups of similar length, so cost grows
with the sum of their squared lengths, never with the square of the batch.

Batched products do most of it. In bfloat16, what is subtracted from a score (a log-sum-exp) or
from a slope is subtracted inside the product, by spare columns that hold ones on one side and its
*terms* on the other, so that only the small difference is rounded. Scores are powers of two, not of
e: on a CPU the exponential of masked scores is several times as fast.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drafttrain.drafters.attention_plan import AttentionPlan, Group, Tile
from drafttrain.drafters.kernels import wide

_LN2 = math.log(2.0)
# What a round's weights may add up to, that of its own slot being 1. Beyond it scores lie so far
# above that one (some 20 in bfloat16) that what they differ by is rounded too much, or overflows.
_SUM_LIMIT, _SUM_LIMIT_SHORT = 1e30, float(1 << 20)
# How often a round may be weighed again, relative to what its weights added up to.
_MOST_PASSES = 16


@dataclass
class KeysValues:
    """Keys and values of one layer, of every draft depth so far.

    Attributes:
        depths: how many so far.
        context_keys, context_values: of depth 0, one block for each group of the plan.
        keys, values: of the depths after it, [R, heads, d] each.
    """

    depths: int = 0
    context_keys: tuple[Tensor, ...] = ()
    context_values: tuple[Tensor, ...] = ()
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def add(self, key: Tensor, value: Tensor, plan: AttentionPlan) -> None:
        """Those of the next depth: [S, heads, d] for every slot, then [R, heads, d].

        Rows may follow that are padding.
        """
        if self.depths == 0:
            self.context_keys = _Context.apply(plan, key)
            self.context_values = _Context.apply(plan, value)
        else:
            self.keys.append(key)
            self.values.append(value)
        self.depths += 1


class _Context(torch.autograd.Function):
    """Lays rows out in the blocks of a plan, once for all depths, ones in their spare columns."""

    @staticmethod
    def forward(ctx: Any, plan: AttentionPlan, packed: Tensor) -> tuple[Tensor, ...]:
        ctx.plan, ctx.shape = plan, packed.shape
        blocks = [group.block(packed, group.slots, _spare(packed)) for group in plan.groups]
        for block in blocks:
            block[..., packed.shape[-1] :] = 1.0
        return tuple(blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        grad = grads[0].new_zeros(ctx.shape)
        for group, block in zip(ctx.plan.groups, grads, strict=True):
            group.unblock(block, group.slots, grad)
        return None, grad


def attend(
    query: Tensor, kept: KeysValues, plan: AttentionPlan, window: int | None = None
) -> Tensor:
    """Attention from every round of a batch to its context and to what it drafted itself.

    Args:
        query: [R, heads, d], one for each round; rows may follow that are padding.
        kept: keys and values up to this depth.
        plan: of the same batch.
        window: how many positions a query sees, its own the last; None: all.

    Returns:
        [R, heads, d]; what stands in padding is finite and has no gradient.
    """
    groups, keys, values = plan.groups, kept.keys, kept.values
    context = (*kept.context_keys, *kept.context_values)
    if window is not None:
        # A query moves on with its depth, and leaves its round's context behind.
        keys, values, window = keys[-window:], values[-window:], window - len(keys)
        if window <= 0:
            groups, context = [], ()
    attended: Tensor = _Attend.apply(groups, window, query, *context, *keys, *values)
    return attended


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, groups: list[Group], window: int | None, query: Tensor, *keys_values: Tensor
    ) -> Tensor:
        context_keys, context_values, keys, values = _parts(len(groups), keys_values)
        scaled = query * (1.0 / (_LN2 * math.sqrt(query.shape[-1])))
        out = torch.zeros_like(scaled)
        no_context = 0.0 if groups else -math.inf
        lse = out.new_full((*out.shape[:2], 1), no_context, dtype=wide(out))
        for group, k, v in zip(groups, context_keys, context_values, strict=True):
            q = group.block(scaled, group.rounds, _spare(scaled))
            narrowed = group.narrowed(window)
            if q.is_cuda and narrowed is None:
                group_out, group_lse = _causal_fused(q, k, v, group)
            else:
                group_out, group_lse = _causal(q, k, v, group, narrowed)
            group.unblock(group_out, group.rounds, out)
            group.unblock(group_lse, group.rounds, lse)
        own = []  # weights of what the rounds drafted themselves, [R, heads, 1] each
        if keys:
            scores = torch.stack([lse, *(_dot(scaled, key) for key in keys)])
            lse = functools.reduce(torch.logaddexp2, scores)
            of_context, *own = scores.sub_(lse).exp2_().to(out.dtype)
            out *= of_context
            for weight, value in zip(own, values, strict=True):
                out.addcmul_(weight, value)
        ctx.groups, ctx.window, ctx.own = groups, window, own
        ctx.save_for_backward(scaled, out, lse, *keys_values)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled, out, lse, *keys_values = ctx.saved_tensors
        context_keys, context_values, keys, values = _parts(len(ctx.groups), keys_values)
        grad = grads[0].contiguous()
        delta = _dot(grad, out)
        grad_query = torch.zeros_like(scaled)
        of_context_keys, of_context_values = [], []
        for group, k, v in zip(ctx.groups, context_keys, context_values, strict=True):
            q, g = (group.block(rows, group.rounds, _spare(rows)) for rows in (scaled, grad))
            shift, mean = (group.block(rows, group.rounds) for rows in (lse, delta))
            narrowed = group.narrowed(ctx.window)
            gq, gk, gv = _causal_backward(q, k, v, g, shift, mean, group, narrowed)
            group.unblock(gq, group.rounds, grad_query)
            of_context_keys.append(gk)
            of_context_values.append(gv)
        of_keys, of_values = [], []
        for key, value, weight in zip(keys, values, ctx.own, strict=True):
            slope = (_dot(grad, value) - delta).to(grad.dtype) * weight
            grad_query.addcmul_(slope, key)
            of_keys.append(slope * _LN2 * scaled)
            of_values.append(grad * weight)
        grad_query *= 1.0 / math.sqrt(scaled.shape[-1])
        context = (*of_context_keys, *of_context_values)
        return None, None, grad_query, *context, *of_keys, *of_values


def _parts(groups: int, keys_values: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    """Context keys and values, of each group; then keys and values of later depths."""
    depths = len(keys_values) // 2 - groups
    ends = list(itertools.accumulate((groups, groups, depths, depths), initial=0))
    return tuple(keys_values[start:stop] for start, stop in itertools.pairwise(ends))


def _causal(
    query: Tensor, key: Tensor, value: Tensor, group: Group, window: int | None
) -> tuple[Tensor, Tensor]:
    """Causal attention with scores ``query @ key``: the output and its rows' log-sum-exp.

    On a CPU this takes about half the time of torch's fused kernel.

    Args:
        query: [rollouts * heads, size, d + spare]; what its spare columns hold is overwritten.
        key, value: [rollouts * heads, size, d + spare], with ones.
        group: that they are of.
        window: how many positions a query sees; None: all.

    Returns:
        [rollouts * heads, size, d + spare], of which d columns count; [.., size, 1], wide.
    """
    out = torch.empty_like(query)
    width = query.shape[-1] - _spare(query)
    lse = _dot(query[..., :width], key[..., :width])
    limit = _SUM_LIMIT_SHORT if _spare(query) else _SUM_LIMIT
    for tile in group.tiles(window):
        q, shift = query[:, tile.queries], lse[:, tile.queries]
        k, v = key[:, tile.keys], value[:, tile.keys]
        for _ in range(_MOST_PASSES):
            weights = _weights(k, q, shift, tile)
            summed = torch.bmm(weights.mT, v)
            # A value's ones add the weights up.
            total = summed[..., -1:] if _spare(v) else weights.sum(1)[..., None]
            shift += total.to(shift.dtype).clamp_max(_SUM_LIMIT).log2_()
            if not bool(total.max() > limit):
                break
        torch.div(summed, total, out=out[:, tile.queries])
    return out, lse


def _causal_fused(query: Tensor, key: Tensor, value: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """:func:`_causal` by torch's kernel for GPUs, which keeps no scores."""
    width = query.shape[-1] - _spare(query)
    q, k, v = (
        block[..., :width].unflatten(0, (group.rollouts, -1)).contiguous()
        for block in (query, key, value)
    )
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, True, scale=_LN2
    )
    # The kernel pads its rows of log-sum-exp.
    return out.flatten(0, 1), lse[..., : group.size].flatten(0, 1)[..., None] / _LN2


def _causal_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    group: Group,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`_causal`, whose weights are ``exp2(scores - lse)``.

    Args:
        query, grad: queries, and gradients of the output; their spare columns are overwritten.
        key, value: with ones.
        lse, delta: [rollouts * heads, size, 1], wide: log-sum-exp, and the mean of the slopes.
        group, window: as there.

    Returns:
        those of query (times the square root of d), [rollouts * heads, size, d], key and value.
    """
    width = query.shape[-1] - _spare(query)
    grad_q = query.new_empty(*query.shape[:-1], width)
    for tile in group.tiles(window):
        q, g = query[:, tile.queries], grad[:, tile.queries]
        k, v = key[:, tile.keys], value[:, tile.keys]
        weights = _weights(k, q, lse[:, tile.queries], tile)
        slopes = _slopes(v, g, delta[:, tile.queries], weights)
        grad_q[:, tile.queries] = torch.bmm(slopes.mT, k[..., :width])
        of_keys = torch.bmm(slopes, q[..., :width])
        of_values = torch.bmm(weights, g[..., :width])
        if tile.stop == group.size:
            sums = wide(key) if tile.start > 0 else key.dtype
            grad_k, grad_v = of_keys.to(sums), of_values.to(sums)
            if tile.first > 0:
                before = (0, 0, tile.first, 0)
                grad_k, grad_v = F.pad(grad_k, before), F.pad(grad_v, before)
        else:
            grad_k[:, tile.keys] += of_keys
            grad_v[:, tile.keys] += of_values
    grad_k, grad_v = (
        F.pad(total.to(key.dtype), (0, _spare(key))) for total in (grad_k.mul_(_LN2), grad_v)
    )
    return grad_q, grad_k, grad_v


def _weights(key: Tensor, query: Tensor, shift: Tensor, tile: Tile) -> Tensor:
    """``exp2(scores - shift)`` of the queries of `tile`; zero for slots that they do not see.

    Args:
        key: [.., keys, d + spare], with ones.
        query: [.., queries, d + spare]; its spare columns are overwritten.
        shift: [.., queries, 1], wide.

    Returns:
        [.., keys, queries]; with keys in rows most products need no transpose.
    """
    if not _spare(query):
        scores = torch.baddbmm(-shift.mT, key, query.mT)
    else:
        _put_terms(query, -shift)
        if tile.start == 0 and tile.window is None:
            # All of the tile lies along the diagonal: masked inside the product.
            after = key.new_full((key.shape[1], query.shape[1]), -math.inf).tril_(-1)
            return torch.baddbmm(after, key, query.mT).exp2_()
        scores = torch.bmm(key, query.mT)
    weights = scores.exp2_()
    weights[:, tile.start - tile.first :].triu_()
    if tile.window is not None:
        _forget(weights, tile, tile.window)
    return weights


def _forget(weights: Tensor, tile: Tile, window: int) -> None:
    """Zero the weights, [.., keys, queries], of keys that have left a query's window."""
    if tile.gone is not None:
        by_rollout = weights.unflatten(0, (len(tile.gone), -1))
        by_rollout.masked_fill_(tile.gone[:, None], 0.0)
        return
    # The tile's query j sees its keys from j - kept on.
    kept = window - 1 - (tile.start - tile.first)
    rows = tile.stop - tile.start - 1 - kept
    if rows > 0:
        weights[:, :rows].tril_(kept)


def _slopes(value: Tensor, grad: Tensor, delta: Tensor, weights: Tensor) -> Tensor:
    """Gradients of scores (to the base e), laid out as :func:`_weights`."""
    if _spare(grad):
        _put_terms(grad, -delta)
        return torch.bmm(value, grad.mT).mul_(weights)
    return torch.bmm(value, grad.mT).sub_(delta.mT).mul_(weights)


def _spare(like: Tensor) -> int:
    """Columns for a number of float32 precision in a shorter dtype: two.

    Wider ones need none, and a GPU's products want rows of whole 16 bytes.
    """
    if like.dtype == wide(like):
        return 0
    return 8 if like.is_cuda else 2


def _put_terms(x: Tensor, term: Tensor) -> None:
    """Write `term`, [.., 1], into the spare columns of `x`, which add up to it."""
    high, low, zero = x[..., -_spare(x) :].split([1, 1, _spare(x) - 2], -1)
    high.copy_(term)
    low.copy_(term - high)
    zero.zero_()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[.., d] times [.., d] to [.., 1], added up wide."""
    return (a * b).sum(-1, keepdim=True, dtype=wide(a))
