"""MTP heads: how the families of policies that ship one name its tensors and run it.

From vLLM 0.32, ``model_executor/models/*_mtp.py``. A head is one decoder layer behind a projection
of the last state and the next token's embedding; the engine runs it again for every further draft
token. Embedding and output head are the policy's and never part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.checkpoints.decoder_format import (
    ExpectedTensors,
    Shapes,
    Sizes,
    dense_mlp,
    expert_mlp,
    grouped_attention,
    latent_attention,
    norms,
)
from drafttrain.errors import CheckpointError


@dataclass(frozen=True)
class MTPFamily:
    """One way to ship an MTP head.

    Attributes:
        architecture: what a drafter folder's ``config.json`` says, so that the engine knows it.
        model_types: policies of this family.
        prefix: of the head in the policy's checkpoint; ``{layers}`` stands for its layer count.
        embed_norm, hidden_norm, project, out_norm: the head's own modules.
        layer: prefix of the decoder layer within the head.
        layer_tensors: names and shapes of that layer.
        embed_first: whether the embedding comes first in the projection's input, or the state.
        zero_first: whether the embedding at position 0 is zeroed.
        feeds_normed: whether the next draft token is computed from the state after ``out_norm``.
        reads_normed: whether the policy hands over its state after its final norm.
        count_key: where ``config.json`` keeps the number of heads.
    """

    architecture: str
    model_types: tuple[str, ...]
    prefix: str
    embed_norm: str
    hidden_norm: str
    project: str
    out_norm: str
    layer: str
    layer_tensors: Callable[[Sizes], Shapes]
    embed_first: bool = True
    zero_first: bool = False
    feeds_normed: bool = True
    reads_normed: bool = True
    count_key: str = "num_nextn_predict_layers"


def _mimo_layer(sizes: Sizes) -> Shapes:
    mlp = dense_mlp(sizes["hidden_size"], sizes["intermediate_size"])
    return norms(sizes) | grouped_attention(sizes, bias=True) | mlp


def _qwen3_5_layer(sizes: Sizes) -> Shapes:
    mlp = dense_mlp(sizes["hidden_size"], sizes["intermediate_size"])
    return norms(sizes) | grouped_attention(sizes, qk_norm=True, gated=True) | mlp


def _qwen3_next_layer(sizes: Sizes) -> Shapes:
    hidden = sizes["hidden_size"]
    shared = dense_mlp(hidden, sizes["shared_expert_intermediate_size"], "mlp.shared_expert.")
    shared["mlp.shared_expert_gate.weight"] = (1, hidden)
    attention = grouped_attention(sizes, qk_norm=True, gated=True)
    return norms(sizes) | attention | expert_mlp(sizes, sizes["num_experts"], shared)


def _deepseek_experts(sizes: Sizes) -> Shapes:
    inner, experts = sizes["moe_intermediate_size"], sizes["n_routed_experts"]
    width = inner * sizes["n_shared_experts"]
    shared = dense_mlp(sizes["hidden_size"], width, "mlp.shared_experts.")
    shared["mlp.gate.e_score_correction_bias"] = (experts,)
    return expert_mlp(sizes, experts, shared)


def _deepseek_layer(sizes: Sizes) -> Shapes:
    return norms(sizes) | latent_attention(sizes) | _deepseek_experts(sizes)


def _glm4_layer(sizes: Sizes) -> Shapes:
    bias, qk_norm = sizes.flag("attention_bias"), sizes.flag("use_qk_norm")
    attention = grouped_attention(sizes, bias=bias, qk_norm=qk_norm)
    return norms(sizes) | attention | _deepseek_experts(sizes)


_QWEN: dict[str, Any] = {
    "prefix": "mtp.",
    "embed_norm": "pre_fc_norm_embedding",
    "hidden_norm": "pre_fc_norm_hidden",
    "project": "fc",
    "out_norm": "norm",
    "layer": "layers.0.",
}
_DEEPSEEK: dict[str, Any] = {
    "prefix": "model.layers.{layers}.",
    "embed_norm": "enorm",
    "hidden_norm": "hnorm",
    "project": "eh_proj",
    "out_norm": "shared_head.norm",
    "layer": "",
    "zero_first": True,
}

FAMILIES: dict[str, MTPFamily] = {
    "mimo": MTPFamily(
        architecture="MiMoForCausalLM",
        model_types=("mimo",),
        prefix="model.mtp_layers.0.",
        embed_norm="token_layernorm",
        hidden_norm="hidden_layernorm",
        project="input_proj",
        out_norm="final_layernorm",
        layer="",
        layer_tensors=_mimo_layer,
        embed_first=False,
        zero_first=True,
        reads_normed=False,
    ),
    "qwen3_next": MTPFamily(
        architecture="Qwen3NextForCausalLM",
        model_types=("qwen3_next",),
        layer_tensors=_qwen3_next_layer,
        **_QWEN,
    ),
    "qwen3_5": MTPFamily(
        architecture="Qwen3_5ForCausalLM",
        model_types=("qwen3_5_text",),
        layer_tensors=_qwen3_5_layer,
        count_key="mtp_num_hidden_layers",
        **_QWEN,
    ),
    "qwen3_5_moe": MTPFamily(
        architecture="Qwen3_5MoeForCausalLM",
        model_types=("qwen3_5_moe_text",),
        layer_tensors=_qwen3_next_layer,
        count_key="mtp_num_hidden_layers",
        **_QWEN,
    ),
    # Kimi-K2 is a DeepSeek-V3 by another name.
    "deepseek_v3": MTPFamily(
        architecture="DeepseekV3ForCausalLM",
        model_types=("deepseek_v3", "kimi_k2"),
        layer_tensors=_deepseek_layer,
        **_DEEPSEEK,
    ),
    "glm4_moe": MTPFamily(
        architecture="Glm4MoeForCausalLM",
        model_types=("glm4_moe",),
        layer_tensors=_glm4_layer,
        feeds_normed=False,
        **_DEEPSEEK,
    ),
}


def family_of(config: dict[str, Any]) -> str | None:
    """The name of the MTP family a policy's or drafter's ``config.json`` belongs to."""
    architectures = config.get("architectures") or []
    for name, family in FAMILIES.items():
        # MiMo's own folders call themselves qwen2 as often as mimo.
        if family.architecture in architectures or config.get("model_type") in family.model_types:
            return name
    return None


def head_prefix(family: MTPFamily, config: dict[str, Any]) -> str:
    """Of the head's tensors in a checkpoint of this family."""
    return family.prefix.format(layers=config["num_hidden_layers"])


