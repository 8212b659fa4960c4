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


def causal_tensors(config: dict[str, Any], where: str | Path) -> ExpectedTensors:
    """The tensors of a causal LM's checkpoint.

    Of a family that is not listed here only what all of them have is known; the engine's running
    model tells the rest when it is swapped.

    Raises:
        CheckpointError: a size is missing or wrong.
    """
    sizes = Sizes(config, where)
    table = (sizes["vocab_size"], sizes["hidden_size"])
    layers = sizes["num_hidden_layers"]
    required: Shapes = {"model.embed_tokens.weight": table}
    optional: Shapes = {}
    (optional if sizes.flag("tie_word_embeddings") else required)["lm_head.weight"] = table
    architecture = config["architectures"][0]
    if architecture not in _LISTED or sizes.flag("attention_bias") or sizes.flag("mlp_bias"):
        return ExpectedTensors(required, optional, others=True)
    bias, qk_norm = _LISTED[architecture]
    layer = norms(sizes) | grouped_attention(sizes, bias=bias, qk_norm=qk_norm)
    layer |= dense_mlp(sizes["hidden_size"], sizes["intermediate_size"])
    required["model.norm.weight"] = table[1:]
    for index in range(layers):
        required |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    return ExpectedTensors(required, optional)
