"""What a drafter is trained to do at one draft position, with gradients in closed form.

For the policy's distribution p and the draft's q = softmax(z) there:

==================  ============================  ==============================================
objective           value                         fits
==================  ============================  ==============================================
soft_cross_entropy  -sum(p log q)                 the default: fast from a cold start
kl                  sum(p log(p / q))             the same gradient; its value says how far to go
reverse_kl          sum(q log(q / p))             seeks a mode of p rather than its whole mass
jsd                 (KL(p, m) + KL(q, m)) / 2     between the two; m = (p + q) / 2; bounded
tv                  1 - sum(min(p, q))            probabilistic drafts: 1 - the acceptance rate
lk                  -log sum(min(p, q))           the same rate's log-likelihood: its gradient
                                                  does not vanish where the drafter is far off
hard_cross_entropy  -log q(argmax p)              a policy that is sampled at temperature 0
==================  ============================  ==============================================

A draft is accepted with probability sum(min(p, q)) under probabilistic drafting (Leviathan et al.,
arXiv 2211.17192), with p(argmax q) under greedy drafting.

Both arguments are log-probabilities [..., V], at the rollout's temperature; those of the policy may
lack leading dimensions that the draft's have. Over a draft vocabulary
they are those of its tokens: log q is normalised over them, log p over the policy's whole
vocabulary, so that p sums to less than one; what q cannot reach stays part of the value.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.config import ObjectiveName

Rows = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Objective:
    """An objective and its derivative; both take log p and log q, [..., V].

    Attributes:
        value: [...].
        gradient: [..., V], of the value by the logits z behind log q = log_softmax(z).
    """

    value: Rows
    gradient: Rows


def _through_softmax(log_q: Tensor, by_q: Tensor) -> Tensor:
    """Gradient by the logits, from that by q."""
    q = log_q.exp()
    return q * (by_q - (q * by_q).sum(-1, keepdim=True))


def _soft_cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    return -(log_p.exp() * log_q).sum(-1)


def _soft_cross_entropy_gradient(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return log_q.exp() * p.sum(-1, keepdim=True) - p


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def _reverse_kl_gradient(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _through_softmax(log_q, log_q - log_p)


def _log_middle(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.logaddexp(log_p, log_q) - math.log(2)


def _jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    middle = _log_middle(log_p, log_q)
    p = log_p.exp()
    shared = p * (log_p - middle) + log_q.exp() * (log_q - middle)
    beyond = (1.0 - p.sum(-1)) * math.log(2)  # of tokens that only p has, m is half of p
    return 0.5 * (shared.sum(-1) + beyond)


def _jsd_gradient(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _through_softmax(log_q, 0.5 * (log_q - _log_middle(log_p, log_q)))


def _tv(log_p: Tensor, log_q: Tensor) -> Tensor:
    return 1.0 - torch.minimum(log_p, log_q).exp().sum(-1)


def _tv_gradient(log_p: Tensor, log_q: Tensor) -> Tensor:
    return _through_softmax(log_q, -(log_q < log_p).to(log_q.dtype))


def _lk(log_p: Tensor, log_q: Tensor) -> Tensor:
    return -torch.minimum(log_p, log_q).logsumexp(-1)


def _lk_gradient(log_p: Tensor, log_q: Tensor) -> Tensor:
    # In log space: finite, and useful, where p and q share no mass in float32.
    share = torch.minimum(log_p, log_q).softmax(-1) * (log_q < log_p)
    return log_q.exp() * share.sum(-1, keepdim=True) - share


def _first(log_p: Tensor, log_q: Tensor) -> Tensor:
    """The policy's most likely token, for each row of q: int64 [..., 1]."""
    return log_p.argmax(-1, keepdim=True).expand(*log_q.shape[:-1], 1)


def _hard_cross_entropy(log_p: Tensor, log_q: Tensor) -> Tensor:
    return -log_q.gather(-1, _first(log_p, log_q))[..., 0]


def _hard_cross_entropy_gradient(log_p: Tensor, log_q: Tensor) -> Tensor:
    first = _first(log_p, log_q)
    return log_q.exp().scatter_add(-1, first, -torch.ones_like(first, dtype=log_q.dtype))


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "soft_cross_entropy": Objective(_soft_cross_entropy, _soft_cross_entropy_gradient),
    "kl": Objective(_kl, _soft_cross_entropy_gradient),
    "reverse_kl": Objective(_reverse_kl, _reverse_kl_gradient),
    "jsd": Objective(_jsd, _jsd_gradient),
    "tv": Objective(_tv, _tv_gradient),
    "lk": Objective(_lk, _lk_gradient),
    "hard_cross_entropy": Objective(_hard_cross_entropy, _hard_cross_entropy_gradient),
}