def tells_layers(config: dict[str, Any]) -> bool:
    """Whether the names of such a head's tensors hold the policy's layer count."""
    name = family_of(config)
    return name is not None and "{layers}" in FAMILIES[name].prefix


def mtp_tensors(config: dict[str, Any], where: str | Path) -> ExpectedTensors:
    """The tensors of a drafter folder that holds an MTP head.

    Raises:
        CheckpointError: a key is missing or has a wrong value, or there is more than one head.
    """
    name = family_of(config)
    assert name is not None, "the caller has asked kind_of"
    family, sizes = FAMILIES[name], Sizes(config, where)
    if sizes[family.count_key] != 1:
        raise CheckpointError(where, family.count_key, "expected 1: the engine runs the first only")
    hidden = sizes["hidden_size"]
    sizes["num_hidden_layers"], sizes["vocab_size"]  # read elsewhere, checked here
    head: Shapes = {f"{norm}.weight": (hidden,) for norm in norm_names(family)}
    head[f"{family.project}.weight"] = (hidden, 2 * hidden)
    head |= {family.layer + part: shape for part, shape in family.layer_tensors(sizes).items()}
    prefix = head_prefix(family, config)
    return ExpectedTensors({prefix + part: shape for part, shape in head.items()}, {})


def norm_names(family: MTPFamily) -> tuple[str, str, str]:
    return family.embed_norm, family.hidden_norm, family.out_norm
