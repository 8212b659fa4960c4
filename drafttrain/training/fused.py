"""What the loss wants of an objective, in few passes over memory.

Each pass over float32 numbers in a processor's cache costs about as much as another, but for the
exponential: on a CPU torch's is MKL's, which takes several times as long as ``exp2``. So softmax is
by powers of two, once for each side, and what else is needed comes of its parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.config import ObjectiveName
from drafttrain.training.objectives import OBJECTIVES

_LN2 = math.log(2.0)
# Below it sum(min(p, q)) is too inexact in float32 to divide by.
_LEAST_OVERLAP = 1e-30


@dataclass(frozen=True)
class Softmax:
    """Probabilities of rows of logits, and their logarithms in parts.

    Attributes:
        probs: [..., V].
        powers: [..., V], of two: the logits over ln 2, less the row's largest.
        log_sum: [..., 1], binary logarithm of the sum of two to the `powers`.
    """

    probs: Tensor
    powers: Tensor
    log_sum: Tensor

    @classmethod
    def of(cls, logits: Tensor, dtype: torch.dtype) -> Softmax:
        """Of `logits` [..., V], worked out in `dtype`."""
        powers = logits.to(dtype, copy=True)
        largest = powers.amax(-1, keepdim=True)
        torch.add(largest.div_(-_LN2), powers, alpha=1.0 / _LN2, out=powers)
        probs = powers.exp2()
        total = probs.sum(-1, keepdim=True)
        return cls(probs.div_(total), powers, total.log2_())

    def of_tokens(self, ids: Tensor) -> Softmax:
        """Its columns `ids`, int64 [Vd], which add up to one at most."""
        return Softmax(self.probs[..., ids], self.powers[..., ids], self.log_sum)

    def log_probs(self) -> Tensor:
        """Natural logarithms, finite where the probabilities are zero: [..., V]."""
        return (self.powers - self.log_sum).mul_(_LN2)


Values = Callable[[Softmax, Softmax], tuple[Tensor, Tensor, Tensor]]
"""The policy's p [n, V] and the draft's q [D, n, V], whose tensors may be overwritten, to the value
and sum(min(p, q)), [D, n] each, and the value's gradient by the draft's logits, [D, n, V]."""


def values_of(name: ObjectiveName) -> Values:
    """An objective as the loss wants it."""
    if name in _FUSED:
        return _FUSED[name]
    objective = OBJECTIVES[name]

    def values(p: Softmax, q: Softmax) -> tuple[Tensor, Tensor, Tensor]:
        log_p, log_q = p.log_probs(), q.log_probs()
        overlap = torch.minimum(p.probs, q.probs).sum(-1)
        return objective.value(log_p, log_q), overlap, objective.gradient(log_p, log_q)

    return values


def _soft_cross_entropy(p: Softmax, q: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    mass = p.probs.sum(-1, keepdim=True)
    value = (mass * q.log_sum)[..., 0].sub_(q.powers.mul_(p.probs).sum(-1)).mul_(_LN2)
    overlap = torch.minimum(p.probs, q.probs, out=q.powers).sum(-1)
    return value, overlap, q.probs.mul_(mass).sub_(p.probs)


def _tv(p: Softmax, q: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    scarce = _less(q.probs, p.probs).mul_(q.probs)
    overlap = torch.minimum(p.probs, q.probs).sum(-1)
    return 1.0 - overlap, overlap, q.probs.mul_(scarce.sum(-1, keepdim=True)).sub_(scarce)


def _lk(p: Softmax, q: Softmax) -> tuple[Tensor, Tensor, Tensor]:
    _, overlap, slope = _tv(p, q)
    if bool((overlap > _LEAST_OVERLAP).all()):
        return -overlap.log(), overlap, slope.div_(overlap[..., None])
    # In log space: finite, with a useful gradient, where p and q share no mass in float32.
    far, log_p, log_q = OBJECTIVES["lk"], p.log_probs(), q.log_probs()
    return far.value(log_p, log_q), overlap, far.gradient(log_p, log_q)


def _less(a: Tensor, b: Tensor) -> Tensor:
    """1 where a < b, else 0, in a's dtype: masks of bool are slow on a CPU."""
    return torch.lt(a, b, out=torch.empty_like(a))


# The objectives that are trained with most.
_FUSED: dict[ObjectiveName, Values] = {
    "soft_cross_entropy": _soft_cross_entropy,
    "tv": _tv,
    "lk": _lk,
}
