"""Small draft models: ordinary causal language models with the policy's vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drafttrain.checkpoints.decoder_format import (
    ExpectedTensors,
    Shapes,
    Sizes,
    dense_mlp,
    grouped_attention,
    norms,
)

# Families whose tensors are listed in full: (bias on q, k and v; norms on q and k).
_LISTED = {
    "LlamaForCausalLM": (False, False),
    "MistralForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}

# Families that name their embedding and their head otherwise than all others.
_TABLES = {
    "GPTNeoXForCausalLM": ("gpt_neox.embed_in.weight", "embed_out.weight"),
    "OPTForCausalLM": ("model.decoder.embed_tokens.weight", "lm_head.weight"),
}


def table_names(architecture: str) -> tuple[str, str]:
    """What this family calls its embedding and its head in a checkpoint."""
    return _TABLES.get(architecture, ("model.embed_tokens.weight", "lm_head.weight"))


def causal_tensors(config: dict[str, Any], where: str | Path) -> ExpectedTensors:
    """The tensors of a causal LM's checkpoint.

    Of a family that is not listed here only what all of them have is known; the engine's running
    model tells the rest when it is swapped.

    Raises:
        CheckpointError: a size is missing or wrong.
    """
    sizes = Sizes(config, where)
    # OPT's embedding may be narrower than its layers.
    width = "word_embed_proj_dim" if sizes.has("word_embed_proj_dim") else "hidden_size"
    table = (sizes["vocab_size"], sizes[width])
    layers = sizes["num_hidden_layers"]
    architecture = config["architectures"][0]
    embedding, head = table_names(architecture)
    required: Shapes = {embedding: table}
    optional: Shapes = {}
    (optional if sizes.flag("tie_word_embeddings") else required)[head] = table
    if architecture not in _LISTED or sizes.flag("attention_bias") or sizes.flag("mlp_bias"):
        return ExpectedTensors(required, optional, others=True)
    bias, qk_norm = _LISTED[architecture]
    layer = norms(sizes) | grouped_attention(sizes, bias=bias, qk_norm=qk_norm)
    layer |= dense_mlp(sizes["hidden_size"], sizes["intermediate_size"])
    required["model.norm.weight"] = table[1:]
    for index in range(layers):
        required |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return ExpectedTensors(required, optional)
