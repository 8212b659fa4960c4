"""Configurations of MTP heads, made of their policy's."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from transformers import PretrainedConfig, Qwen2Config

from drafttrain.checkpoints.mtp_format import FAMILIES
from drafttrain.drafters.policy import PolicyShape, read_config
from drafttrain.drafters.rounds import use_rounds
from drafttrain.errors import CheckpointError

# What splits positions into those of time, height and width.
_SECTIONS = ("mrope_section", "mrope_interleaved")


def one_layer(config: PretrainedConfig) -> PretrainedConfig:
    """A configuration whose layer 0 is the kind of layer an MTP head has."""
    one = copy.deepcopy(config)
    one.num_hidden_layers = 1
    one.layer_types = ["full_attention"]
    one.first_k_dense_replace = 0
    one._experts_implementation = "eager"
    use_rounds(one)
    return one


def with_one_head(config: PretrainedConfig, family: str) -> PretrainedConfig:
    """`config` of a checkpoint with a single MTP head, however many the policy's has."""
    one = copy.deepcopy(config)
    setattr(one, FAMILIES[family].count_key, 1)
    return one


def mimo_config(policy: PolicyShape) -> Qwen2Config:
    """Of a dense Qwen2 layer with the policy's sizes, RoPE and lengths."""
    source = policy.config
    if source.hidden_size % source.num_attention_heads:
        problem = f"{source.hidden_size}, expected a multiple of num_attention_heads for a new head"
        raise CheckpointError("policy", "hidden_size", problem)
    rope = getattr(source, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" or rope.get("partial_rotary_factor", 1) != 1:
        problem = "longrope or part of a head, which a new head does not turn as its engine has it"
        raise CheckpointError("policy", "rope_parameters", problem)
    return Qwen2Config(
        architectures=[FAMILIES["mimo"].architecture],
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=source.hidden_size // source.num_attention_heads,  # the engine takes no other
        vocab_size=source.vocab_size,
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters=policy.rope_parameters,
        max_position_embeddings=source.max_position_embeddings,
        tie_word_embeddings=False,
        num_nextn_predict_layers=1,
    )


def without_sections(folder: Path, policy: PolicyShape) -> PolicyShape:
    """A policy of text alone without what splits its positions; another as it is.

    vLLM drops that from such a policy itself, but reads it in the drafter's configuration: the head
    would get three rows of positions for a rotation that takes one.
    """
    rope = getattr(policy.config, "rope_parameters", None) or {}
    if "text_config" in read_config(folder) or not any(key in rope for key in _SECTIONS):
        return policy
    config = copy.deepcopy(policy.config)
    config.rope_parameters = {key: rope[key] for key in rope if key not in _SECTIONS}
    return replace(policy, config=config)
