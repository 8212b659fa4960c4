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
from torch import Tensor

from drafttrain.drafters.batch import Batch

# Scores that exist at once, [rollouts, heads, rounds, slots]: about what a core's cache holds.
_SCORES_AT_ONCE = 1 << 20
# Share of a group's scores that may be padding.
_PADDING = 0.25


@dataclass(frozen=True)
class _Packed:
    """Where the rows of some rollouts lie in a padded [rollouts, size] block.

    Attributes:
        rows: their rows in the packed tensor.
        rollouts: how many they are.
        size: rows of the longest.
        places: int64 [n], place of each row in the padded block; None when nothing is padded.
    """

    rows: slice
    rollouts: int
    size: int
    places: Tensor | None

    @classmethod
    def of(cls, first_row: int, lengths: Tensor) -> _Packed:
        size, total = int(lengths.max()), int(lengths.sum())
        rows = slice(first_row, first_row + total)
        if total == size * len(lengths):
            return cls(rows, len(lengths), size, None)
        row = torch.arange(total, device=lengths.device)
        before = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        start = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths) * size
        return cls(rows, len(lengths), size, start + row - before)

    def pad(self, packed: Tensor) -> Tensor:
        """[N, heads, d] to [rollouts, heads, size, d]; padding is zero."""
        taken = packed[self.rows]
        if self.places is not None:
            rows = taken
            taken = rows.new_zeros(self.rollouts * self.size, *rows.shape[1:])
            taken[self.places] = rows
        block = taken.view(self.rollouts, self.size, *taken.shape[1:])
        return block.transpose(1, 2).contiguous()

    def unpad(self, padded: Tensor, packed: Tensor) -> None:
        """Write [rollouts, heads, size, d] back to its rows of [N, heads, d]."""
        rows = padded.transpose(1, 2).flatten(0, 1)
        packed[self.rows] = rows if self.places is None else rows[self.places]


@dataclass(frozen=True)
class _Group:
    """Rollouts attended to together.

    Attributes:
        slots, rounds: their context and their queries.
        first: int64 [rollouts], the slot of the first round within its rollout's context.
        nearest, furthest: the smallest and the largest of ``first``.
    """

    slots: _Packed
    rounds: _Packed
    first: Tensor
    nearest: int
    furthest: int

    def blocks(self, heads: int) -> Iterator[tuple[int, int, int]]:
        """Queries [start, stop) at a time, and how many slots they see at most."""
        size = max(1, _SCORES_AT_ONCE // (len(self.first) * heads * self.slots.size))
        for start in range(0, self.rounds.size, size):
            stop = min(start + size, self.rounds.size)
            yield start, stop, min(self.furthest + stop, self.slots.size)

    def hide_future(self, scores: Tensor, start: int, value: float) -> None:
        """Overwrite, in [rollouts, heads, rounds, slots], the slots a round does not see."""
        seen_by_all = self.nearest + start + 1
        device = scores.device
        slot = torch.arange(seen_by_all, scores.shape[-1], device=device)
        query = torch.arange(start, start + scores.shape[2], device=device)
        hidden = slot > (self.first[:, None, None] + query[:, None])
        scores[..., seen_by_all:].masked_fill_(hidden[:, None], value)


class AttentionPlan:
    """How the rollouts of a batch are grouped for attention; made once, used at every depth."""

    def __init__(self, batch: Batch) -> None:
        rollouts = len(batch.lengths)
        rollout_of = batch.rollout_of[batch.slots]
        self._slots = torch.bincount(rollout_of, minlength=rollouts).cpu()
        self._rounds = torch.bincount(rollout_of[batch.starts_round], minlength=rollouts).cpu()
        self.groups = list(self._group(batch.tokens.device))

    def _group(self, device: torch.device) -> Iterator[_Group]:
        """Neighbours of similar length, as many as keep the scores small and the padding low."""
        slots, rounds = self._slots.tolist(), self._rounds.tolist()
        start, slot, row = 0, 0, 0
        while start < len(slots):
            stop = start + 1
            while stop < len(slots) and _fits(slots[start : stop + 1], rounds[start : stop + 1]):
                stop += 1
            if sum(rounds[start:stop]):
                context = self._slots[start:stop].to(device)
                queries = self._rounds[start:stop].to(device)
                first = context - queries
                yield _Group(
                    _Packed.of(slot, context),
                    _Packed.of(row, queries),
                    first,
                    int(first.min()),
                    int(first.max()),
                )
            slot += sum(slots[start:stop])
            row += sum(rounds[start:stop])
            start = stop


def _fits(slots: list[int], rounds: list[int]) -> bool:
    padded = len(slots) * max(slots) * max(rounds)
    used = sum(s * r for s, r in zip(slots, rounds, strict=True))
    return padded <= _SCORES_AT_ONCE // 8 and padded * (1 - _PADDING) <= used


def attend(query: Tensor, keys: list[Tensor], values: list[Tensor], plan: AttentionPlan) -> Tensor:
    """Attention of draft depth ``len(keys) - 1`` from every round of a batch.

    Args:
        query: [R, heads, d], one for each round.
        keys, values: depth 0's [S, heads, d] for every slot, then [R, heads, d] for each depth.
        plan: of the same batch.

    Returns:
        [R, heads, d].
    """
    attended: Tensor = _Attend.apply(plan, query, *keys, *values)
    return attended


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: AttentionPlan, query: Tensor, *keys_values: Tensor) -> Tensor:
        depths = len(keys_values) // 2
        keys, values = keys_values[:depths], keys_values[depths:]
        scaled = query * (1.0 / math.sqrt(query.shape[-1]))
        out = torch.empty_like(query)
        context_lse = query.new_empty(*query.shape[:2], 1, dtype=_wide(query))
        for group in plan.groups:
            _attend_context(scaled, keys[0], values[0], group, out, context_lse)
        lse = context_lse
        own = [(scaled * key).sum(-1, keepdim=True, dtype=lse.dtype) for key in keys[1:]]
        if own:
            lse = torch.cat([context_lse, *own], -1).logsumexp(-1, keepdim=True)
            out *= (context_lse - lse).exp().to(out.dtype)
            for score, value in zip(own, values[1:], strict=True):
                out.addcmul_((score - lse).exp().to(out.dtype), value)
        ctx.plan = plan
        ctx.save_for_backward(scaled, out, lse, *keys_values)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled, out, lse, *keys_values = ctx.saved_tensors
        depths = len(keys_values) // 2
        keys, values = keys_values[:depths], keys_values[depths:]
        grad = grads[0].contiguous()
        delta = (grad * out).sum(-1, keepdim=True, dtype=lse.dtype)
        grad_query = torch.empty_like(scaled)
        grad_keys, grad_values = [torch.zeros_like(keys[0])], [torch.zeros_like(values[0])]
        for group in ctx.plan.groups:
            _attend_context_backward(
                (scaled, keys[0], values[0], grad, lse, delta),
                group,
                (grad_query, grad_keys[0], grad_values[0]),
            )
        for key, value in zip(keys[1:], values[1:], strict=True):
            score = (scaled * key).sum(-1, keepdim=True, dtype=lse.dtype)
            weight = (score - lse).exp()
            slope = (grad * value).sum(-1, keepdim=True, dtype=lse.dtype)
            grad_score = (weight * (slope - delta)).to(grad.dtype)
            grad_values.append(weight.to(grad.dtype) * grad)
            grad_keys.append(grad_score * scaled)
            grad_query.addcmul_(grad_score, key)
        grad_query *= 1.0 / math.sqrt(scaled.shape[-1])
        return None, grad_query, *grad_keys, *grad_values


