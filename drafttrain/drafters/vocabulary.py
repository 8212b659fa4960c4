"""A draft vocabulary: the tokens a drafter can draft at all, chosen from rollouts.

A smaller output head is the largest saving there is in a small drafter. Tokens outside it are never
drafted; the policy still samples them, and the round then ends there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.errors import RolloutError
from drafttrain.rollouts.record import Rollout
from drafttrain.rollouts.sources import SavedRollout


@dataclass(frozen=True)
class DraftVocabulary:
    """Attributes:
    ids: int64 [Vd], target ids, ascending.
    coverage: share of the sampled tokens it was chosen from that it holds: an upper bound on what
        can be accepted.
    """

    ids: Tensor
    coverage: float


def choose_vocabulary(
    rollouts: Iterable[Rollout | SavedRollout], vocab_size: int, size: int
) -> DraftVocabulary:
    """The `size` tokens sampled most often; of those never sampled, the lowest ids fill it up.

    Only sampled tokens count: nobody drafts prompts, or what a tool or environment said.

    Raises:
        RolloutError: no rollouts, a token the policy does not have, or `size` is not from 1 to
            `vocab_size`.
    """
    if not 1 <= size <= vocab_size:
        problem = f"{size}, expected 1 to the policy's {vocab_size}"
        raise RolloutError("rollouts", "draft vocabulary", problem)
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for rollout in rollouts:
        sampled = rollout.tokens[rollout.sampled_runs > 0].long()
        if len(sampled) and int(sampled.max()) >= vocab_size:
            problem = f"{int(sampled.max())}, but the policy's vocabulary ends at {vocab_size - 1}"
            raise RolloutError(rollout.rollout_id, "tokens", problem)
        counts += torch.bincount(sampled, minlength=vocab_size)
    if not counts.any():
        raise RolloutError("rollouts", "draft vocabulary", "there are no sampled tokens to choose")
    ids = counts.sort(descending=True, stable=True).indices[:size].sort().values
    return DraftVocabulary(ids, float(counts[ids].sum() / counts.sum()))
