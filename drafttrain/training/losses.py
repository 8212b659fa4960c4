"""The loss of a batch: an objective over all drafted positions, chunked, with exact gradients.

No [positions, V] tensor outlives a chunk: each chunk's gradient is taken inside the forward pass,
in closed form, a few rows at a time so that they stay in the processor's cache. The policy's
probabilities of a row are computed once for all draft depths that predict it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from drafttrain.config import ObjectiveName
from drafttrain.drafters.batch import Batch, pad_rows
from drafttrain.drafters.kernels import compute_dtype
from drafttrain.training.fused import Softmax, Values, values_of

# Draft logits that exist at once: fewer chunks mean fewer sums of the head's gradient.
LOGITS_AT_ONCE = 1 << 26
# Those worked on at once, in several float32 tensors of that size: on a CPU they fit its cache.
_BLOCK_ELEMENTS, _BLOCK_ELEMENTS_CPU = 1 << 24, 1 << 20


@dataclass(frozen=True)
class DraftRows:
    """Which policy rows a batch trains on, and which round drafted them at each depth.

    Row ``r`` is drafted at depth ``j`` by the round at slot ``r - 1 - j`` of the same rollout. The
    engine's first round starts after the first sampled token, so rows begin there, and a round
    lies within one run of sampled tokens.

    Attributes:
        row: int64 [N], indices into the batch's tokens.
        drafted_by: int64 [D, N], index of the round; 0 where no round drafted.
        drafted: bool [D, N].
        count: of the rows; those behind, one at least, are padding (:func:`pad_rows`), drafted by
            no round.
    """

    row: Tensor
    drafted_by: Tensor
    drafted: Tensor
    count: int

    @classmethod
    def of(cls, batch: Batch, depths: int) -> DraftRows:
        """All rows of `batch` that were captured and can be drafted."""
        round_at = torch.full_like(batch.tokens, -1)
        round_at[batch.rounds] = torch.arange(len(batch.rounds), device=round_at.device)
        next_sampled = torch.cat([batch.runs[1:], batch.runs.new_zeros(1)]) > 0
        row = (batch.captured & (batch.runs > 0) & next_sampled).nonzero()[:, 0]
        count, row = len(row), pad_rows(row)
        depth = torch.arange(depths, device=row.device)[:, None]
        drafted_by = round_at[(row - 1 - depth).clamp_min(0)]
        drafted = (drafted_by >= 0) & (batch.runs[row] > depth)
        drafted[:, count:] = False
        return cls(row, drafted_by.clamp_min(0), drafted, count)

    def of_round(self, hidden: Tensor, part: slice) -> Tensor:
        """[D, R, H] of rounds to [D, n, H] of the rows of `part` that they drafted."""
        depths, rounds, width = hidden.shape
        first = torch.arange(0, depths * rounds, rounds, device=hidden.device)
        rows = (self.drafted_by[:, part] + first[:, None]).flatten()
        return hidden.reshape(-1, width).index_select(0, rows).view(depths, -1, width)

    def by_round(self, per_row: Tensor, rounds: int) -> Tensor:
        """[D, N, H] of rows to [D, R, H] of the rounds that drafted them.

        A round that drafted none takes what the last row has, which is padding.
        """
        depths, rows, width = per_row.shape
        row_of = self.drafted_by.new_full((depths, rounds), rows - 1)
        depth, row = self.drafted.nonzero(as_tuple=True)
        row_of[depth, self.drafted_by[depth, row]] = row
        first = torch.arange(0, depths * rows, rows, device=row_of.device)
        row_of += first[:, None]
        return per_row.reshape(-1, width).index_select(0, row_of.flatten()).view(depths, -1, width)


@dataclass(frozen=True)
class DraftLoss:
    """A step's loss and what a person wants to see of it.

    Attributes:
        loss: scalar, with gradients to the drafter.
        weight: scalar, sum of the weights that the loss is the mean of.
        acceptance: float [D], mean sum(min(p, q)) at each depth.
        rows: number of policy rows trained on.
    """

    loss: Tensor
    weight: Tensor
    acceptance: Tensor
    rows: int


def draft_loss(
    hidden: Tensor,
    draft_head: Tensor,
    batch: Batch,
    policy_head: Tensor,
    *,
    objective: ObjectiveName,
    depth_decay: float = 1.0,
    draft_ids: Tensor | None = None,
    token_weights: Tensor | None = None,
    chunk: int | None = None,
) -> DraftLoss:
    """Mean objective over all drafted rows and depths.

    Args:
        hidden: [D, R, H_drafter] from :meth:`Drafter.unroll`; one round at least.
        draft_head: [V, H_drafter], or [Vd, H_drafter]; gets a gradient if it requires one.
        batch: with ``last_hidden`` after the policy's final norm.
        policy_head: [V, H], frozen.
        depth_decay: weight of depth j is ``depth_decay ** j``.
        draft_ids: int64 [Vd], target ids of the head's rows; None when they are all of V.
        token_weights: float [T], weight of each drafted token; 1 when absent.
        chunk: policy rows whose [D, V] draft logits exist at once; by size when absent.
    """
    rows = DraftRows.of(batch, len(hidden))
    depth = torch.arange(len(hidden), device=hidden.device, dtype=draft_head.dtype)
    weights = rows.drafted * (depth_decay**depth)[:, None]
    if token_weights is not None:
        weights = weights * token_weights[rows.row + 1]  # row r predicts token r + 1
    weight = weights.sum()
    weights = weights / weight.clamp_min(torch.finfo(weights.dtype).tiny)
    chunk = chunk or max(1, LOGITS_AT_ONCE // (len(hidden) * len(draft_head)))
    loss, overlap = _ChunkedLoss.apply(
        hidden,
        draft_head,
        batch,
        policy_head,
        rows,
        values_of(objective),
        weights,
        draft_ids,
        chunk,
    )
    counts = rows.drafted.sum(1).clamp_min(1)
    return DraftLoss(loss, weight, overlap / counts, rows.count)


class _ChunkedLoss(torch.autograd.Function):
    """Takes each chunk's gradient in forward, so that backward is one multiplication."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        draft_head: Tensor,
        batch: Batch,
        policy_head: Tensor,
        rows: DraftRows,
        objective: Values,
        weights: Tensor,
        draft_ids: Tensor | None,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        dtype, wide = compute_dtype(draft_head), draft_head.dtype
        head, teacher = draft_head.to(dtype), policy_head.to(dtype)
        grad_rows = hidden.new_empty(len(hidden), len(rows.row), hidden.shape[-1])
        grad_head: Tensor | None = None
        total = draft_head.new_zeros(())
        overlap = draft_head.new_zeros(len(hidden))
        # Both sides' logits are divided by the temperature: cheapest in what they come from.
        sharpness = _sharpness(batch, rows.row)
        for start in range(0, len(rows.row), chunk):
            part = slice(start, start + chunk)
            policy_states = batch.last_hidden[rows.row[part]]
            value, shared, of_rows, of_head = _chunk_gradients(
                _times(policy_states, sharpness, part).to(dtype),
                _times(rows.of_round(hidden, part), sharpness, part).to(dtype),
                teacher,
                head,
                weights[:, part],
                objective,
                draft_ids,
                of_head=draft_head.requires_grad,
            )
            total += value
            overlap += (shared * rows.drafted[:, part]).sum(1)
            grad_rows[:, part] = _times(of_rows, sharpness, part)
            if of_head is not None:
                grad_head = of_head.to(wide) if grad_head is None else grad_head.add_(of_head)
        ctx.save_for_backward(rows.by_round(grad_rows, hidden.shape[1]), grad_head)
        ctx.mark_non_differentiable(overlap)
        return total, overlap

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        # In place: they are large, and of no use to anyone else.
        for grad in (grad_hidden, grad_head):
            if grad is not None:
                grad.mul_(grads[0])
        return grad_hidden, grad_head, *[None] * 7


