"""Routed experts: one tensor each in checkpoints, stacked in transformers' modules."""

from __future__ import annotations

import re

import torch
from torch import Tensor

_ONE = re.compile(r"(?P<stem>.*mlp\.experts\.)(?P<index>\d+)\.(?P<part>gate|up|down)_proj\.weight")


def fuse_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stack ``experts.<i>.{gate,up,down}_proj.weight``; tensors stacked already stay as they are.

    Returns:
        ``experts.gate_up_proj`` [E, 2I, H] and ``experts.down_proj`` [E, H, I] in their place.
    """
    fused, parts = {}, {}
    for name, tensor in tensors.items():
        match = _ONE.fullmatch(name)
        if match is None:
            fused[name] = tensor
        else:
            parts[match["stem"], int(match["index"]), match["part"]] = tensor
    for stem in {stem for stem, _, _ in parts}:
        experts = range(1 + max(index for name, index, _ in parts if name == stem))
        gates = [torch.cat([parts[stem, i, "gate"], parts[stem, i, "up"]]) for i in experts]
        fused[f"{stem}gate_up_proj"] = torch.stack(gates)
        fused[f"{stem}down_proj"] = torch.stack([parts[stem, i, "down"] for i in experts])
    return fused


def split_experts(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`fuse_experts`."""
    split = {}
    for name, tensor in tensors.items():
        if name.endswith("mlp.experts.gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            for index, both in enumerate(tensor):
                gate, up = both.chunk(2)
                split[f"{stem}{index}.gate_proj.weight"] = gate
                split[f"{stem}{index}.up_proj.weight"] = up
        elif name.endswith("mlp.experts.down_proj"):
            stem = name.removesuffix("down_proj")
            split |= {f"{stem}{i}.down_proj.weight": down for i, down in enumerate(tensor)}
        else:
            split[name] = tensor
    return split
