"""A batch: rollouts laid end to end; nothing crosses a rollout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout, sampled_runs

ROW_MULTIPLE = 64
"""Rows that go through a drafter are padded to a multiple of this. A CPU's matrix products are
compiled for every new shape, which takes as long as a small one runs; this keeps shapes few."""


@dataclass(frozen=True)
class Batch:
    """T tokens of B rollouts, end to end; A aux layers, H policy hidden size.

    Attributes:
        tokens: int64 [T].
        offsets: int64 [B+1]; rollout b is ``tokens[offsets[b] : offsets[b + 1]]``.
        captured: bool [T]; False where the policy's features are missing.
        last_hidden: [T, H] as captured, ready for the policy's ``lm_head``.
        aux_hidden: [T, A, H] as captured, or None for drafters that need none.
        prompt_lengths: int64 [B].
        temperatures: float [B], of the rollout's sampling.
        raw_hidden: [T, H], the last state before the policy's final norm, where the engine hands it
            over so; None where ``last_hidden`` is what it hands over.
        generated: bool [T], or None when all completions were sampled as a whole.
        rejected: bool [T], where the engine rejected a draft; None when no rollout tells.
    """

    tokens: Tensor
    offsets: Tensor
    captured: Tensor
    last_hidden: Tensor
    aux_hidden: Tensor | None
    prompt_lengths: Tensor
    temperatures: Tensor
    raw_hidden: Tensor | None = None
    generated: Tensor | None = None
    rejected: Tensor | None = None

    @property
    def engine_hidden(self) -> Tensor:
        """The last state as the engine hands it to a drafter: [T, H]."""
        return self.last_hidden if self.raw_hidden is None else self.raw_hidden

    @cached_property
    def lengths(self) -> Tensor:
        """int64 [B], prompt and completion."""
        return self.offsets.diff()

    @cached_property
    def rollout_of(self) -> Tensor:
        """int64 [T], which rollout a token belongs to."""
        rollouts = torch.arange(len(self.lengths), device=self.tokens.device)
        return rollouts.repeat_interleave(self.lengths, output_size=len(self.tokens))

    @cached_property
    def positions(self) -> Tensor:
        """int64 [T], a token's place in its rollout."""
        everywhere = torch.arange(len(self.tokens), device=self.tokens.device)
        return everywhere - self.offsets[self.rollout_of]

    @cached_property
    def runs(self) -> Tensor:
        """:func:`sampled_runs` of every rollout: int64 [T]."""
        if self.generated is not None:
            return sampled_runs(self.generated)
        return (self.positions - self.prompt_lengths[self.rollout_of] + 1).clamp_min(0)

    @cached_property
    def slots(self) -> Tensor:
        """int64 [S]: where a drafter's context comes from, as indices into ``tokens``.

        A slot has the policy's features, a next token to embed and one more to draft.
        """
        inside = self.positions + 2 < self.lengths[self.rollout_of]
        return (self.captured & inside).nonzero()[:, 0]

    @cached_property
    def starts_round(self) -> Tensor:
        """bool [S]: slots where a round may start: both tokens after it were sampled, in a row."""
        return self.runs[self.slots + 2] > 1

    @cached_property
    def rounds(self) -> Tensor:
        """int64 [R]: the slots where a round may start, as indices into ``tokens``."""
        return self.slots[self.starts_round]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name in self.__dataclass_fields__
            if isinstance(value := getattr(self, name), Tensor)
        }
        return replace(self, **moved)


def pad_rows(rows: Tensor, fill: int | None = None) -> Tensor:
    """Lengthen indices [N], by one at least, to a multiple of :data:`ROW_MULTIPLE`.

    Args:
        fill: what with; when absent, their first.
    """
    missing = ROW_MULTIPLE - len(rows) % ROW_MULTIPLE
    if fill is None and len(rows):
        return torch.cat([rows, rows[:1].expand(missing)])
    return torch.cat([rows, rows.new_full((missing,), fill or 0)])


def make_batch(
    rollouts: Sequence[Rollout],
    layout: FeatureLayout,
    head: PolicyHead,
    device: torch.device | None = None,
) -> Batch:
    """Lay `rollouts` end to end, on `device` (a CPU, when absent) wherever their features are.

    Args:
        rollouts: at least one; attention is cheapest when similar lengths stand together.
        layout: how their features were captured.
        head: the policy's head; its final norm is applied here when the engine had not.
    """
    device = device or torch.device("cpu")
    hidden = torch.cat([rollout.last_hidden.to(device) for rollout in rollouts])
    normed = layout.last_hidden_normed
    aux = [rollout.aux_hidden.to(device) for rollout in rollouts if rollout.aux_hidden is not None]
    lengths = torch.tensor([0] + [rollout.length for rollout in rollouts])
    return Batch(
        tokens=torch.cat([rollout.tokens for rollout in rollouts]).long(),
        offsets=lengths.cumsum(0),
        captured=torch.cat([rollout.captured for rollout in rollouts]),
        last_hidden=hidden if normed else _rms_norm(hidden, head),
        aux_hidden=torch.cat(aux) if len(aux) == len(rollouts) else None,
        prompt_lengths=torch.tensor([rollout.prompt_length for rollout in rollouts]),
        temperatures=torch.tensor([rollout.temperature or 1.0 for rollout in rollouts]),
        raw_hidden=None if normed else hidden,
        generated=_generated(rollouts),
        rejected=_rejected(rollouts),
    ).to(device)


def split_by_tokens(rollouts: Sequence[Rollout], tokens: int) -> Iterator[list[Rollout]]:
    """Split `rollouts`, sorted by length, into lists of at most `tokens` tokens.

    A rollout longer than `tokens` makes a list of its own.
    """
    part: list[Rollout] = []
    for rollout in sorted(rollouts, key=lambda r: r.length):
        if part and sum(r.length for r in part) + rollout.length > tokens:
            yield part
            part = []
        part.append(rollout)
    if part:
        yield part


def _generated(rollouts: Sequence[Rollout]) -> Tensor | None:
    if all(rollout.generated is None for rollout in rollouts):
        return None
    return torch.cat([rollout.sampled_runs > 0 for rollout in rollouts])


def _rejected(rollouts: Sequence[Rollout]) -> Tensor | None:
    if all(rollout.rejected is None for rollout in rollouts):
        return None
    return torch.cat(
        [
            torch.zeros_like(rollout.captured) if rollout.rejected is None else rollout.rejected
            for rollout in rollouts
        ]
    )


def _rms_norm(hidden: Tensor, head: PolicyHead) -> Tensor:
    if head.final_norm is None:
        raise ValueError("hidden states before the final norm need the policy's final norm")
    wide = hidden.float()
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + head.norm_eps)
    return (wide * scale * head.final_norm.to(wide)).to(hidden.dtype)