def _sharpness(batch: Batch, row: Tensor) -> Tensor | None:
    """1 / temperature of rows [n], [n, 1]; None when it is 1 everywhere, as in most jobs."""
    temperatures = batch.temperatures[batch.rollout_of[row], None]
    return None if bool((temperatures == 1).all()) else temperatures.reciprocal()


def _times(states: Tensor, factors: Tensor | None, part: slice) -> Tensor:
    """States [..., n, H] of the rows of `part`, times their factors out of [N, 1]."""
    return states if factors is None else states * factors[part]


def _chunk_gradients(
    policy_states: Tensor,
    drafting: Tensor,
    teacher: Tensor,
    head: Tensor,
    weights: Tensor,
    objective: Values,
    draft_ids: Tensor | None,
    *,
    of_head: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The loss of n rows and its gradients; the logits are gone when it returns.

    Args:
        policy_states: [n, H], over the rows' temperatures, as are the next.
        drafting: [D, n, H_drafter].
        teacher, head: [V, H], and [Vd, H_drafter].
        weights, objective, draft_ids: as for :func:`_slopes_in_place`.
        of_head: whether the head wants a gradient.

    Returns:
        loss; sum(min(p, q)), [D, n]; gradients of `drafting` and of `head`.
    """
    policy_logits, logits = policy_states @ teacher.T, drafting @ head.T
    value, shared = _slopes_in_place(policy_logits, logits, weights, objective, draft_ids)
    grad_head = logits.flatten(0, 1).T @ drafting.flatten(0, 1) if of_head else None
    return value, shared, logits @ head, grad_head


def _slopes_in_place(
    policy_logits: Tensor,
    logits: Tensor,
    weights: Tensor,
    objective: Values,
    draft_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Replace draft logits by the loss's gradient with respect to them.

    Args:
        policy_logits: [n, V].
        logits: [D, n, V], overwritten.
        weights: [D, n] of each row and depth in the loss.
        objective: see :data:`Values`.
        draft_ids: int64 [Vd]; then the draft logits are [D, n, Vd].

    Returns:
        the weighted sum of the objective; sum(min(p, q)) of each row and depth, [D, n].
    """
    wide = weights.dtype
    depths, rows, vocab = logits.shape
    at_once = _BLOCK_ELEMENTS_CPU if logits.is_cpu else _BLOCK_ELEMENTS
    block = max(1, at_once // (depths * vocab))
    total, overlaps = weights.new_zeros(()), []
    for start in range(0, rows, block):
        part = slice(start, start + block)
        p, q = Softmax.of(policy_logits[part], wide), Softmax.of(logits[:, part], wide)
        if draft_ids is not None:
            p = p.of_tokens(draft_ids)
        value, overlap, slope = objective(p, q)
        total += (value * weights[:, part]).sum()
        overlaps.append(overlap)
        logits[:, part] = slope.mul_(weights[:, part, None])
    return total, torch.cat(overlaps, 1)
