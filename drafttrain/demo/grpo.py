"""GRPO on the small policy: one on-policy update for each batch of rollouts.

The advantage of a rollout is its reward against those of its prompt group, in units of the group's
standard deviation; groups whose rollouts all got the same teach nothing and cost no backward pass.
Every batch is used once, straight after it was sampled, so PPO's ratio is 1 and its clip would
never act: what remains is the policy gradient.

Rollouts come from outside as token ids; this file owns the policy's weights, the optimizer, and a
frozen copy of the start policy, against which the drift is measured (it is no part of the loss).
"""

from __future__ import annotations

import copy
import statistics
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaForCausalLM

from drafttrain.demo.forward import policy_logits


@dataclass(frozen=True)
class GrpoConfig:
    """How far and how fast.

    Attributes:
        steps: planned updates; the learning rate falls linearly over the last `decay_fraction`.
        epsilon: AdamW's. Far above the second moments of a single noisy batch, so that the few
            weights with a clear gradient move and the many with a noisy one hardly do: with the
            usual 1e-8 a batch with one right answer in a hundred moves every weight alike.
        gradient_clip: norm.
        length_scale: tokens of a typical rollout; the loss is the sum over tokens divided by
            it, so a long rollout is not worth less per token than a short one.
        chunk_tokens: padded tokens run at once.
    """

    steps: int = 16
    learning_rate: float = 6e-3
    decay_fraction: float = 0.6
    betas: tuple[float, float] = (0.9, 0.95)
    epsilon: float = 1e-4
    gradient_clip: float = 0.1
    length_scale: float = 60.0
    chunk_tokens: int = 4096


@dataclass(frozen=True)
class ScoredRollout:
    """A sampled completion and what it earned; `group` is what rollouts of one prompt share."""

    prompt_ids: Sequence[int]
    completion_ids: Sequence[int]
    reward: float
    group: Hashable


@dataclass(frozen=True)
class GrpoMetrics:
    """What one update saw, measured on its rollouts before the update.

    Attributes:
        reward: mean.
        length: mean completion tokens.
        entropy: of the policy per completion token, nats.
        kl_to_start: KL(policy ‖ start policy) per completion token, nats.
        kl_to_start_per_rollout: the same, summed over a rollout.
        grad_norm: before clipping; 0 when no group taught anything, and nothing was updated.
        informative_groups: share of the groups whose rollouts differ in reward.
    """

    reward: float
    length: float
    entropy: float
    kl_to_start: float
    kl_to_start_per_rollout: float
    grad_norm: float
    informative_groups: float


