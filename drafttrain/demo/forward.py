"""The small policy's forward for training on a CPU: the weights of a transformers Llama.

About twice as fast as transformers' own modules here: q, k, v and gate, up are one product
each, the elementwise parts keep less for backward, and matrices run in bfloat16, where that is
faster, while the weights stay float32. Rollouts are padded on the right, so the causal mask is
the only one needed. Held to transformers' forward by a test in float32.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM


def fast_precision() -> Literal["float32", "bfloat16"]:
    """bfloat16 where the processor multiplies in it; elsewhere it takes ten times as long."""
    can = torch.cpu.get_capabilities()
    has = any(can.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return "bfloat16" if has else "float32"


class _RmsNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last dimension; x: [N, H], weight: [H]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        unit = x * scale
        ctx.save_for_backward(unit, scale, weight)
        out: Tensor = unit * weight
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        unit, scale, weight = ctx.saved_tensors
        grad = grads[0] * weight
        along = torch.linalg.vecdot(grad, unit).unsqueeze(-1) / unit.shape[-1]
        grad_x = torch.addcmul(grad, unit, along, value=-1).mul_(scale)
        return grad_x, (grads[0] * unit).sum(0), None


class _SwiGlu(torch.autograd.Function):
    """silu(gate) * up; gate_up: [N, 2I]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        grad_gate = torch.ops.aten.silu_backward(grads[0] * up, gate)
        return torch.cat((grad_gate, grads[0] * F.silu(gate)), -1)


def policy_logits(
    policy: LlamaForCausalLM, tokens: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Logits of every position.

    Args:
        policy: float32 weights; as many kv heads as heads.
        tokens: int64 [B, T], padded on the right.
        dtype: of the computation; :func:`fast_precision` when absent.

    Returns:
        float32 [B, T, V]; differentiable in the policy's weights.
    """
    config, dtype = policy.config, dtype or getattr(torch, fast_precision())
    rope = _rope_tables(tokens.shape[1], config, dtype)
    full = torch.full((tokens.shape[1], tokens.shape[1]), float("-inf"), dtype=dtype)
    mask = full.triu(1)
    hidden = F.embedding(tokens.flatten(), policy.model.embed_tokens.weight).to(dtype)
    for layer in policy.model.layers:
        normed = _norm(hidden, layer.input_layernorm, config)
        attended = _attend(layer.self_attn, normed, tokens.shape, rope, mask)
        hidden = torch.addmm(hidden, attended, layer.self_attn.o_proj.weight.to(dtype).T)
        normed = _norm(hidden, layer.post_attention_layernorm, config)
        gate_up = torch.cat((layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)).to(dtype)
        inner = _apply(_SwiGlu, normed @ gate_up.T)
        hidden = torch.addmm(hidden, inner, layer.mlp.down_proj.weight.to(dtype).T)
    logits: Tensor = _norm(hidden, policy.model.norm, config) @ policy.lm_head.weight.to(dtype).T
    return logits.float().view(*tokens.shape, -1)


def _attend(
    attention: Any, x: Tensor, shape: torch.Size, rope: tuple[Tensor, Tensor], mask: Tensor
) -> Tensor:
    batch, length = shape
    heads, size = attention.config.num_attention_heads, attention.config.head_dim
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    qkv = torch.cat([projection.weight for projection in projections]).to(x.dtype)
    split = (x @ qkv.T).view(batch, length, 3, heads, size).permute(2, 0, 3, 1, 4)
    query, key = (_rotate(part, *rope).reshape(-1, length, size) for part in split[:2])
    scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=size**-0.5)
    mixed = scores.softmax(-1) @ split[2].reshape(-1, length, size)
    out: Tensor = mixed.view(batch, heads, length, size).transpose(1, 2)
    return out.reshape(batch * length, heads * size)


def _rope_tables(length: int, config: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    exponent = -torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = torch.arange(length)[:, None] * config.rope_parameters["rope_theta"] ** exponent
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    turned = torch.addcmul(first * cos, second, sin, value=-1)
    return torch.cat((turned, torch.addcmul(second * cos, first, sin)), -1)


def _norm(x: Tensor, norm: Any, config: Any) -> Tensor:
    return _apply(_RmsNorm, x, norm.weight.to(x.dtype), config.rms_norm_eps)


def _apply(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    out: Tensor = function.apply(*args)
    return out
