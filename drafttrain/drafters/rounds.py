"""Draft rounds through a decoder layer of transformers, by way of its attention interface.

So a head made of any family's own layer (grouped, gated or latent attention) drafts as the engine
does, with the attention of :mod:`drafttrain.drafters.attention`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

from drafttrain.drafters.attention import KeysValues, attend
from drafttrain.drafters.attention_plan import AttentionPlan
from drafttrain.drafters.batch import Batch

_NAME = "drafttrain_rounds"


@dataclass
class RoundsAttention:
    """Attention of one layer, depth after depth.

    Attributes:
        plan: of the batch.
        starts: int64 [R], which of the slots start a round.
        kept: keys and values so far.
    """

    plan: AttentionPlan
    starts: Tensor
    kept: KeysValues = field(default_factory=KeysValues)

    @classmethod
    def of(cls, batch: Batch, dtype: torch.dtype) -> RoundsAttention:
        return cls(AttentionPlan(batch, dtype), batch.starts_round.nonzero()[:, 0])

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """All [N, heads, d]; of a value the last size may be smaller than d, but not larger.

        At depth 0, N is the slots, and what starts no round gets zero: nothing reads it.
        """
        self.kept.add(key, F.pad(value, (0, key.shape[-1] - value.shape[-1])), self.plan)
        if self.kept.depths > 1:
            out = attend(query, self.kept, self.plan)
        else:
            attended = attend(query[self.starts], self.kept, self.plan)
            out = query.new_zeros(query.shape).index_copy(0, self.starts, attended)
        return out[..., : value.shape[-1]]


def use_rounds(config: PretrainedConfig) -> None:
    """Make layers built from `config` attend through the ``rounds`` they are called with."""
    AttentionInterface.register(_NAME, _attend)
    config._attn_implementation = _NAME


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    rounds: RoundsAttention,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: [1, heads, N, d] in, [1, N, heads, d] out."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    # `attend` scales by 1 / sqrt(d) itself.
    query = query * (scaling * math.sqrt(query.shape[-1]))
    out = rounds(*(t[0].transpose(0, 1) for t in (query, key, value)))
    return out[None], None
