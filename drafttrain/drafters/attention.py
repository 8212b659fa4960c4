"""Attention of a draft round: over the policy's features, and over what the round drafted itself.

Decoder layers of transformers come here through its attention interface, so that a head made of any
family's own layer drafts as the engine does: see :func:`use_rounds`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig

# Queries attended at once; bounds the [heads, block, T] scores that backward keeps.
QUERY_BLOCK = 1024

_NAME = "drafttrain_rounds"


@dataclass
class Rounds:
    """Keys and values of one layer, of every draft depth so far.

    Attributes:
        key_mask: bool [B, S], False where the policy's features are missing.
    """

    key_mask: Tensor
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


def use_rounds(config: PretrainedConfig) -> None:
    """Make layers built from `config` attend over the :class:`Rounds` they are called with.

    A layer then takes ``rounds=`` among its keyword arguments and appends to it.
    """
    AttentionInterface.register(_NAME, _attend_rounds)
    config._attn_implementation = _NAME


def _attend_rounds(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    rounds: Rounds,
    **_: Any,
) -> tuple[Tensor, None]:
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    rounds.keys.append(key)
    rounds.values.append(value)
    out = causal_plus_diagonal(query, rounds.keys, rounds.values, rounds.key_mask, scaling)
    return out.transpose(1, 2), None


def causal_plus_diagonal(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    key_mask: Tensor,
    scaling: float | None = None,
) -> Tensor:
    """Attention of draft depth ``len(keys) - 1``: causal over depth 0, diagonal over the rest.

    The round that starts at slot ``s`` sees the policy's features up to ``s`` (depth 0) and what
    it drafted itself, which is stored under the same index ``s`` at every later depth. So each
    further depth adds one column to the scores, not another [S, S] block.

    Args:
        query: [B, heads, S, d].
        keys: one [B, heads, S, d] for each depth so far.
        values: as keys; their last size may be another.
        key_mask: bool [B, S], False where depth 0 has no features.
        scaling: of the scores; 1 / sqrt(d) when absent.

    Returns:
        [B, heads, S, size of a value].
    """
    slots = query.shape[2]
    scaling = 1.0 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    query = query * scaling
    blocks = []
    for start in range(0, slots, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, slots)
        blocks.append(_attend_block(query, keys, values, key_mask, start, stop))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def _attend_block(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    key_mask: Tensor,
    start: int,
    stop: int,
) -> Tensor:
    q = query[:, :, start:stop]
    scores = q @ keys[0][:, :, :stop].transpose(-1, -2)
    row = torch.arange(start, stop, device=q.device)[:, None]
    column = torch.arange(stop, device=q.device)[None, :]
    # A slot always sees itself: a row without any key would be NaN.
    visible = (column < row) & key_mask[:, None, :stop] | (column == row)
    scores = scores.masked_fill(~visible[:, None], float("-inf"))
    own = [(q * key[:, :, start:stop]).sum(-1, keepdim=True) for key in keys[1:]]
    weights = torch.cat([scores, *own], dim=-1).softmax(-1)
    out = weights[..., :stop] @ values[0][:, :, :stop]
    for depth, value in enumerate(values[1:]):
        out = out + weights[..., stop + depth, None] * value[:, :, start:stop]
    return out
