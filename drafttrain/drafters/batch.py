"""A batch: rollouts of similar length, padded to one; nothing crosses a rollout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout, sampled_runs


@dataclass(frozen=True)
class Batch:
    """Rollouts padded to one length: B rollouts, T tokens, A aux layers, H policy hidden size.

    Attributes:
        tokens: int64 [B, T], 0 where padded.
        captured: bool [B, T]; False where the policy's features are missing or padded.
        last_hidden: float [B, T, H].
        aux_hidden: float [B, T, A, H], or None for drafters that need none.
        prompt_lengths: int64 [B].
        lengths: int64 [B], prompt and completion.
        temperatures: float [B], of the rollout's sampling.
        generated: bool [B, T], or None when all completions were sampled as a whole.
    """

    tokens: Tensor
    captured: Tensor
    last_hidden: Tensor
    aux_hidden: Tensor | None
    prompt_lengths: Tensor
    lengths: Tensor
    temperatures: Tensor
    generated: Tensor | None = None

    @property
    def runs(self) -> Tensor:
        """:func:`sampled_runs` of every rollout, 0 where padded: int64 [B, T]."""
        if self.generated is not None:
            return sampled_runs(self.generated)
        position = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        runs = (position - self.prompt_lengths[:, None] + 1).clamp_min(0)
        return runs * (position < self.lengths[:, None])

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


def make_batch(rollouts: Sequence[Rollout], layout: FeatureLayout, head: PolicyHead) -> Batch:
    """Pad `rollouts` to the longest of them.

    Args:
        rollouts: at least one.
        layout: how their features were captured.
        head: the policy's head; its final norm is applied here when the engine had not.

    Returns:
        A batch whose ``last_hidden`` is ready for the policy's ``lm_head``, float32.
    """
    last_hidden = _pad([rollout.last_hidden for rollout in rollouts]).float()
    if not layout.last_hidden_normed:
        last_hidden = _rms_norm(last_hidden, head)
    has_aux = all(rollout.aux_hidden is not None for rollout in rollouts)
    aux = [rollout.aux_hidden for rollout in rollouts if rollout.aux_hidden is not None]
    return Batch(
        tokens=_pad([rollout.tokens.long() for rollout in rollouts]),
        captured=_pad([rollout.captured for rollout in rollouts]),
        last_hidden=last_hidden,
        aux_hidden=_pad(aux).float() if has_aux else None,
        prompt_lengths=torch.tensor([rollout.prompt_length for rollout in rollouts]),
        lengths=torch.tensor([rollout.length for rollout in rollouts]),
        temperatures=torch.tensor([rollout.temperature or 1.0 for rollout in rollouts]),
        generated=_generated(rollouts),
    )


def length_buckets(rollouts: Sequence[Rollout], tokens: int) -> Iterator[list[Rollout]]:
    """Split `rollouts` into groups of similar length, each at most `tokens` when padded.

    A rollout longer than `tokens` makes a group of its own.
    """
    bucket: list[Rollout] = []
    for rollout in sorted(rollouts, key=lambda r: r.length):
        if bucket and (len(bucket) + 1) * rollout.length > tokens:
            yield bucket
            bucket = []
        bucket.append(rollout)
    if bucket:
        yield bucket


def _generated(rollouts: Sequence[Rollout]) -> Tensor | None:
    if all(rollout.generated is None for rollout in rollouts):
        return None
    return _pad([rollout.sampled_runs > 0 for rollout in rollouts])


def _pad(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True)


def _rms_norm(hidden: Tensor, head: PolicyHead) -> Tensor:
    if head.final_norm is None:
        raise ValueError("hidden states before the final norm need the policy's final norm")
    variance = hidden.pow(2).mean(-1, keepdim=True)
    return hidden * torch.rsqrt(variance + head.norm_eps) * head.final_norm.float()
