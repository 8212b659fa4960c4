"""Objectives, chunked over positions, with exact gradients.

For one draft position with policy distribution p and draft distribution q over V tokens:

==================  ======================  ====================================================
objective           value                   fits
==================  ======================  ====================================================
soft_cross_entropy  -sum(p log q)           greedy drafts, and every cold start
tv                  1 - sum(min(p, q))      probabilistic drafts: one minus the acceptance rate
lk                  -log sum(min(p, q))     the same rate's log-likelihood: its gradient does
                                            not vanish where the drafter is far off
==================  ======================  ====================================================

A draft is accepted with probability sum(min(p, q)) under probabilistic drafting (Leviathan et al.,
arXiv 2211.17192), with p(argmax q) under greedy drafting.

No [positions, V] tensor outlives a chunk: each chunk's gradient is taken inside the forward pass.
The policy's log-probabilities of a row are computed once for all draft depths that predict it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from drafttrain.drafters.batch import Batch

Objective = Literal["soft_cross_entropy", "tv", "lk"]


def _soft_cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    return -(log_p.exp() * log_q).sum(-1)


def _tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 1.0 - torch.minimum(log_p.exp(), log_q.exp()).sum(-1)


def _lk(log_p: Tensor, log_q: Tensor) -> Tensor:
    # In log space: finite, with a useful gradient, where p and q share no mass in float32.
    return -torch.minimum(log_p, log_q).logsumexp(-1)


OBJECTIVES: dict[Objective, Callable[[Tensor, Tensor], Tensor]] = {
    "soft_cross_entropy": _soft_cross_entropy,
    "tv": _tv,
    "lk": _lk,
}


@dataclass(frozen=True)
class DraftRows:
    """Which policy rows a batch trains on, and from which slot each depth drafted them.

    Row ``r`` of rollout ``b`` is drafted at depth ``j`` by the round at slot ``r - 1 - j``. The
    engine's first round starts after the first sampled token, so rows begin there, and a round
    lies within one run of sampled tokens.

    Attributes:
        rollout, row: int64 [N].
        depths_valid: bool [D, N].
    """

    rollout: Tensor
    row: Tensor
    depths_valid: Tensor

    @classmethod
    def of(cls, batch: Batch, depths: int) -> DraftRows:
        """All rows of `batch` that were captured and can be drafted."""
        runs = batch.runs
        usable = batch.captured & (runs > 0) & (F.pad(runs[:, 1:], (0, 1)) > 0)
        rollout, row = usable.nonzero(as_tuple=True)
        depth = torch.arange(depths, device=row.device)[:, None]
        return cls(rollout, row, runs[rollout, row] > depth)

    def gather(self, hidden: Tensor, start: int, stop: int) -> Tensor:
        """Drafting hidden states of rows [start, stop): [D, n, H]; zeros where no round drafted."""
        depth = torch.arange(hidden.shape[0], device=hidden.device)[:, None]
        slot = (self.row[start:stop] - 1 - depth).clamp_min(0)
        return hidden[depth, self.rollout[start:stop], slot]


@dataclass(frozen=True)
class DraftLoss:
    """A step's loss and what a person wants to see of it.

    Attributes:
        loss: scalar, with gradients to the drafter.
        acceptance: float [D], mean sum(min(p, q)) at each depth.
        rows: number of policy rows trained on.
    """

    loss: Tensor
    acceptance: Tensor
    rows: int


def draft_loss(
    hidden: Tensor,
    draft_head: Tensor,
    batch: Batch,
    policy_head: Tensor,
    *,
    objective: Objective = "lk",
    depth_decay: float = 1.0,
    chunk: int = 2048,
) -> DraftLoss:
    """Mean objective over all drafted rows and depths.

    Args:
        hidden: [D, B, T-1, H_drafter] from :meth:`Drafter.unroll`.
        draft_head: [V, H_drafter], gets a gradient.
        batch: with ``last_hidden`` after the policy's final norm.
        policy_head: [V, H], frozen.
        depth_decay: weight of depth j is ``depth_decay ** j``.
        chunk: policy rows whose [V] distributions exist at once.
    """
    rows = DraftRows.of(batch, hidden.shape[0])
    weights = depth_decay ** torch.arange(hidden.shape[0], dtype=torch.float32)
    loss, overlap = _ChunkedLoss.apply(
        hidden, draft_head, batch, policy_head, rows, OBJECTIVES[objective], weights, chunk
    )
    counts = rows.depths_valid.sum(1).clamp_min(1)
    return DraftLoss(loss, overlap / counts, len(rows.row))


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
        objective: Callable[[Tensor, Tensor], Tensor],
        depth_weights: Tensor,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        grad_hidden = torch.zeros_like(hidden)
        grad_head = torch.zeros_like(draft_head)
        weights = rows.depths_valid * depth_weights.to(hidden)[:, None]
        weights = weights / weights.sum().clamp_min(1.0)
        total = hidden.new_zeros(())
        overlap = hidden.new_zeros(hidden.shape[0])
        for start in range(0, len(rows.row), chunk):
            stop = min(start + chunk, len(rows.row))
            log_p = _policy_log_probs(batch, policy_head, rows, start, stop)
            temperature = batch.temperatures[rows.rollout[start:stop], None]
            valid = rows.depths_valid[:, start:stop]
            with torch.enable_grad():
                gathered = rows.gather(hidden, start, stop).detach().requires_grad_()
                weight = draft_head.detach().requires_grad_()
                log_q = F.log_softmax(gathered @ weight.T / temperature, dim=-1)
                value = (objective(log_p, log_q) * weights[:, start:stop]).sum()
                chunk_hidden, chunk_head = torch.autograd.grad(value, (gathered, weight))
            _scatter(grad_hidden, rows, chunk_hidden, start, stop)
            grad_head += chunk_head
            total += value.detach()
            shared = torch.minimum(log_p.exp(), log_q.detach().exp()).sum(-1)
            overlap += (shared * valid).sum(1)
        ctx.save_for_backward(grad_hidden, grad_head)
        ctx.mark_non_differentiable(overlap)
        return total, overlap

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_head = ctx.saved_tensors
        scale = grads[0]
        return grad_hidden * scale, grad_head * scale, *[None] * 6


def _policy_log_probs(
    batch: Batch, policy_head: Tensor, rows: DraftRows, start: int, stop: int
) -> Tensor:
    rollout, row = rows.rollout[start:stop], rows.row[start:stop]
    logits = batch.last_hidden[rollout, row] @ policy_head.T
    return F.log_softmax(logits / batch.temperatures[rollout, None], dim=-1)


def _scatter(grad: Tensor, rows: DraftRows, chunk: Tensor, start: int, stop: int) -> None:
    """Add a chunk's gradient where :meth:`DraftRows.gather` took its hidden states from."""
    depth = torch.arange(grad.shape[0], device=grad.device)[:, None].expand(chunk.shape[:2])
    rollout = rows.rollout[start:stop].expand(chunk.shape[:2])
    slot = (rows.row[start:stop] - 1 - depth).clamp_min(0)
    # Rows no round drafted have weight zero, hence gradient zero: clamping them is harmless.
    grad.index_put_((depth, rollout, slot), chunk, accumulate=True)
