"""The policy's embedding, output head and final norm, and how its hidden states are laid out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from vllm.distributed import tensor_model_parallel_all_gather
from vllm.model_executor.models.interfaces import supports_multimodal

from drafttrain.errors import EngineError
from drafttrain.rollouts.record import FeatureLayout, PolicyHead

# How far lm_head times the last hidden state may be from the engine's own logits, relative to them:
# rollouts carry that product as the policy's distribution.
_HEAD_TOLERANCE = 0.02


@dataclass(frozen=True)
class PolicyParts:
    """The policy's live modules, vLLM's own; ``vocab_size`` without its padding rows, and
    ``changes_logits``: what it does to the logits that its lm_head gives, None for nothing."""

    embed_tokens: Any
    lm_head: Any
    norm: Any
    layer_ids: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    changes_logits: str | None = None


def policy_parts(model: Any, model_config: Any) -> PolicyParts:
    """Finds them in a vLLM causal LM.

    Raises:
        EngineError: this architecture keeps them elsewhere.
    """
    language = model.get_language_model() if supports_multimodal(model) else model
    inner = getattr(language, "model", None)
    embed = getattr(inner, "embed_tokens", None)
    norm = getattr(inner, "norm", None)
    head = getattr(language, "lm_head", None)
    if embed is None or head is None or not hasattr(norm, "variance_epsilon"):
        raise EngineError(
            f"{type(model).__name__} lacks model.embed_tokens, lm_head or an RMS model.norm"
        )
    return PolicyParts(
        embed_tokens=embed,
        lm_head=head,
        norm=norm,
        layer_ids=tuple(getattr(inner, "aux_hidden_state_layers", ())),
        hidden_size=model_config.get_hidden_size(),
        vocab_size=model_config.get_vocab_size(),
        changes_logits=_changes_logits(language),
    )


def _changes_logits(language: Any) -> str | None:
    processor = getattr(language, "logits_processor", None)
    plain = {"scale": 1.0, "soft_cap": None}
    found = {name: getattr(processor, name, value) for name, value in plain.items()}
    changed = (name for name in plain if found[name] != plain[name])
    return next((f"{name} {found[name]}, expected {plain[name]}" for name in changed), None)


def head_weight(parts: PolicyParts) -> Tensor:
    """[V, H], gathered over tensor-parallel ranks (a collective: every rank calls it).

    vLLM leaves an unquantised output head's weight in place, also where it packs linears (CPU). A
    quantised head has no such weight: applied to the identity it gives the one it computes with.
    """
    weight: Tensor = parts.lm_head.weight
    if not (weight.is_floating_point() and weight.dim() == 2 and weight.numel()):
        identity = torch.eye(parts.hidden_size, dtype=parts.norm.weight.dtype, device=weight.device)
        weight = parts.lm_head.quant_method.apply(parts.lm_head, identity).T
    whole: Tensor = tensor_model_parallel_all_gather(weight, dim=0)
    return whole[: parts.vocab_size]


def clone_head(parts: PolicyParts, policy_version: int) -> PolicyHead:
    """A copy of the head on the policy's device (a collective: every rank calls it)."""
    ids = torch.arange(parts.vocab_size, device=parts.lm_head.weight.device)
    return PolicyHead(
        policy_version=policy_version,
        embed_tokens=parts.embed_tokens(ids).clone(),
        lm_head=head_weight(parts).clone(),
        final_norm=parts.norm.weight.clone(),
        norm_eps=parts.norm.variance_epsilon,
    )


def feature_layout(
    parts: PolicyParts, hidden: Tensor, logits: Tensor, layer_ids: tuple[int, ...]
) -> FeatureLayout:
    """How this engine's rows are laid out.

    vLLM does not say whether a model returns its last state before (MiMo) or after the final norm
    (Llama, Qwen), so it is read off one row: which of the two gives the logits.

    Args:
        parts: of the policy.
        hidden: [H] the state one row of logits was computed from.
        logits: [V] that row, before any sampling constraint.
        layer_ids: of the aux states the engine returns.

    Raises:
        EngineError: neither gives them.
    """
    weight, norm = head_weight(parts), parts.norm
    normed = F.rms_norm(hidden.float(), hidden.shape, norm.weight.float(), norm.variance_epsilon)
    after, before = (_distance(weight, state, logits) for state in (hidden, normed))
    nearest, largest = min(after, before), float(logits.abs().max())
    if not nearest <= _HEAD_TOLERANCE * largest:
        raise EngineError(
            "the policy's logits are not its lm_head times its last hidden state: up to "
            f"{nearest:.3g} away, expected at most {_HEAD_TOLERANCE:.0%} of {largest:.3g}"
        )
    return FeatureLayout(
        layer_ids=layer_ids,
        hidden_size=hidden.shape[-1],
        last_hidden_normed=after <= before,
        dtype=str(hidden.dtype).removeprefix("torch."),
    )


def _distance(weight: Tensor, hidden: Tensor, logits: Tensor) -> float:
    product = torch.mv(weight, hidden.to(weight.dtype))
    return float((product.float() - logits.float()).abs().max())