class Grpo:
    """Owns the policy and its optimizer.

    Attributes:
        policy: float32, updated in place.
        updates: batches seen so far.
    """

    def __init__(self, policy: LlamaForCausalLM, config: GrpoConfig | None = None) -> None:
        self.policy = policy
        self.config = config or GrpoConfig()
        self.updates = 0
        self._start = copy.deepcopy(policy).requires_grad_(False)
        self._optimizer = torch.optim.AdamW(
            policy.parameters(),
            lr=self.config.learning_rate,
            betas=self.config.betas,
            eps=self.config.epsilon,
            weight_decay=0.0,
            fused=True,
        )

    def update(self, rollouts: Sequence[ScoredRollout]) -> GrpoMetrics:
        """One update on rollouts sampled from the policy as it is now.

        Args:
            rollouts: whole groups, completions not empty.
        """
        advantage = advantages(rollouts)
        self._optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(3, dtype=torch.float64)  # entropy, KL to start, tokens
        for chunk in self._chunks(rollouts, advantage):
            sums += self._chunk([rollouts[i] for i in chunk], [advantage[i] for i in chunk])
        grad_norm = self._apply(len(rollouts)) if any(advantage) else 0.0
        self.updates += 1
        entropy, kl, tokens = sums.tolist()
        groups = {rollout.group for rollout in rollouts}
        informative = {r.group for r, a in zip(rollouts, advantage, strict=True) if a}
        return GrpoMetrics(
            reward=statistics.fmean(rollout.reward for rollout in rollouts),
            length=tokens / len(rollouts),
            entropy=entropy / tokens,
            kl_to_start=kl / tokens,
            kl_to_start_per_rollout=kl / len(rollouts),
            grad_norm=grad_norm,
            informative_groups=len(informative) / len(groups),
        )

    def save(self, folder: Path) -> None:
        """Write the policy as a transformers folder, for the engines to load."""
        self.policy.save_pretrained(folder)

    def _apply(self, rollouts: int) -> float:
        for parameter in self.policy.parameters():
            if parameter.grad is not None:
                parameter.grad /= rollouts * self.config.length_scale
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.parameters(), self.config.gradient_clip, error_if_nonfinite=True
        )
        left = (self.config.steps - self.updates) / (self.config.steps * self.config.decay_fraction)
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate * min(1.0, max(left, 0.0))
        self._optimizer.step()
        return float(norm)

    def _chunk(self, rollouts: list[ScoredRollout], advantage: list[float]) -> Tensor:
        """Add the chunk's gradient; returns its sums of entropy, KL to start and tokens."""
        tokens, completion = _pad(rollouts)
        learns = any(advantage)
        with torch.set_grad_enabled(learns):
            log_p = policy_logits(self.policy, tokens)[:, :-1].log_softmax(-1)
            if learns:
                taken = log_p.gather(-1, tokens[:, 1:, None])[..., 0]
                weight = torch.tensor(advantage)[:, None] * completion
                (-(taken * weight).sum()).backward()
        with torch.no_grad():
            log_p = log_p.detach()
            p = log_p.exp()
            log_start = policy_logits(self._start, tokens)[:, :-1].log_softmax(-1)
            entropy = -((p * log_p).sum(-1) * completion).sum()
            kl = ((p * (log_p - log_start)).sum(-1) * completion).sum()
            return torch.stack((entropy, kl, completion.sum())).double()

    def _chunks(
        self, rollouts: Sequence[ScoredRollout], advantage: list[float]
    ) -> Iterator[list[int]]:
        """Indices of rollouts of similar length; those that teach and those that do not, apart."""
        for learns in (True, False):
            chunk: list[int] = []
            kind = [i for i, a in enumerate(advantage) if bool(a) == learns]
            for i in sorted(kind, key=lambda i: _length(rollouts[i])):
                if chunk and (len(chunk) + 1) * _length(rollouts[i]) > self.config.chunk_tokens:
                    yield chunk
                    chunk = []
                chunk.append(i)
            if chunk:
                yield chunk


def advantages(rollouts: Sequence[ScoredRollout]) -> list[float]:
    """Group-normalised advantage of each rollout; 0 throughout a group of equal rewards."""
    groups: defaultdict[Hashable, list[float]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.group].append(rollout.reward)
    mean = {group: statistics.fmean(rewards) for group, rewards in groups.items()}
    spread = {group: statistics.pstdev(rewards) for group, rewards in groups.items()}
    return [
        (rollout.reward - mean[rollout.group]) / spread[rollout.group]
        if spread[rollout.group]
        else 0.0
        for rollout in rollouts
    ]


def _length(rollout: ScoredRollout) -> int:
    return len(rollout.prompt_ids) + len(rollout.completion_ids)


def _pad(rollouts: Sequence[ScoredRollout]) -> tuple[Tensor, Tensor]:
    """Tokens int64 [B, T], and float [B, T-1]: 1 where a completion token is predicted."""
    rows = [torch.tensor([*r.prompt_ids, *r.completion_ids]) for r in rollouts]
    tokens = pad_sequence(rows, batch_first=True)
    completion = torch.zeros(len(rows), tokens.shape[1] - 1)
    for row, rollout in enumerate(rollouts):
        completion[row, len(rollout.prompt_ids) - 1 : _length(rollout) - 1] = 1.0
    return tokens, completion
