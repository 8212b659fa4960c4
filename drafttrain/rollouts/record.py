"""What a rollout is: token ids, what the policy computed on them, and where they came from."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]

# The lowest sampling temperature but 0; float32 logits can still be divided by it.
_COLDEST = 1e-5
TEMPERATURES = f"0 (greedy), or a finite number of at least {_COLDEST:g}"


@dataclass(frozen=True)
class Rollout:
    """One prompt with its completion, and the policy's features on it.

    T tokens, H hidden size, A aux layers.

    Attributes:
        rollout_id: unique within an engine's run.
        group: prompt group; rollouts of the same prompt share it (:func:`prompt_group`).
        tokens: int32 [T], prompt and completion.
        prompt_length: tokens of the prompt.
        captured: bool [T]; row t holds what the policy computed on ``tokens[: t + 1]``. False where
            it is missing. The last token normally has no row: nothing was computed on it.
        last_hidden: [T, H], in the layout's dtype.
        aux_hidden: [T, A, H], or None when the engine has no aux states.
        policy_version: the one policy version that computed every captured row.
        drafter_version: registry version that drafted; None without a registry drafter.
        temperature: of the sampling.
        finish_reason: "stop", "length", "abort", or None when unknown.
        rounds: verification rounds.
        drafted: draft tokens proposed in them.
        accepted: draft tokens accepted.
        reward: when the RL job told it.
        domain: data source or environment of the prompt, when known.
        generated: bool [T]; False where a token was given to the policy, not sampled by it. None:
            the whole completion was sampled. Differs when turns of others or tool outputs stand
            between the policy's own.
        rejected: bool [T]; True where the engine rejected a draft and took the policy's own token.
            None when it did not tell.
    """

    rollout_id: str
    group: str
    tokens: Tensor
    prompt_length: int
    captured: Tensor
    last_hidden: Tensor
    aux_hidden: Tensor | None
    policy_version: int
    drafter_version: int | None
    temperature: float
    finish_reason: str | None = None
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    reward: float | None = None
    domain: str | None = None
    generated: Tensor | None = None
    rejected: Tensor | None = None

    @property
    def length(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.tokens)

    @property
    def completion_length(self) -> int:
        return self.length - self.prompt_length

    @property
    def sampled_runs(self) -> Tensor:
        """:func:`sampled_runs` of its tokens."""
        if self.generated is not None:
            return sampled_runs(self.generated)
        return (torch.arange(self.length) - self.prompt_length + 1).clamp_min(0)


@dataclass(frozen=True)
class FeatureLayout:
    """How the rows of a segment were captured; the same for all its rollouts.

    Attributes:
        layer_ids: aux layers, sorted; id k is the state after k layers. () without aux states.
        hidden_size: H.
        last_hidden_normed: True when ``last_hidden`` is after the policy's final norm (Llama,
            Qwen), False when before (MiMo).
        dtype: "float32", "bfloat16" or "float16".
    """

    layer_ids: tuple[int, ...]
    hidden_size: int
    last_hidden_normed: bool
    dtype: str


@dataclass(frozen=True)
class PolicyHead:
    """What turns a last hidden state into the policy's distribution, and tokens into embeddings.

    Attributes:
        policy_version: whose weights these are.
        embed_tokens: [V, H].
        lm_head: [V, H].
        final_norm: [H], or None when unknown.
        norm_eps: of the final RMS norm.
    """

    policy_version: int
    embed_tokens: Tensor
    lm_head: Tensor
    final_norm: Tensor | None
    norm_eps: float


def is_temperature(value: float) -> bool:
    """Whether a policy can have been sampled at it: one of `TEMPERATURES`."""
    return value == 0 or _COLDEST <= value < math.inf


def prompt_group(prompt_token_ids: Sequence[int]) -> str:
    """The prompt group: 16 hex digits of the SHA-256 of the prompt's token ids (little-endian
    int32)."""
    encoded = np.asarray(prompt_token_ids, dtype="<i4").tobytes()
    return hashlib.sha256(encoded).hexdigest()[:16]


def sampled_runs(generated: Tensor) -> Tensor:
    """How many tokens in a row, up to and including each, the policy sampled.

    Args:
        generated: bool [..., T].

    Returns:
        int64 [..., T]: 0 where a token was given to the policy; 1, 2, ... within a run.
    """
    total = generated.long().cumsum(-1)
    return total - (total * ~generated).cummax(-1).values
