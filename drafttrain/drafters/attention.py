"""Attention of training-time test: causal over the policy's features, diagonal over the drafts.

The round that starts at slot ``s`` sees the policy's features up to ``s`` (depth 0) and what it
drafted itself, one key for each earlier depth. So a further depth adds one column to the scores,
not another block of them, and the two parts are merged by their log-sum-exp.

Backward uses what makes ring attention work (Liu et al., arXiv 2310.01889): with the *merged*
output and log-sum-exp, each part's gradient can be taken alone, and its weights are recomputed
instead of stored. Rollouts are attended to one by one or in groups of similar length, so cost grows
with the sum of their squared lengths, never with the square of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drafttrain.drafters.batch import Batch

# Slots squared that are attended to together, over all rollouts of a group; bounds the scores.
SQUARE_AT_ONCE = 1 << 18
# Share of a group's scores that may be padding.
_PADDING = 0.25


@dataclass(frozen=True)
class _Placed:
    """Where some packed rows lie in a group's [rollouts, size] block.

    Attributes:
        rows: the rows in the packed tensor.
        places: int64 [n], their places in the block; None when they fill it in order.
    """

    rows: slice
    places: Tensor | None


@dataclass(frozen=True)
class _Group:
    """Rollouts attended to together, each padded behind to the longest.

    A round stands at the place of its slot, so that attention is plainly causal; the places of
    slots that start no round hold zeros.

    Attributes:
        rollouts: how many.
        size: slots of the longest.
        slots, rounds: their context and their queries.
    """

    rollouts: int
    size: int
    slots: _Placed
    rounds: _Placed

    def pad(self, packed: Tensor, placed: _Placed) -> Tensor:
        """[N, heads, d] to [rollouts, heads, size, d], strided; empty places are zero."""
        rows = packed[placed.rows]
        if placed.places is not None:
            block = rows.new_zeros(self.rollouts * self.size, *rows.shape[1:])
            block[placed.places] = rows
            rows = block
        return rows.view(self.rollouts, self.size, *rows.shape[1:]).transpose(1, 2)

    def unpad(self, padded: Tensor, placed: _Placed, packed: Tensor) -> None:
        """Write [rollouts, heads, size, d] back to its rows of [N, heads, d]."""
        rows = padded.transpose(1, 2).flatten(0, 1)
        packed[placed.rows] = rows if placed.places is None else rows[placed.places]

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Queries [start, stop) at a time; the last first, which see the most keys."""
        step = max(1, SQUARE_AT_ONCE // (self.rollouts * self.size))
        for stop in range(self.size, 0, -step):
            yield max(stop - step, 0), stop


class AttentionPlan:
    """How the rollouts of a batch are grouped for attention; made once, used at every depth."""

    def __init__(self, batch: Batch, queries: Tensor | None = None) -> None:
        """Plan for queries from every round, or from those slots where `queries`, bool [S], is."""
        queries = batch.starts_round if queries is None else queries
        rollout_of = batch.rollout_of[batch.slots]
        slots = torch.bincount(rollout_of, minlength=len(batch.lengths))
        within = torch.arange(len(rollout_of), device=slots.device)
        within -= (slots.cumsum(0) - slots)[rollout_of]
        self.groups = list(_groups(slots.tolist(), rollout_of, within, queries))


def _groups(
    slots: list[int], rollout_of: Tensor, within: Tensor, queries: Tensor
) -> Iterator[_Group]:
    """Neighbours of similar length, as many as keep the scores few and the padding low.

    Args:
        slots: how many each rollout has.
        rollout_of, within: int64 [S], each slot's rollout and its place there.
        queries: bool [S], where a query comes from.
    """
    start, slot, row = 0, 0, 0
    while start < len(slots):
        stop = start + 1
        while stop < len(slots) and _fit_together(slots[start : stop + 1]):
            stop += 1
        size, here = max(slots[start:stop]), slice(slot, slot + sum(slots[start:stop]))
        places = (rollout_of[here] - start) * size + within[here]
        asking = places[queries[here]]
        if len(asking):
            yield _Group(
                stop - start,
                size,
                _placed(here.start, places, (stop - start) * size),
                _placed(row, asking, (stop - start) * size),
            )
        start, slot, row = stop, here.stop, row + len(asking)


def _fit_together(slots: list[int]) -> bool:
    square = len(slots) * max(slots) ** 2
    return square <= SQUARE_AT_ONCE and square * (1 - _PADDING) <= sum(s * s for s in slots)


def _placed(first_row: int, places: Tensor, size: int) -> _Placed:
    rows = slice(first_row, first_row + len(places))
    return _Placed(rows, None if len(places) == size else places)


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor], plan: AttentionPlan) -> Tensor:
    """Attention of draft depth ``len(keys) - 1`` from every round of a batch.

    Args:
        query: [R, heads, d], one for each round; rows may follow that are padding.
        keys, values: depth 0's [S, heads, d] for every slot, then [R, heads, d] for each depth,
            padded likewise.
        plan: of the same batch.

    Returns:
        [R, heads, d]; what stands in padding is finite and has no gradient.
    """
    attended: Tensor = _Attend.apply(plan, query, *keys, *values)
    return attended


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: AttentionPlan, query: Tensor, *keys_values: Tensor) -> Tensor:
        depths = len(keys_values) // 2
        keys, values = keys_values[:depths], keys_values[depths:]
        scaled = query * (1.0 / math.sqrt(query.shape[-1]))
        out = torch.zeros_like(scaled)
        lse = out.new_zeros(*out.shape[:2], 1, dtype=_wide(out))
        for group in plan.groups:
            q = group.pad(scaled, group.rounds)
            k, v = group.pad(keys[0], group.slots), group.pad(values[0], group.slots)
            group_out, group_lse = _causal(q, k, v)
            group.unpad(group_out, group.rounds, out)
            group.unpad(group_lse[..., None], group.rounds, lse)
        own = []  # weights of what the rounds drafted themselves, [R, heads, 1] each
        if depths > 1:
            scores = torch.stack([lse, *(_dot(scaled, key) for key in keys[1:])])
            lse = scores.logsumexp(0)
            of_context, *own = scores.sub_(lse).exp_().to(out.dtype)
            out *= of_context
            for weight, value in zip(own, values[1:], strict=True):
                out.addcmul_(weight, value)
        ctx.plan, ctx.depths = plan, depths
        ctx.save_for_backward(scaled, out, lse, *keys_values, *own)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled, out, lse, *kept = ctx.saved_tensors
        depths = ctx.depths
        keys, values, own = kept[:depths], kept[depths : 2 * depths], kept[2 * depths :]
        grad = grads[0].contiguous()
        delta = _dot(grad, out)
        grad_query = torch.zeros_like(scaled)
        grad_keys, grad_values = [torch.zeros_like(keys[0])], [torch.zeros_like(values[0])]
        for group in ctx.plan.groups:
            q, g = group.pad(scaled, group.rounds), group.pad(grad, group.rounds)
            k, v = group.pad(keys[0], group.slots), group.pad(values[0], group.slots)
            row = group.pad(lse, group.rounds), group.pad(delta, group.rounds)
            gq, gk, gv = _causal_backward(q, k, v, g, *row, group)
            group.unpad(gq, group.rounds, grad_query)
            group.unpad(gk, group.slots, grad_keys[0])
            group.unpad(gv, group.slots, grad_values[0])
        for key, value, weight in zip(keys[1:], values[1:], own, strict=True):
            grad_score = (_dot(grad, value) - delta).to(grad.dtype).mul_(weight)
            grad_values.append(grad * weight)
            grad_keys.append(scaled * grad_score)
            grad_query.addcmul_(grad_score, key)
        grad_query *= 1.0 / math.sqrt(scaled.shape[-1])
        return None, grad_query, *grad_keys, *grad_values


