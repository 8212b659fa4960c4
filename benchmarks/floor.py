"""The matrix products of a step and nothing else: what a perfect implementation could not beat.

Counted for B rollouts of T tokens, S = T - 1 slots each, forward and both gradients unless said
otherwise:

- once: ``fc`` [B S, 3H] x [3H, H], without the gradient of its frozen input, and the policy's head
  [rows, H] x [H, V], forward alone, for the B (T - 2) rows that are drafted;
- at each depth: q, k and v as one product [B S, 2H] x [2H, 3H] (fewer with grouped queries), o,
  gate and up as one [B S, H] x [H, 8H], down, and the draft head [rows, H] x [H, V or Vd];
- at each depth, per rollout and head: scores and their product with the values, and the four
  gradients of these, over tiles of 256 queries with the keys up to the tile's end.

Products write into buffers made beforehand, the heads' in chunks of rows, and what attention needs
comes from memory that was freed before: nothing is normalised, masked, rotated or summed up.
Softmax, loss and optimizer are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peers import Contender, Variant
from benchmarks.workload import DEVICE, LAYER_IDS, Cell, Workload, policy_config
from drafttrain.training.devices import keep_freed_memory

QUERY_TILE = 256
HEAD_CHUNK = 512


@dataclass
class Linear:
    """One weight's products: y = x w, then dx = dy w^T and dw = x^T dy."""

    x: Tensor
    w: Tensor
    y: Tensor
    backward_input: bool = True
    backward_weight: bool = True

    @classmethod
    def of(cls, rows: int, inputs: int, outputs: int, dtype: torch.dtype, **parts: bool) -> Linear:
        w = torch.randn(outputs, inputs, dtype=dtype).T
        return cls(torch.randn(rows, inputs, dtype=dtype), w, w.new_zeros(rows, outputs), **parts)

    def __post_init__(self) -> None:
        self.dx = torch.zeros_like(self.x)
        self.dw = torch.zeros_like(self.w.T)

    def run(self) -> None:
        torch.mm(self.x, self.w, out=self.y)
        if self.backward_input:
            torch.mm(self.y, self.w.T, out=self.dx)
        if self.backward_weight:
            torch.mm(self.y.T, self.x, out=self.dw)


class Attention:
    """The six batched products of causal attention within rollouts."""

    def __init__(self, batch: int, slots: int, head_dim: int, dtype: torch.dtype) -> None:
        self.q, self.k, self.v, self.dq, self.dk, self.dv = (
            torch.randn(batch, slots, head_dim, dtype=dtype) for _ in range(6)
        )

    def run(self) -> None:
        for start in range(0, self.q.shape[1], QUERY_TILE):
            rows = slice(start, start + QUERY_TILE)
            k, v = self.k[:, : rows.stop], self.v[:, : rows.stop]
            weights = self.q[:, rows] @ k.mT
            self.dq[:, rows] = weights @ v  # the output, then dP, dV, dQ and dK
            gradient = self.dq[:, rows] @ v.mT
            self.dv[:, : rows.stop] = weights.mT @ self.dq[:, rows]
            self.dq[:, rows] = gradient @ k
            self.dk[:, : rows.stop] = gradient.mT @ self.q[:, rows]


class Products:
    """The products of a step of `cell`, on torch's default device."""

    def __init__(self, cell: Cell, dtype: torch.dtype) -> None:
        config = policy_config(cell)
        hidden, middle = cell.hidden, config.intermediate_size
        heads, key_value_heads = config.num_attention_heads, config.num_key_value_heads
        slots = cell.rollout_length - 1
        rows, drafted = cell.rollouts * slots, cell.rollouts * (slots - 1)
        self.ttt, self.chunks = cell.ttt, -(-drafted // HEAD_CHUNK)
        chunk = drafted // self.chunks
        self.fc = Linear.of(rows, len(LAYER_IDS) * hidden, hidden, dtype, backward_input=False)
        self.layer = [
            Linear.of(rows, 2 * hidden, (heads + 2 * key_value_heads) * cell.head_dim, dtype),
            Linear.of(rows, hidden, hidden, dtype),
            Linear.of(rows, hidden, 2 * middle, dtype),
            Linear.of(rows, middle, hidden, dtype),
        ]
        self.attention = Attention(cell.rollouts * heads, slots, cell.head_dim, dtype)
        self.policy_head = Linear.of(
            chunk, hidden, cell.vocab, dtype, backward_input=False, backward_weight=False
        )
        self.draft_head = Linear.of(chunk, hidden, cell.draft_vocab or cell.vocab, dtype)

    def run(self) -> None:
        self.fc.run()
        for _ in range(self.chunks):
            self.policy_head.run()
        for _ in range(self.ttt):
            for product in self.layer:
                product.run()
            self.attention.run()
            for _ in range(self.chunks):
                self.draft_head.run()


class Floor(Contender):
    def __init__(self, workload: Workload, variant: Variant) -> None:
        keep_freed_memory()
        with DEVICE:
            self.products = Products(workload.cell, getattr(torch, variant.precision))

    def step(self) -> None:
        self.products.run()


def operations(cell: Cell) -> int:
    """Floating point operations of one step's products, attention's whole tiles included."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        Products(cell, torch.bfloat16).run()
    return int(counter.get_total_flops())


CONTENDER = Floor
