"""How much memory a run will take, told before it starts, and the largest microbatch that fits.

A sum of the tensors that exist at once; what a framework or an allocator adds is not in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from drafttrain.config import PretrainConfig
from drafttrain.drafters.attention_plan import square_at_once
from drafttrain.drafters.contract import Drafter
from drafttrain.drafters.policy import PolicyShape
from drafttrain.errors import ConfigError
from drafttrain.opening import readable
from drafttrain.rollouts.record import FeatureLayout
from drafttrain.rollouts.segment import DTYPES
from drafttrain.training.loader import AHEAD
from drafttrain.training.losses import LOGITS_AT_ONCE

_FLOAT = 4
# Weights, gradients, two Adam moments, moving average; all float32.
_TRAINER_COPIES = 5
# Float32 numbers that one depth of a drafter's layer keeps for backward, for each token: in units
# of the hidden size (norms, projections, residuals) and of the intermediate size (gated MLP).
_HIDDEN_KEPT, _INTERMEDIATE_KEPT = 18, 5
# Copies of the attention scores that exist at once.
_SCORES_ALIVE = 2
# Steps whose features exist at once: the one being trained on and those loaded ahead.
_STEPS_LOADED = 1 + AHEAD


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one process, by what they are for."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {readable(size)}" for name, size in self.parts.items())
        return f"{readable(self.total)} ({parts})"


def predict(
    drafter: Drafter,
    policy: PolicyShape,
    layout: FeatureLayout,
    config: PretrainConfig,
    *,
    tokens: int,
    longest: int,
    policy_bytes: int,
    dtype: torch.dtype = torch.float32,
    shards: int = 1,
) -> MemoryPlan:
    """Memory of one process.

    Args:
        tokens: of all rollouts.
        longest: rollout, in tokens.
        policy_bytes: of the policy's weights in this process; 0 when the features come from a
            spool.
        dtype: that is computed in.
        shards: processes that the drafter is divided among.
    """
    width, vocab = policy.hidden_size, policy.vocab_size
    element = DTYPES[layout.dtype].itemsize
    per_token = (len(layout.layer_ids) + 1) * width * element
    depths = config.training.draft_tokens
    batch = max(config.microbatch_tokens, longest)
    logits = min(depths * batch * vocab, LOGITS_AT_ONCE)
    heads = int(policy.config.num_attention_heads)
    layer = _HIDDEN_KEPT * width + _INTERMEDIATE_KEPT * _widest(drafter, vocab)
    scores = heads * max(square_at_once(dtype), longest) * _SCORES_ALIVE
    weights = sum(parameter.numel() for parameter in drafter.parameters())
    parts = {
        "policy": policy_bytes,
        "its head in float32": 2 * vocab * width * _FLOAT,
        "drafter, gradients, optimizer": _TRAINER_COPIES * weights * _FLOAT // shards,
        "features kept": min(config.feature_memory, tokens * per_token) if policy_bytes else 0,
        "features of coming steps": _STEPS_LOADED
        * config.microbatches_per_step
        * config.microbatch_tokens
        * per_token,
        "drafter's activations": (depths * batch * layer + scores) * _FLOAT,
        "logits, the policy's too": (logits + logits // depths) * _FLOAT,
    }
    return MemoryPlan(parts)


def fit_microbatch(plan_for: dict[int, MemoryPlan], budget: int) -> int:
    """The largest microbatch whose plan stays within `budget` bytes.

    Args:
        plan_for: microbatch tokens to the plan with it.

    Raises:
        ConfigError: none does; says what the smallest would take.
    """
    fitting = [tokens for tokens, plan in plan_for.items() if plan.total <= budget]
    if not fitting:
        smallest = plan_for[min(plan_for)]
        problem = f"{readable(budget)} do not hold even the smallest microbatch: {smallest}"
        raise ConfigError("pretrain", "memory", problem)
    return max(fitting)


def _widest(drafter: Drafter, vocab: int) -> int:
    """Features of its widest layer, an output head aside: the inside of its MLP."""
    linears = [module for module in drafter.modules() if isinstance(module, nn.Linear)]
    return max(linear.out_features for linear in linears if linear.out_features != vocab)
