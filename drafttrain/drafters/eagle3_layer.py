"""The decoder layers of an Eagle3 drafter, and how they run over a batch of rollouts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from drafttrain.checkpoints.eagle3_format import QWEN3, SLIDING
from drafttrain.drafters.attention import KeysValues, attend
from drafttrain.drafters.attention_plan import AttentionPlan
from drafttrain.drafters.batch import Batch, pad_rows
from drafttrain.drafters.kernels import rotate, swiglu, take_rows, unit_rms


class Eagle3Attention(nn.Module):
    """Grouped-query attention; of the first layer over cat(embedding, features), `width` 2H.

    Qwen3's has a norm on every head's query and key.
    """

    def __init__(self, config: PretrainedConfig, width: int) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        qwen3 = config.architectures == [QWEN3]
        bias = bool(config.attention_bias)
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(width, queries, bias=bias)
        self.k_proj = nn.Linear(width, keys, bias=bias)
        self.v_proj = nn.Linear(width, keys, bias=bias)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=bias and not qwen3)
        norm = {"eps": config.rms_norm_eps}
        self.q_norm = LlamaRMSNorm(self.head_dim, **norm) if qwen3 else None
        self.k_norm = LlamaRMSNorm(self.head_dim, **norm) if qwen3 else None


class Eagle3Layer(nn.Module):
    """A decoder layer. The first also reads the embedding and has a norm for the features.

    Its queries see `window` positions, their own the last, or all when there is None.
    """

    def __init__(self, config: PretrainedConfig, *, index: int) -> None:
        super().__init__()
        first = index == 0
        sliding = config.layer_types[index] == SLIDING
        self.window: int | None = config.sliding_window if sliding else None
        hidden, norm = config.hidden_size, {"eps": config.rms_norm_eps}
        self.norm_before_residual = bool(config.norm_before_residual)
        self.input_layernorm = LlamaRMSNorm(hidden, **norm)
        self.hidden_norm = LlamaRMSNorm(hidden, **norm) if first else None
        self.post_attention_layernorm = LlamaRMSNorm(hidden, **norm)
        self.self_attn = Eagle3Attention(config, 2 * hidden if first else hidden)
        self.mlp = (Qwen3MLP if config.architectures == [QWEN3] else LlamaMLP)(config)


class AttentionPlans:
    """How attention goes in one batch: from every slot, or from where rounds start.

    Only the last layer's output is needed nowhere but in rounds: the layers before it make the keys
    that the next ones have at every slot.
    """

    def __init__(self, batch: Batch, layers: int, dtype: torch.dtype) -> None:
        self.starts = pad_rows(batch.starts_round.nonzero()[:, 0], fill=len(batch.slots))
        self.rounds = AttentionPlan(batch, dtype)
        if layers > 1:
            self.slots = AttentionPlan(batch, dtype, torch.ones_like(batch.starts_round))


class UnrolledLayer:
    """A layer over one batch, depth after depth.

    Its weights are put together once for all depths: a norm's weight is folded into the projections
    behind it, and projections of one input are one matrix. Query, key and value are linear in
    the embedding, so its share of them is computed once for each token; a depth takes the rows of
    the tokens it embeds.

    Rows are padded behind (:func:`pad_rows`); what comes of the padding is never used.

    Args:
        layer: its weights.
        plans: of the batch.
        embeds: [T, H] of the batch's tokens, for the first layer.
        eps: of the norms.
        dtype: to compute in.
        last: whether no layer comes after it.
    """

    def __init__(
        self,
        layer: Eagle3Layer,
        plans: AttentionPlans,
        embeds: Tensor | None,
        eps: float,
        dtype: torch.dtype,
        *,
        last: bool,
    ) -> None:
        self.layer, self.plans, self.eps, self.last = layer, plans, eps, last
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        for_input = torch.cat([p.weight for p in projections])
        self.bias = None
        if attention.q_proj.bias is not None:
            self.bias = torch.cat([p.bias for p in projections]).to(dtype)
        norm = layer.input_layernorm
        self.qkv_of_embeds: Tensor | None = None
        if layer.hidden_norm is not None:
            assert embeds is not None, "the first layer reads the embedding"
            for_embeds, for_input = for_input.chunk(2, dim=1)
            for_embeds = (for_embeds * norm.weight).to(dtype)
            self.qkv_of_embeds = F.linear(unit_rms(embeds, eps), for_embeds, self.bias)
            norm = layer.hidden_norm
        self.norm_weight = norm.weight.to(dtype)
        self.qkv_weight = (for_input * norm.weight).to(dtype)
        self.o_weight = attention.o_proj.weight.to(dtype).T
        gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.gate_up_weight = (gate_up * layer.post_attention_layernorm.weight).to(dtype)
        self.down_weight = mlp.down_proj.weight.to(dtype).T
        self.kept = KeysValues()

    def __call__(self, hidden: Tensor, embedded: Tensor, rotation: Tensor) -> Tensor:
        """One depth.

        Args:
            hidden: [N, H]; of every slot at depth 0, then of every round.
            embedded: int64 [N], which tokens are embedded there.
            rotation: cosine and sine at their positions, [2, N, 1, d].

        Returns:
            [N, H]; of the last layer at depth 0, [R, H] of the rounds.
        """
        normed = unit_rms(hidden, self.eps)
        at_slots = self.kept.depths == 0
        query = self._split(self._qkv(normed, embedded), rotation)
        residual = normed * self.norm_weight if self.layer.norm_before_residual else hidden
        if self.layer.hidden_norm is None:
            residual = hidden
        plan = self.plans.rounds
        if at_slots and self.last:
            starts = self.plans.starts
            query, residual = take_rows(query, starts), take_rows(residual, starts)
        elif at_slots:
            plan = self.plans.slots
        attended = attend(query, self.kept, plan, self.layer.window)
        residual = torch.addmm(residual, attended.flatten(1), self.o_weight)
        if (bias := self.layer.self_attn.o_proj.bias) is not None:
            residual = residual + bias.to(residual.dtype)
        gate_up = F.linear(unit_rms(residual, self.eps), self.gate_up_weight)
        written: Tensor = torch.addmm(residual, swiglu(gate_up), self.down_weight)
        return written

    def _qkv(self, normed: Tensor, embedded: Tensor) -> Tensor:
        if self.qkv_of_embeds is None:
            return F.linear(normed, self.qkv_weight, self.bias)
        return torch.addmm(take_rows(self.qkv_of_embeds, embedded), normed, self.qkv_weight.T)

    def _split(self, qkv: Tensor, rotation: Tensor) -> Tensor:
        """Keep this depth's keys and values; return its queries, [N, heads, d]."""
        attention = self.layer.self_attn
        heads, kv_heads = attention.heads, attention.kv_heads
        by_head = qkv.view(-1, heads + 2 * kv_heads, attention.head_dim)
        turned, value = by_head.split([heads + kv_heads, kv_heads], 1)
        if attention.q_norm is not None and attention.k_norm is not None:
            of_query = attention.q_norm.weight.expand(heads, -1)
            of_key = attention.k_norm.weight.expand(kv_heads, -1)
            weights = torch.cat([of_query, of_key]).to(turned.dtype)
            turned = unit_rms(turned, self.eps) * weights
        query: Tensor
        query, key = rotate(turned, *rotation).split([heads, kv_heads], 1)
        if heads != kv_heads:
            key, value = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (key, value))
        self.kept.add(key, value, self.plans.rounds)
        return query
