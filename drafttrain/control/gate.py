"""The gate: a candidate replaces the serving drafter only when held-out rollouts say so."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from drafttrain.control.acceptance import AcceptanceEstimate, bootstrap_picks


@dataclass(frozen=True)
class Verdict:
    """What the gate found.

    Attributes:
        publish: whether the candidate should serve.
        gain: candidate's acceptance length minus the serving drafter's.
        interval: confidence interval of the gain.
        candidate, serving: their acceptance lengths on the same rollouts.
    """

    publish: bool
    gain: float
    interval: tuple[float, float]
    candidate: float
    serving: float


def judge(
    candidate: AcceptanceEstimate,
    serving: AcceptanceEstimate,
    *,
    margin: float,
    level: float = 0.9,
    seed: int = 0,
) -> Verdict:
    """Compare two drafters on the same rollouts, paired by prompt group.

    Prompt groups are resampled together for both (bootstrap), because rollouts of one prompt are
    alike. The candidate passes when the interval's lower end exceeds `margin`.

    Raises:
        ValueError: the estimates are of different rollouts.
    """
    if candidate.groups != serving.groups:
        raise ValueError("candidate and serving drafter were estimated on different rollouts")
    candidate_accepted, candidate_rounds = candidate.by_group()
    serving_accepted, serving_rounds = serving.by_group()
    picks = bootstrap_picks(len(candidate_rounds), seed)
    gains = candidate_accepted[picks].sum(1) / candidate_rounds[picks].sum(1) - serving_accepted[
        picks
    ].sum(1) / serving_rounds[picks].sum(1)
    tail = (1.0 - level) / 2
    low, high = torch.quantile(gains, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Verdict(
        publish=low > margin,
        gain=candidate.acceptance_length - serving.acceptance_length,
        interval=(low, high),
        candidate=candidate.acceptance_length,
        serving=serving.acceptance_length,
    )