def _causal(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Causal attention with scores ``query @ key``: the output and its rows' log-sum-exp.

    Args:
        query, key, value: [rollouts, heads, size, d].
    """
    aten = torch.ops.aten
    if query.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, True, scale=1.0
        )
        return out, lse
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(
        query, key, value, None, True, 0.0, True, scale=1.0
    )
    return out, lse[..., : query.shape[2]]  # the kernel pads its rows


def _causal_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    group: _Group,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`_causal`, whose weights are ``exp(scores - lse)``.

    Batched products and few passes over the scores are several times faster on a CPU than the
    flash kernel's own backward.

    Args:
        query, key, value, grad: [rollouts, heads, size, d].
        lse, delta: [rollouts, heads, size, 1], wide.
    """
    q, k, v, g, lse, delta = (t.flatten(0, 1) for t in (query, key, value, grad, lse, delta))
    # The products subtract: no pass of its own, and in bfloat16 only small differences are rounded.
    scores_of, slopes_of = _with_term(q, -lse), _with_term(g, -delta)
    terms = scores_of.shape[-1] - q.shape[-1]
    keys, values = (F.pad(t, (0, terms), value=1.0) for t in (k, v))
    grad_q = torch.empty_like(q)
    for start, stop in group.blocks():
        block = slice(start, stop)
        # Keys in rows, [rollouts * heads, stop, block]: two of three products need no transpose.
        weights = torch.bmm(keys[:, :stop], scores_of[:, block].mT).exp_()
        # Slots after the round's own: weights of zero, whatever their score was.
        weights[:, start:].triu_()
        slopes = torch.bmm(values[:, :stop], slopes_of[:, block].mT).mul_(weights)
        grad_q[:, block] = torch.bmm(slopes.mT, k[:, :stop])
        of_keys, of_values = torch.bmm(slopes, q[:, block]), torch.bmm(weights, g[:, block])
        if stop == group.size:
            sums = lse.dtype if start > 0 else q.dtype
            grad_k, grad_v = of_keys.to(sums), of_values.to(sums)
        else:
            grad_k[:, :stop] += of_keys
            grad_v[:, :stop] += of_values
    return tuple(t.view_as(query) for t in (grad_q, grad_k, grad_v))  # type: ignore[return-value]


def _with_term(x: Tensor, term: Tensor) -> Tensor:
    """`x`, [.., d], with columns that add up to `term`, [.., 1], as exactly as its dtype allows."""
    high = term.to(x.dtype)
    if high.dtype == term.dtype:
        return torch.cat([x, high], -1)
    return torch.cat([x, high, (term - high).to(x.dtype)], -1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """[N, heads, d] times [N, heads, d] to [N, heads, 1], added up wide."""
    return (a * b).sum(-1, keepdim=True, dtype=_wide(a))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
