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

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from drafttrain.drafters.batch import Batch, make_batch, split_by_tokens
from drafttrain.drafters.contract import Drafter
from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout

DraftSampleMethod = Literal["greedy", "probabilistic"]

# Rollout tokens evaluated at once, and logits that exist at once.
_TOKENS_AT_ONCE = 4096
_LOGITS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class AcceptanceEstimate:
    """Expected speculation on a set of rollouts, one entry per rollout so that it can be paired.

    Attributes:
        groups: prompt group of each rollout.
        rounds: float64 [R], expected number of counted rounds.
        accepted: float64 [R, k], expected drafts accepted at each position.
        domains: domain of each rollout, None where it is not known.
    """

    groups: list[str]
    rounds: Tensor
    accepted: Tensor
    domains: list[str | None] = field(default_factory=list)

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
            [domain for part in parts for domain in part.domains],
        )

    def divided(self, by: Sequence[str | None]) -> dict[str, AcceptanceEstimate]:
        """The same estimate by the name that `by` gives each rollout, without those of None."""
        rows: dict[str, list[int]] = {}
        for row, name in enumerate(by):
            if name is not None:
                rows.setdefault(name, []).append(row)
        return {name: self._select(rows[name]) for name in sorted(rows)}

    def _select(self, rows: list[int]) -> AcceptanceEstimate:
        groups = [self.groups[row] for row in rows]
        return AcceptanceEstimate(groups, self.rounds[rows], self.accepted[rows])

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
    heads: Mapping[int, PolicyHead],
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
    domains: list[str | None] = []
    rounds, accepted = [], []
    for version in sorted({rollout.policy_version for rollout in rollouts}):
        same_policy = [rollout for rollout in rollouts if rollout.policy_version == version]
        head = heads[version]
        for part in split_by_tokens(same_policy, _TOKENS_AT_ONCE):
            batch = make_batch(part, layout, head)
            w = acceptance_weights(drafter, batch, head, k, method)
            part_rounds, part_accepted = replay_rounds(w, batch)
            groups += [rollout.group for rollout in part]
            domains += [rollout.domain for rollout in part]
            rounds.append(part_rounds)
            accepted.append(part_accepted)
    return AcceptanceEstimate(groups, torch.cat(rounds), torch.cat(accepted), domains)


def acceptance_weights(
    drafter: Drafter, batch: Batch, head: PolicyHead, k: int, method: DraftSampleMethod
) -> Tensor:
    """w of the module docstring: float64 [k, R], for every round that could start in `batch`.

    Entries whose drafted token lies outside the rollout are zero.
    """
    device = drafter.device
    batch, policy_head = batch.to(device), head.lm_head.to(device)
    hidden = drafter.unroll(batch, head.embed_tokens, k)
    draft_head = drafter.head_weight(policy_head)
    draft_rows = _rows_of_tokens(drafter.draft_ids, policy_head)
    temperature = batch.temperatures[batch.rollout_of]
    left = (batch.lengths[batch.rollout_of] - batch.positions)[batch.rounds]
    depths = torch.arange(k, device=device)[:, None]
    inside = left > 2 + depths  # [k, R]
    row = batch.rounds + 1 + depths  # of the policy; it predicts the drafted token
    w = hidden.new_zeros(inside.shape, dtype=torch.float64)
    if method == "probabilistic":
        # A row is drafted at several depths, but the policy's product is the largest there is.
        drafted = row[inside].unique()
        p = w.new_zeros(len(batch.tokens))
        p[drafted] = _log_probs(
            batch.last_hidden[drafted], policy_head, batch.tokens[drafted + 1], temperature[drafted]
        ).double()
    for depth in range(k):
        here, at = inside[depth], row[depth, inside[depth]]
        drafting, tokens = hidden[depth, here], draft_rows[batch.tokens[at + 1]]
        if method == "greedy":
            w[depth, here] = (_most_likely(drafting, draft_head) == tokens).double()
        else:
            q = _log_probs(drafting, draft_head, tokens, temperature[at])
            w[depth, here] = (q - p[at]).exp().clamp_max(1.0)
    return w.cpu()


def _rows_of_tokens(draft_ids: Tensor | None, policy_head: Tensor) -> Tensor:
    """int64 [V]: row of the draft head for each token; -1 for those that cannot be drafted."""
    everything = torch.arange(len(policy_head), device=policy_head.device)
    if draft_ids is None:
        return everything
    rows = torch.full_like(everything, -1)
    rows[draft_ids] = everything[: len(draft_ids)]
    return rows


def _log_probs(hidden: Tensor, lm_head: Tensor, tokens: Tensor, temperature: Tensor) -> Tensor:
    """Those of `tokens`, [N], in ``softmax(lm_head hidden / temperature)``.

    Args:
        hidden, lm_head: [N, H] and [V, H].
        tokens: int64 [N]; -1 has probability 0.
        temperature: [N].
    """
    found = []
    for part, logits in _logits(hidden, lm_head):
        logits /= temperature[part, None]
        chosen = logits.gather(-1, tokens[part, None].clamp_min(0))[:, 0]
        log_prob = chosen - logits.logsumexp(-1)
        found.append(log_prob.masked_fill(tokens[part] < 0, float("-inf")))
    return torch.cat(found)


def _most_likely(hidden: Tensor, lm_head: Tensor) -> Tensor:
    """int64 [N]: the largest of ``lm_head hidden``."""
    return torch.cat([logits.argmax(-1) for _, logits in _logits(hidden, lm_head)])


def _logits(hidden: Tensor, lm_head: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``lm_head hidden``, in float32 at least, of some rows at a time."""
    weight = lm_head.to(torch.promote_types(lm_head.dtype, torch.float32))
    size = max(1, _LOGITS_AT_ONCE // len(weight))
    for start in range(0, len(hidden), size):
        part = slice(start, start + size)
        yield part, hidden[part].to(weight.dtype) @ weight.T


def replay_rounds(w: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Expected rounds and accepted drafts of each rollout.

    Args:
        w: float64 [k, R] from :func:`acceptance_weights`.

    Returns:
        rounds float64 [B]; accepted float64 [B, k].
    """
    k, rollouts, length = len(w), len(batch.lengths), int(batch.lengths.max())
    at_token = w.new_zeros(k, rollouts, length)
    # The slot s serves the round that starts after token s + 1.
    at_token[:, batch.rollout_of[batch.rounds], batch.positions[batch.rounds] + 1] = w
    w = at_token
    runs = torch.zeros(length + k + 1, rollouts, dtype=torch.int64)
    runs[batch.positions, batch.rollout_of] = batch.runs
    # survive[a] = w_1 ... w_a; the round accepts at least a drafts.
    survive = torch.cat([torch.ones_like(w[:1]), w.cumprod(0)])
    exactly = survive.clone()
    exactly[:-1] -= survive[1:]
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
