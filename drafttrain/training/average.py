"""The moving average of a drafter's weights: what is offered for publishing."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from drafttrain.drafters.contract import Drafter


class WeightAverage(nn.Module):
    """Exponential, and the weights themselves after the first update.

    Weights are paired by name. torch's ``AveragedModel``, whose state has the same names, pairs
    weights and buffers by their order, which a forward may change: rotary embeddings put other
    frequencies in place of theirs, low-rank additions put what they add to last.

    Attributes:
        module: the averaged drafter.
    """

    n_averaged: torch.Tensor

    def __init__(self, drafter: Drafter, decay: float) -> None:
        super().__init__()
        self.module = copy.deepcopy(drafter)
        self.register_buffer("n_averaged", torch.tensor(0))
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self, drafter: Drafter) -> None:
        own, given = dict(self.module.named_parameters()), dict(drafter.named_parameters())
        averaged, weights = [own[name] for name in given], list(given.values())
        if self.n_averaged == 0:
            for ours, theirs in zip(averaged, weights, strict=True):
                ours.copy_(theirs)
        else:
            self._average(averaged, weights, self.n_averaged)
        self.n_averaged += 1
