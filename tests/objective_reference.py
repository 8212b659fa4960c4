"""The objectives' definitions, one position at a time; what all faster forms are held against."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drafttrain.training.objectives import ObjectiveName


def by_definition(name: ObjectiveName, p: Tensor, q: Tensor, beyond: Tensor) -> Tensor:
    """One row, straight from the formula; `beyond` is p's mass where q has none: []."""
    middle = (p + q) / 2
    return {
        "soft_cross_entropy": lambda: -(p * q.log()).sum(),
        "kl": lambda: (p * (p / q).log()).sum(),
        "reverse_kl": lambda: (q * (q / p).log()).sum(),
        "jsd": lambda: (
            ((p * (p / middle).log()).sum() + beyond * math.log(2)) / 2
            + (q * (q / middle).log()).sum() / 2
        ),
        "tv": lambda: ((p - q).abs().sum() + beyond) / 2,
        "lk": lambda: -torch.minimum(p, q).sum().log(),
        "hard_cross_entropy": lambda: -q[p.argmax()].log(),
    }[name]()
