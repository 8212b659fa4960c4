"""Elementwise parts of a drafter's layer, each with a backward of few passes over memory.

A drafter's layer is small, so what the framework's composite operations read and write again costs
as much as the matrix products. Each function here is checked against its plain form in float64.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(weight: Tensor) -> torch.dtype:
    """What to compute in: autocast's dtype where it is on, else that of `weight`."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def wide(tensor: Tensor) -> torch.dtype:
    """What to add up in: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)


def embed(tokens: Tensor, table: Tensor) -> Tensor:
    """Rows `tokens`, int64 [N], of `table` [V, H]; from another device only they are moved."""
    return F.embedding(tokens.to(table.device), table).to(tokens.device)


def unit_rms(x: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension: an RMS norm without its weight."""
    normed: Tensor = _UnitRms.apply(x, eps)
    return normed


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of both halves (as Llama pairs them).

    Args:
        x: [N, heads, d].
        cos, sin: [N, 1, d]; the first half of the sines is negated.
    """
    rotated: Tensor = _Rotate.apply(x, cos, sin)
    return rotated


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of [N, 2I] -> [N, I]; the gate is the first half."""
    activated: Tensor = _SwiGLU.apply(gate_up)
    return activated


def take_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x[rows]``; its gradient is a copy instead of a scattered sum.

    So the rows must differ, except for those whose gradient is zero at all their places.
    """
    taken: Tensor = _TakeRows.apply(x, rows)
    return taken


class _UnitRms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide(x))
        scale = (norm.square_().div_(x.shape[-1]).add_(eps)).rsqrt_().to(x.dtype)
        normed: Tensor = x * scale
        ctx.save_for_backward(normed, scale)
        return normed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        normed, scale = ctx.saved_tensors
        grad = grads[0]
        along = (grad * normed).mean(-1, keepdim=True)
        return torch.addcmul(grad, normed, along, value=-1).mul_(scale), None


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turn(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grads[0], cos, -sin), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    swapped = torch.cat([x[..., half:], x[..., :half]], -1)
    return swapped.mul_(sin).addcmul_(x, cos)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        silu = F.silu(gate)
        ctx.save_for_backward(gate_up, silu)
        return silu * up

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        gate_up, silu = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        out = torch.empty_like(gate_up)
        grad_gate, grad_up = out.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(grads[0] * up, gate, grad_input=grad_gate)
        torch.mul(silu, grads[0], out=grad_up)
        return out


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.total = len(x)
        taken: Tensor = x.index_select(0, rows)
        return taken

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        grad = grads[0].new_zeros(ctx.total, *grads[0].shape[1:])
        _in_words(grad)[rows] = _in_words(grads[0].contiguous())
        return grad, None


def _in_words(rows: Tensor) -> Tensor:
    """The same memory in numbers of 8 bytes, where rows have whole ones: fewer to copy."""
    rows = rows.flatten(1)
    whole = rows.shape[1] * rows.element_size() % 8 == 0
    return rows.view(torch.int64) if whole else rows
