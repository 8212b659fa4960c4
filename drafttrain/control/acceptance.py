"""Acceptance on recorded rollouts: the engine replayed exactly, without simulation.

A recorded rollout is a sample of the policy, so what the engine *would* have accepted while it
produced these very tokens is known in distribution. Given the recorded token x at some depth, its
draft was accepted with probability::

    w = min(1, q(x) / p(x))      probabilistic drafts
    w = 1 if x == argmax q       greedy drafts, else 0

A round that starts after token t accepts exactly a drafts with probability
``w_1 ... w_a (1 - w_{a+1})``, all k with ``w_1 ... w_k``, and the next round starts at
``t + a + 1``. One forward pass over the expected number of rounds v(t) that start at each t gives
acceptance length and acceptance by position, unbiased. (The product of per-position averages is
biased: rounds do not start uniformly over positions.)

Only rounds whose k drafts all lie inside the rollout are counted; the engine's counters include the
few that run past its end.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from drafttrain.drafters.batch import Batch, length_buckets, make_batch
from drafttrain.drafters.contract import Drafter
from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout

DraftSampleMethod = Literal["greedy", "probabilistic"]

# Padded tokens evaluated at once; bounds the [k, tokens, V] draft logits.
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class AcceptanceEstimate:
    """Expected speculation on a set of rollouts, one entry per rollout so that it can be paired.

    Attributes:
        groups: prompt group of each rollout.
        rounds: float64 [R], expected number of counted rounds.
        accepted: float64 [R, k], expected drafts accepted at each position.
    """

    groups: list[str]
    rounds: Tensor
    accepted: Tensor

    @property
    def acceptance_length(self) -> float:
        """Expected tokens per round, the policy's own included."""
        return float(1.0 + self.accepted.sum() / self.rounds.sum())

    @property
    def accepted_per_position(self) -> list[float]:
        """Probability that the draft at each position is accepted; length k."""
        return [float(x) for x in self.accepted.sum(0) / self.rounds.sum()]

    def by_group(self) -> tuple[Tensor, Tensor]:
        """Accepted drafts and rounds summed within prompt groups, in sorted order: [G] each."""
        names = sorted(set(self.groups))
        index = torch.tensor([names.index(group) for group in self.groups])
        zeros = torch.zeros(len(names), dtype=torch.float64)
        return (
            zeros.index_add(0, index, self.accepted.sum(1)),
            zeros.index_add(0, index, self.rounds),
        )

    @classmethod
    def together(cls, parts: Sequence[AcceptanceEstimate]) -> AcceptanceEstimate:
        """Estimates of one drafter on different rollouts, as one."""
        return cls(
            [group for part in parts for group in part.groups],
            torch.cat([part.rounds for part in parts]),
            torch.cat([part.accepted for part in parts]),
        )

    def select(self, groups: Set[str]) -> AcceptanceEstimate:
        """The same estimate on the rollouts of some prompt groups alone."""
        rows = [row for row, group in enumerate(self.groups) if group in groups]
        names = [self.groups[row] for row in rows]
        return AcceptanceEstimate(names, self.rounds[rows], self.accepted[rows])

    def interval(self, level: float = 0.9, seed: int = 0) -> tuple[float, float]:
        """Bootstrap confidence interval of the acceptance length, over prompt groups."""
        accepted, rounds = self.by_group()
        picks = bootstrap_picks(len(rounds), seed)
        lengths = 1.0 + accepted[picks].sum(1) / rounds[picks].sum(1)
        tail = (1.0 - level) / 2
        low, high = torch.quantile(lengths, torch.tensor([tail, 1 - tail], dtype=torch.float64))
        return float(low), float(high)


