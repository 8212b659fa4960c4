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

from drafttrain.checkpoints.manifest import Kind, TargetFingerprint
from drafttrain.checkpoints.verify import verify
from drafttrain.drafters.attention import AttentionPlan, attend
from drafttrain.drafters.batch import Batch
from drafttrain.drafters.contract import Drafter, write_drafter
from drafttrain.drafters.kernels import compute_dtype, rotate, swiglu, take_rows, unit_rms
from drafttrain.drafters.policy import PolicyShape, read_policy_head
from drafttrain.errors import CheckpointError

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of a rotary embedding, [N, 1, d / 2] each."""

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


class _UnrolledLayer:
    """The layer over one batch, depth after depth.

    Its weights are put together once for all depths: a norm's weight is folded into the projections
    behind it, and projections of one input are one matrix. Query, key and value are linear in
    the embedding, so its share of them is computed once for each token; a depth takes the rows of
    the tokens it embeds.
    """

    def __init__(self, layer: Eagle3Layer, batch: Batch, embeds: Tensor, eps: float) -> None:
        dtype = embeds.dtype
        self.layer, self.eps = layer, eps
        self.plan = AttentionPlan(batch)
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        for_embeds, for_hidden = torch.cat([p.weight for p in projections]).chunk(2, dim=1)
        self.qkv_of_embeds = F.linear(
            unit_rms(embeds, eps), (for_embeds * layer.input_layernorm.weight).to(dtype)
        )
        self.qkv_weight = (for_hidden * layer.hidden_norm.weight).to(dtype).T
        self.o_weight = attention.o_proj.weight.to(dtype).T
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.gate_up_weight = (gate_up * layer.post_attention_layernorm.weight).to(dtype)
        self.down_weight = mlp.down_proj.weight.to(dtype).T
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def __call__(
        self, hidden: Tensor, embedded: Tensor, rotation: Rotation, queries: Tensor | None = None
    ) -> Tensor:
        """One depth.

        Args:
            hidden: [N, H], of N slots.
            embedded: int64 [N], which tokens are embedded there.
            rotation: cosine and sine at their positions.
            queries: int64 [R], those that attend; None for all.

        Returns:
            [R, H] of those that attend.
        """
        normed = unit_rms(hidden, self.eps)
        qkv = torch.addmm(take_rows(self.qkv_of_embeds, embedded), normed, self.qkv_weight)
        query = self._split(qkv, rotation)
        residual = normed * self.layer.hidden_norm.weight.to(normed.dtype)
        residual = residual if self.layer.norm_before_residual else hidden
        if queries is not None:
            query, residual = take_rows(query, queries), take_rows(residual, queries)
        attended = attend(query, self.keys, self.values, self.plan)
        residual = torch.addmm(residual, attended.flatten(1), self.o_weight)
        gate_up = F.linear(unit_rms(residual, self.eps), self.gate_up_weight)
        return torch.addmm(residual, swiglu(gate_up), self.down_weight)

    def _split(self, qkv: Tensor, rotation: Rotation) -> Tensor:
        """Keep this depth's keys and values; return its queries, [N, heads, d]."""
        attention = self.layer.self_attn
        heads, kv_heads = attention.heads, attention.kv_heads
        by_head = qkv.view(-1, heads + 2 * kv_heads, attention.head_dim)
        query, key = rotate(by_head[:, : heads + kv_heads], *rotation).split([heads, kv_heads], 1)
        value = by_head[:, heads + kv_heads :]
        if heads != kv_heads:
            key, value = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (key, value))
        self.keys.append(key)
        self.values.append(value)
        return query


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
        dtype, eps = compute_dtype(self.fc.weight), self.config.rms_norm_eps
        embeds = F.embedding(batch.tokens, embed_tokens).to(dtype)
        layer = _UnrolledLayer(self.midlayer, batch, embeds, eps)
        features = batch.aux_hidden[batch.slots].flatten(1).to(dtype)
        hidden = F.linear(features, self.fc.weight.to(dtype))
        # Depth 0 has keys at every slot, prompts included; rounds start only at some of them.
        starts = batch.starts_round.nonzero()[:, 0]
        hidden = layer(hidden, batch.slots + 1, self._rotation(batch, batch.slots, dtype), starts)
        outputs = [hidden]
        for depth in range(1, depths):
            # Past a rollout's end there is nothing to embed, and nothing there is trained on.
            embedded = (batch.rounds + 1 + depth).clamp_max(len(batch.tokens) - 1)
            rotation = self._rotation(batch, batch.rounds, dtype, ahead=depth)
            hidden = layer(hidden, embedded, rotation)
            outputs.append(hidden)
        unrolled: Tensor = unit_rms(torch.stack(outputs), eps) * self.norm.weight.to(dtype)
        return unrolled

    def head_weight(self, policy_head: Tensor) -> Tensor:
        return self.lm_head.weight

    def _rotation(
        self, batch: Batch, slots: Tensor, dtype: torch.dtype, ahead: int = 0
    ) -> Rotation:
        positions = batch.positions[slots] + ahead
        cos, sin = self.rotary(self.fc.weight, positions[None])
        half = cos.shape[-1] // 2  # both halves are the same
        return cos[0, :, None, :half].to(dtype), sin[0, :, None, :half].to(dtype)

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
