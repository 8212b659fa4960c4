"""Names and shapes of one transformer decoder layer's tensors, from its ``config.json``.

MTP heads and small draft models are made of such layers, named as Hugging Face checkpoints name
them. Keys are read where they are used, so that a family only needs those it has.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.checkpoints.manifest import MOST_PARTS
from drafttrain.errors import CheckpointError

Shape = tuple[int, ...]
Shapes = dict[str, Shape]

# Keys that say how many parts have tensors of their own.
_COUNTS = ("num_hidden_layers", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class ExpectedTensors:
    """Names and shapes of a checkpoint's tensors.

    Attributes:
        required: must be there.
        optional: may be there.
        others: whether tensors of other names may be there as well.
    """

    required: Shapes
    optional: Shapes
    others: bool = False


class Sizes:
    """The sizes in a configuration, each checked when it is read.

    Args:
        config: of a causal LM.
        where: its file, for messages.
    """

    def __init__(self, config: dict[str, Any], where: str | Path) -> None:
        self._config = config
        self._where = where

    def __getitem__(self, key: str) -> int:
        value = self._config.get(key)
        if type(value) is not int or value < 1:
            raise CheckpointError(self._where, key, f"{value!r:.80}, expected a positive integer")
        if key in _COUNTS and value > MOST_PARTS:
            raise CheckpointError(self._where, key, f"{value!r:.80}, expected at most {MOST_PARTS}")
        return value

    def flag(self, key: str) -> bool:
        return self._config.get(key) is True

    def has(self, key: str) -> bool:
        return self._config.get(key) is not None

    @property
    def head_dim(self) -> int:
        if self.has("head_dim"):
            return self["head_dim"]
        return self["hidden_size"] // self["num_attention_heads"]

    @property
    def key_heads(self) -> int:
        has = self.has("num_key_value_heads")
        return self["num_key_value_heads" if has else "num_attention_heads"]


def norms(sizes: Sizes) -> Shapes:
    """The two norms of a pre-norm layer."""
    hidden = (sizes["hidden_size"],)
    return {"input_layernorm.weight": hidden, "post_attention_layernorm.weight": hidden}


def grouped_attention(
    sizes: Sizes, *, bias: bool = False, qk_norm: bool = False, gated: bool = False
) -> Shapes:
    """Grouped-query attention; `gated`: ``q_proj`` also makes a gate of the output (Qwen3-Next)."""
    hidden, head_dim = sizes["hidden_size"], sizes.head_dim
    queries, keys = sizes["num_attention_heads"] * head_dim, sizes.key_heads * head_dim
    made = queries * (2 if gated else 1)
    tensors: Shapes = {
        "self_attn.q_proj.weight": (made, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
    }
    if bias:
        tensors["self_attn.q_proj.bias"] = (made,)
        tensors["self_attn.k_proj.bias"] = tensors["self_attn.v_proj.bias"] = (keys,)
    if qk_norm:
        tensors["self_attn.q_norm.weight"] = tensors["self_attn.k_norm.weight"] = (head_dim,)
    return tensors


def latent_attention(sizes: Sizes) -> Shapes:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434)."""
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    rotated, latent = sizes["qk_rope_head_dim"], sizes["kv_lora_rank"]
    query = heads * (sizes["qk_nope_head_dim"] + rotated)
    value = heads * sizes["v_head_dim"]
    tensors: Shapes = {
        "self_attn.kv_a_proj_with_mqa.weight": (latent + rotated, hidden),
        "self_attn.kv_a_layernorm.weight": (latent,),
        "self_attn.kv_b_proj.weight": (heads * sizes["qk_nope_head_dim"] + value, latent),
        "self_attn.o_proj.weight": (hidden, value),
    }
    if not sizes.has("q_lora_rank"):
        return tensors | {"self_attn.q_proj.weight": (query, hidden)}
    rank = sizes["q_lora_rank"]
    return tensors | {
        "self_attn.q_a_proj.weight": (rank, hidden),
        "self_attn.q_a_layernorm.weight": (rank,),
        "self_attn.q_b_proj.weight": (query, rank),
    }


def dense_mlp(hidden: int, inner: int, prefix: str = "mlp.") -> Shapes:
    """A gated MLP."""
    return {
        f"{prefix}gate_proj.weight": (inner, hidden),
        f"{prefix}up_proj.weight": (inner, hidden),
        f"{prefix}down_proj.weight": (hidden, inner),
    }


def expert_mlp(sizes: Sizes, experts: int, shared: Shapes) -> Shapes:
    """A mixture of `experts` routed MLPs beside what all tokens share."""
    hidden, inner = sizes["hidden_size"], sizes["moe_intermediate_size"]
    tensors: Shapes = {"mlp.gate.weight": (experts, hidden), **shared}
    for expert in range(experts):
        tensors |= dense_mlp(hidden, inner, f"mlp.experts.{expert}.")
    return tensors