def bootstrap_picks(groups: int, seed: int, samples: int = 1000) -> Tensor:
    """Indices of `samples` resamples of `groups` prompt groups: int64 [samples, groups]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(groups, (samples, groups), generator=generator)


def usable(rollout: Rollout, k: int) -> bool:
    """Whether a rollout can be replayed: every row captured, and one full round fits in it."""
    complete = bool(rollout.captured[: rollout.length - 1].all())
    return complete and int(rollout.sampled_runs.max()) > k + 1


@torch.no_grad()
def estimate_acceptance(
    drafter: Drafter,
    rollouts: Sequence[Rollout],
    layout: FeatureLayout,
    heads: dict[int, PolicyHead],
    *,
    k: int,
    method: DraftSampleMethod = "probabilistic",
) -> AcceptanceEstimate:
    """Replay the engine's speculation on `rollouts` with `drafter`.

    Args:
        drafter: evaluated as it is; its parameters are not touched.
        rollouts: those that cannot be replayed (see :func:`usable`) are passed over.
        heads: the policy's head for every policy version among them.
        k: number of draft tokens.
        method: how the engine drafts.

    Raises:
        RolloutError: their aux layers are not the drafter's.
        ValueError: no rollout can be replayed.
    """
    drafter.check_layout(layout)
    rollouts = [rollout for rollout in rollouts if usable(rollout, k)]
    if not rollouts:
        raise ValueError("no rollout is complete enough to be replayed")
    groups: list[str] = []
    rounds, accepted = [], []
    for version in sorted({rollout.policy_version for rollout in rollouts}):
        same_policy = [rollout for rollout in rollouts if rollout.policy_version == version]
        for bucket in length_buckets(same_policy, _TOKENS_AT_ONCE):
            batch = make_batch(bucket, layout, heads[version])
            w = acceptance_weights(drafter, batch, heads[version], k, method)
            bucket_rounds, bucket_accepted = replay_rounds(w, batch)
            groups += [rollout.group for rollout in bucket]
            rounds.append(bucket_rounds)
            accepted.append(bucket_accepted)
    return AcceptanceEstimate(groups, torch.cat(rounds), torch.cat(accepted))


def acceptance_weights(
    drafter: Drafter, batch: Batch, head: PolicyHead, k: int, method: DraftSampleMethod
) -> Tensor:
    """w of the module docstring: float64 [k, B, T]; entry [j, b, t] is the round after token t.

    Entries whose drafted token lies outside the rollout are zero.
    """
    length = batch.tokens.shape[1]
    device = next(drafter.parameters()).device
    batch = batch.to(device)
    hidden = drafter.unroll(batch, head.embed_tokens.to(device).float(), k)
    temperature = batch.temperatures[:, None, None]
    policy_logits = batch.last_hidden @ head.lm_head.to(device).float().T / temperature
    log_p = _recorded(F.log_softmax(policy_logits[:, :-1], -1), batch.tokens[:, 1:])
    w = torch.zeros(k, *batch.tokens.shape, dtype=torch.float64)
    for depth in range(k):
        drafted = length - 2 - depth  # slots whose drafted token exists
        if drafted <= 0:
            break
        tokens = batch.tokens[:, 2 + depth :]
        logits = drafter.lm_head(hidden[depth, :, :drafted])
        if method == "greedy":
            value = (logits.argmax(-1) == tokens).double()
        else:
            log_q = _recorded(F.log_softmax(logits / temperature, -1), tokens)
            value = (log_q - log_p[:, 1 + depth :]).double().exp().clamp_max(1.0)
        # Slot s serves the round that starts after token s + 1.
        w[depth, :, 1 : 1 + drafted] = value
    return w


def _recorded(log_probs: Tensor, tokens: Tensor) -> Tensor:
    return log_probs.gather(-1, tokens[..., None])[..., 0]


def replay_rounds(w: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Expected rounds and accepted drafts of each rollout.

    Args:
        w: float64 [k, B, T] from :func:`acceptance_weights`.

    Returns:
        rounds float64 [B]; accepted float64 [B, k].
    """
    k, rollouts, length = w.shape
    # survive[a] = w_1 ... w_a; the round accepts at least a drafts.
    survive = torch.cat([torch.ones_like(w[:1]), w.cumprod(0)])
    exactly = survive.clone()
    exactly[:-1] -= survive[1:]
    runs = F.pad(batch.runs, (0, k + 1)).T
    # The first sampled token of a run comes from the prefill, so drafting starts right after it.
    starts = (runs == 1).double()
    rounds = torch.zeros(rollouts, dtype=torch.float64)
    accepted = torch.zeros(rollouts, k, dtype=torch.float64)
    for t in range(int(batch.prompt_lengths.min()), length):
        here = starts[t]
        for drafts in range(k + 1):
            same_run = runs[t + drafts + 1] == runs[t] + drafts + 1
            starts[t + drafts + 1] += here * exactly[drafts, :, t] * same_run
        counted = here * (runs[t + k] == runs[t] + k)
        rounds += counted
        accepted += (counted * survive[1:, :, t]).T
    return rounds, accepted
