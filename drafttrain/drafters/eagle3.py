"""Eagle3: one transformer layer that reads three of the policy's layers and drafts from them.

Architecture and training-time test from EAGLE-3 (arXiv 2503.01840); the forward is that of vLLM's
``llama_eagle3.py``, so that what is trained is what drafts::

    g        = fc(cat(aux))                                     features of slot s
    x        = cat(input_layernorm(embed), hidden_norm(g))      [.., 2H]
    h        = attention(x) + residual                          residual: g, or hidden_norm(g)
    out      = mlp(post_attention_layernorm(h)) + h             before the norm: the next depth's g
    logits   = lm_head(norm(out))
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import rotate_half as rotate

from drafttrain.checkpoints.manifest import Kind, TargetFingerprint
from drafttrain.checkpoints.verify import verify
from drafttrain.drafters.attention import causal_plus_diagonal
from drafttrain.drafters.batch import Batch
from drafttrain.drafters.contract import Drafter, write_drafter
from drafttrain.drafters.policy import PolicyShape, read_policy_head
from drafttrain.errors import CheckpointError

def default_layer_ids(num_layers: int) -> tuple[int, ...]:
    """Three distinct aux layers of a policy: early, middle, late.

    vLLM's own default (2, L//2, L-3) is kept where it gives three; on shallow policies it does not.
    """
    ids = sorted({2, num_layers // 2, num_layers - 3})
    if len(ids) == 3 and ids[0] > 0:
        return tuple(ids)
    return tuple(sorted({max(num_layers - 2, 0), max(num_layers - 1, 1), max(num_layers, 2)}))


class Eagle3Attention(nn.Module):
    """Grouped-query attention over cat(embedding, features), input size 2H."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        width = 2 * config.hidden_size
        self.q_proj = nn.Linear(width, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(width, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def project(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated query and key, and value: [B, heads, S, d] each."""

        def split(projected: Tensor, heads: int) -> Tensor:
            return projected.view(*x.shape[:-1], heads, self.head_dim).transpose(1, 2)

        query = split(self.q_proj(x), self.heads)
        key = split(self.k_proj(x), self.kv_heads)
        value = split(self.v_proj(x), self.kv_heads)
        query = query * cos + rotate(query) * sin
        key = key * cos + rotate(key) * sin
        groups = self.heads // self.kv_heads
        if groups > 1:
            key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
        return query, key, value


class Eagle3Layer(nn.Module):
    """The decoder layer; called ``midlayer`` in checkpoints."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        norm = {"eps": config.rms_norm_eps}
        self.norm_before_residual = bool(config.norm_before_residual)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, **norm)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, **norm)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, **norm)
        self.self_attn = Eagle3Attention(config)
        self.mlp = LlamaMLP(config)


