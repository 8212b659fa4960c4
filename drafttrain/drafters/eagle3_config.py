"""Configurations of Eagle3 drafters: of a new one, shaped for its policy, and of a loaded one."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field
from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig, Qwen3Config

from drafttrain.checkpoints.eagle3_format import FULL, LLAMA, QWEN3, engine_layer_ids
from drafttrain.checkpoints.manifest import MOST_PARTS
from drafttrain.config import Section
from drafttrain.drafters.policy import PolicyShape

_LENGTH, _ORIGINAL = "max_position_embeddings", "original_max_position_embeddings"


class Eagle3Variant(Section):
    """What is chosen for a new drafter; the rest of its configuration is the policy's."""

    layer: Literal["llama", "qwen3"] = "llama"
    """Qwen3's has a norm on every head's query and key."""
    num_hidden_layers: int = Field(1, ge=1, le=MOST_PARTS)
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    attention_bias: bool = False


def default_layer_ids(num_layers: int) -> tuple[int, ...]:
    """Three distinct aux layers of a policy: early, middle, late.

    vLLM's own default is kept where it gives three; on shallow policies it does not.
    """
    ids = engine_layer_ids(num_layers)
    if len(ids) == 3 and ids[0] > 0:
        return tuple(ids)
    return tuple(sorted({max(num_layers - 2, 0), max(num_layers - 1, 1), max(num_layers, 2)}))


def new_config(
    policy: PolicyShape, ids: tuple[int, ...], draft_ids: Tensor | None, variant: Eagle3Variant
) -> PretrainedConfig:
    """A configuration with the policy's sizes, RoPE and lengths, as vLLM reads it."""
    source = policy.config
    qwen3 = variant.layer == "qwen3"
    architectures = [QWEN3 if qwen3 else LLAMA]
    heads, kv_heads = policy.heads
    if not qwen3 and source.hidden_size % heads:
        # Llama's configuration wants a divisor; a drafter need not have as many as its policy.
        most = max(source.hidden_size // policy.head_dim, 1)
        heads = next(n for n in range(most, 0, -1) if source.hidden_size % n == 0)
        kv_heads = math.gcd(heads, kv_heads)
    return _config_class(architectures)(
        architectures=architectures,
        hidden_size=source.hidden_size,
        intermediate_size=getattr(source, "intermediate_size", None) or 4 * source.hidden_size,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=policy.head_dim,
        vocab_size=source.vocab_size,
        rms_norm_eps=policy.norm_eps,
        rope_parameters=policy.rope_parameters,
        max_position_embeddings=source.max_position_embeddings,
        tie_word_embeddings=False,
        draft_vocab_size=source.vocab_size if draft_ids is None else len(draft_ids),
        target_hidden_size=source.hidden_size,
        eagle_aux_hidden_state_layer_ids=list(ids),
        num_aux_hidden_states=len(ids),
        eagle_config={"eagle_aux_hidden_state_layer_ids": list(ids)},
        layer_types=[FULL] * variant.num_hidden_layers,
        **variant.model_dump(exclude={"layer"}),
    )


def loaded_config(config: dict[str, Any], policy: PolicyShape) -> PretrainedConfig:
    """That of a drafter's ``config.json``, as the class of its layers.

    Raises:
        ValueError, TypeError, KeyError, StrictDataclassError: transformers cannot take it.
    """
    return _config_class(config["architectures"])(**_lengthened(config, policy))


def _lengthened(config: dict[str, Any], policy: PolicyShape) -> dict[str, Any]:
    """`config` with the policy's length where its own, copied from elsewhere (2048, say), is less.

    It would end the drafter's use there.
    """
    own = config.get(_LENGTH, 0)
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if own and isinstance(rope, dict) and "yarn" in (rope.get("rope_type"), rope.get("type")):
            # Where it does not say what it stretches, it is the length it had.
            config = config | {key: {_ORIGINAL: own} | rope}
    return config | {_LENGTH: max(own, policy.max_length or 0)}


def _config_class(architectures: list[str]) -> type[PretrainedConfig]:
    config_class: type[PretrainedConfig] = Qwen3Config if architectures == [QWEN3] else LlamaConfig
    return config_class
