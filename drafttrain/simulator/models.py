"""The shape of a policy or a draft model: what a forward pass reads and computes.

Sizes are those of a decoder-only transformer with grouped-query attention and gated MLPs, dense or
mixture of experts (MoE). Norms, biases, routers and the embedding lookup are left out: below 1%.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from drafttrain.config import Section

# Far above any model.
Size = Annotated[int, Field(ge=1, le=1 << 24)]
SizeOrZero = Annotated[int, Field(ge=0, le=1 << 24)]


class ModelShape(Section):
    """A causal language model."""

    layers: Size
    hidden_size: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    vocab_size: Size
    intermediate_size: SizeOrZero = 0
    """Width of the dense MLP; 0 when every layer is MoE."""
    experts: SizeOrZero = 0
    """Experts in each layer; 0 for a dense model."""
    experts_per_token: SizeOrZero = 0
    expert_intermediate_size: SizeOrZero = 0

    @model_validator(mode="after")
    def _one_kind_of_mlp(self) -> Self:
        sizes = (self.experts, self.experts_per_token, self.expert_intermediate_size)
        if any(sizes) and not all(sizes):
            raise ValueError(
                "an MoE needs experts, experts_per_token and expert_intermediate_size together"
            )
        if self.experts_per_token > self.experts:
            raise ValueError("experts_per_token exceeds experts")
        if not self.experts and not self.intermediate_size:
            raise ValueError("expected intermediate_size, or the fields of an MoE")
        return self

    @property
    def attention_weights(self) -> int:
        """Weights of one layer's projections."""
        width = self.heads + self.kv_heads
        return 2 * self.hidden_size * self.head_dim * width

    @property
    def shared_weights(self) -> int:
        """Weights that every step reads, whatever the tokens: all but experts, head included."""
        mlp = 3 * self.hidden_size * self.intermediate_size
        head = self.vocab_size * self.hidden_size
        return self.layers * (self.attention_weights + mlp) + head

    @property
    def expert_weights(self) -> int:
        """Weights of all experts of all layers."""
        return self.layers * self.experts * self._one_expert

    @property
    def active_weights(self) -> int:
        """Weights that take part in one token's forward pass."""
        return self.shared_weights + self.layers * self.experts_per_token * self._one_expert

    @property
    def _one_expert(self) -> int:
        return 3 * self.hidden_size * self.expert_intermediate_size

    @property
    def kv_width(self) -> int:
        """Numbers that one token keeps in the KV cache, all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def _qwen3(
    layers: int, hidden: int, intermediate: int, heads: int, kv_heads: int = 8
) -> ModelShape:
    return ModelShape(
        layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        vocab_size=151936,
    )


def _qwen3_moe(layers: int, hidden: int, expert: int, heads: int) -> ModelShape:
    return ModelShape(
        layers=layers,
        hidden_size=hidden,
        heads=heads,
        kv_heads=4,
        head_dim=128,
        vocab_size=151936,
        experts=128,
        experts_per_token=8,
        expert_intermediate_size=expert,
    )


# From the models' published config.json.
MODELS = {
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32),
    "qwen3-8b": _qwen3(36, 4096, 12288, 32),
    "qwen3-32b": _qwen3(64, 5120, 25600, 64),
    "qwen3-30b-a3b": _qwen3_moe(48, 2048, 768, 32),
    "qwen3-235b-a22b": _qwen3_moe(94, 4096, 1536, 64),
}

_FIELDS = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "heads": "num_attention_heads",
    "vocab_size": "vocab_size",
}


def read_shape(folder: Path) -> ModelShape:
    """The shape in a transformers folder's ``config.json``.

    Raises:
        ValueError: the file is missing, is no JSON object, or lacks a size.
    """
    try:
        config: Any = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}/config.json cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder}/config.json is not an object")
    for key in _FIELDS.values():
        if type(config.get(key)) is not int or config[key] < 1:
            raise ValueError(f"{folder}/config.json: {key}: expected a whole number above 0")
    heads = config["num_attention_heads"]
    experts = config.get("num_experts", config.get("num_local_experts", 0)) or 0
    return ModelShape(
        **{field: config[key] for field, key in _FIELDS.items()},
        kv_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        intermediate_size=0 if experts else config.get("intermediate_size", 0),
        experts=experts,
        experts_per_token=config.get("num_experts_per_tok", 0) if experts else 0,
        expert_intermediate_size=config.get("moe_intermediate_size", 0) if experts else 0,
    )


def _find(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if value in MODELS:
        return MODELS[value]
    if Path(value).is_dir():
        return read_shape(Path(value))
    raise ValueError(f"neither a folder nor a known model ({', '.join(MODELS)})")


# A model by name, by its folder, or by its sizes.
Model = Annotated[ModelShape, BeforeValidator(_find)]


DrafterKind = Literal["eagle3", "mtp", "draft_model", "ngram"]


@dataclass(frozen=True)
class DrafterShape:
    """A drafter with weights of its own.

    Attributes:
        model: its layers and head.
        fusing: further weights, that bring the policy's hidden states in.
    """

    model: ModelShape
    fusing: int = 0


def drafter_shape(
    kind: DrafterKind, policy: ModelShape, draft_vocab: int, model: ModelShape | None
) -> DrafterShape | None:
    """The drafter that goes with a policy; None for n-grams.

    Args:
        draft_vocab: rows of an eagle3 drafter's head.
        model: the draft model's own shape; only for ``draft_model``.
    """
    hidden = policy.hidden_size
    if kind == "eagle3":
        # Three states of the policy become one; the attention reads it and the embedding.
        layer = ModelShape(
            layers=1,
            hidden_size=hidden,
            heads=policy.heads,
            kv_heads=policy.kv_heads,
            head_dim=policy.head_dim,
            vocab_size=draft_vocab,
            intermediate_size=policy.intermediate_size or 3 * hidden,
        )
        inner = policy.head_dim * (policy.heads + 2 * policy.kv_heads)
        return DrafterShape(layer, fusing=3 * hidden**2 + hidden * inner)
    if kind == "mtp":
        # One of the policy's own layers, over its last state and the embedding.
        return DrafterShape(policy.model_copy(update={"layers": 1}), fusing=2 * hidden**2)
    return DrafterShape(model) if model else None
