"""Tensor-parallel ranks that do a thing together, or not at all."""

from __future__ import annotations

import torch
from vllm.distributed.parallel_state import get_tp_group


def all_agree(willing: bool, sha: str = "") -> bool:
    """Whether every tensor-parallel rank is willing, and with the same hash.

    A collective: every rank of the group calls it at the same point, whatever happened to it.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return willing
    number = int(sha[:15] or "0", 16)  # 60 bits of it
    least = torch.tensor([int(willing), number, -number])
    torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(least[0] == 1 and least[1] == -least[2])