class Eagle3Drafter(Drafter):
    """See the module. One Llama-style layer over the whole vocabulary of the policy."""

    kind: ClassVar[Kind] = "eagle3"

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.layer_ids = tuple(config.eagle_aux_hidden_state_layer_ids)
        features = len(self.layer_ids) * config.target_hidden_size
        self.fc = nn.Linear(features, config.hidden_size, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)

    def unroll(self, batch: Batch, embed_tokens: Tensor, depths: int) -> Tensor:
        if batch.aux_hidden is None:
            raise ValueError("an Eagle3 drafter needs the policy's aux hidden states")
        slots = batch.tokens.shape[1] - 1
        hidden = self.fc(batch.aux_hidden[:, :slots].flatten(2))
        embeds = F.embedding(batch.tokens, embed_tokens)
        key_mask = batch.captured[:, :slots]
        keys: list[Tensor] = []
        values: list[Tensor] = []
        outputs = []
        for depth in range(depths):
            shifted = F.pad(embeds[:, 1 + depth :], (0, 0, 0, depth))
            cos, sin = self._rotation(hidden, first=depth)
            hidden = self._layer(shifted, hidden, cos, sin, keys, values, key_mask)
            outputs.append(self.norm(hidden))
        return torch.stack(outputs)

    def head_weight(self, policy_head: Tensor) -> Tensor:
        return self.lm_head.weight

    def _rotation(self, hidden: Tensor, first: int) -> tuple[Tensor, Tensor]:
        positions = torch.arange(first, first + hidden.shape[1], device=hidden.device)[None]
        cos, sin = self.rotary(hidden, positions)
        return cos[:, None], sin[:, None]

    def _layer(
        self,
        embeds: Tensor,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: list[Tensor],
        values: list[Tensor],
        key_mask: Tensor,
    ) -> Tensor:
        layer = self.midlayer
        normed = layer.hidden_norm(hidden)
        residual = normed if layer.norm_before_residual else hidden
        x = torch.cat([layer.input_layernorm(embeds), normed], dim=-1)
        query, key, value = layer.self_attn.project(x, cos, sin)
        keys.append(key)
        values.append(value)
        attended = causal_plus_diagonal(query, keys, values, key_mask)
        residual = residual + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
        out: Tensor = residual + layer.mlp(layer.post_attention_layernorm(residual))
        return out

    @classmethod
    def initialise(
        cls, policy: PolicyShape, *, layer_ids: tuple[int, ...] | None = None, **_: Any
    ) -> Self:
        drafter = cls(_drafter_config(policy, layer_ids or default_layer_ids(policy.num_layers)))
        for module in drafter.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.in_features))
        # Small writes to the residual: the first drafts come from fc's features alone.
        for projection in (drafter.midlayer.self_attn.o_proj, drafter.midlayer.mlp.down_proj):
            nn.init.zeros_(projection.weight)
        return drafter

    @classmethod
    def from_policy(cls, folder: Path, policy: PolicyShape, **options: Any) -> Self:
        drafter = cls.initialise(policy, **options)
        head = read_policy_head(folder, policy)
        with torch.no_grad():
            drafter.lm_head.weight.copy_(head.lm_head)
            if head.final_norm is not None:
                drafter.norm.weight.copy_(head.final_norm)
        return drafter

    @classmethod
    def load(cls, folder: Path, policy: PolicyShape) -> Self:
        verified = verify(folder, TargetFingerprint.from_config(policy.config.to_dict()))
        _refuse_untrained_variants(folder, verified.config)
        drafter = cls(LlamaConfig(**verified.config))
        tensors = {
            name.replace("layers.0.", "midlayer.", 1): tensor.float()
            for name, tensor in verified.tensors.items()
            if name not in {"embed_tokens.weight", "t2d"}
        }
        drafter.load_state_dict(tensors)
        return drafter

    def export(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        write_drafter(folder, self.config, self.state_dict(), dtype)


def _drafter_config(policy: PolicyShape, layer_ids: tuple[int, ...]) -> LlamaConfig:
    """A Llama configuration with the policy's sizes, RoPE and lengths, as vLLM reads it."""
    source = policy.config
    head_dim = getattr(source, "head_dim", None) or (
        source.hidden_size // source.num_attention_heads
    )
    return LlamaConfig(
        architectures=["LlamaForCausalLMEagle3"],
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=head_dim,
        vocab_size=source.vocab_size,
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters=source.rope_parameters,
        max_position_embeddings=source.max_position_embeddings,
        tie_word_embeddings=False,
        draft_vocab_size=source.vocab_size,
        target_hidden_size=source.hidden_size,
        norm_before_residual=False,
        eagle_aux_hidden_state_layer_ids=list(layer_ids),
        num_aux_hidden_states=len(layer_ids),
        eagle_config={"eagle_aux_hidden_state_layer_ids": list(layer_ids)},
    )


def _refuse_untrained_variants(folder: Path, config: dict[str, Any]) -> None:
    """Variants the engine knows and this module does not train yet are refused, not misread."""
    for field in ("norm_before_fc", "fc_norm", "norm_output", "attention_bias"):
        if config.get(field):
            raise CheckpointError(folder, f"config.json {field}", "true is not supported yet")
    if config["draft_vocab_size"] != config["vocab_size"]:
        problem = (
            f"expected the policy's {config['vocab_size']}: a smaller one is not supported yet"
        )
        raise CheckpointError(folder, "config.json draft_vocab_size", problem)
    if config.get("num_hidden_layers") != 1:
        raise CheckpointError(folder, "config.json num_hidden_layers", "expected 1")