def _attend_context(
    query: Tensor, key: Tensor, value: Tensor, group: _Group, out: Tensor, lse: Tensor
) -> None:
    """One group's causal part: its rows of `out` and `lse`."""
    q, k, v = group.rounds.pad(query), group.slots.pad(key), group.slots.pad(value)
    padded_out, padded_lse = torch.empty_like(q), lse.new_empty(*q.shape[:3], 1)
    for start, stop, seen in group.blocks(q.shape[1]):
        scores = q[:, :, start:stop] @ k[:, :, :seen].transpose(-1, -2)
        group.hide_future(scores, start, float("-inf"))
        weights = scores.softmax(-1)
        padded_lse[:, :, start:stop] = scores.amax(-1, keepdim=True)
        padded_lse[:, :, start:stop] -= weights.amax(-1, keepdim=True).to(lse.dtype).log()
        padded_out[:, :, start:stop] = weights @ v[:, :, :seen]
    group.rounds.unpad(padded_out, out)
    group.rounds.unpad(padded_lse, lse)


def _attend_context_backward(
    saved: tuple[Tensor, ...], group: _Group, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    """One group's rows of the gradients of the (scaled) query, key and value."""
    query, key, value, grad, lse, delta = saved
    rounds, slots = group.rounds, group.slots
    q, g, lse, delta = rounds.pad(query), rounds.pad(grad), rounds.pad(lse), rounds.pad(delta)
    k, v = slots.pad(key), slots.pad(value)
    grad_q = torch.empty_like(q)
    grad_k, grad_v = torch.zeros_like(k, dtype=_wide(k)), torch.zeros_like(v, dtype=_wide(v))
    for start, stop, seen in group.blocks(q.shape[1]):
        block = slice(start, stop)
        weights = q[:, :, block] @ k[:, :, :seen].transpose(-1, -2)
        weights = weights.sub_(lse[:, :, block]).exp_()
        group.hide_future(weights, start, 0.0)
        grad_scores = g[:, :, block] @ v[:, :, :seen].transpose(-1, -2)
        grad_scores = grad_scores.sub_(delta[:, :, block]).mul_(weights)
        grad_v[:, :, :seen] += weights.transpose(-1, -2) @ g[:, :, block]
        grad_k[:, :, :seen] += grad_scores.transpose(-1, -2) @ q[:, :, block]
        grad_q[:, :, block] = grad_scores @ k[:, :, :seen]
    rounds.unpad(grad_q, grads[0])
    slots.unpad(grad_k, grads[1])
    slots.unpad(grad_v, grads[2])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
