"""One trainer for every kind of drafter: steps on batches, fp32 master weights, exact resume."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafttrain.config import TrainingConfig
from drafttrain.drafters.batch import Batch, make_batch, split_by_tokens
from drafttrain.drafters.contract import Drafter
from drafttrain.errors import CheckpointError, RolloutError
from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout
from drafttrain.training.average import WeightAverage
from drafttrain.training.devices import Devices, computed_in, divided_as, whole, whole_copy
from drafttrain.training.heads import DeviceHeads
from drafttrain.training.losses import DraftLoss, draft_loss
from drafttrain.training.state import (
    STATE,
    distinct,
    load_distinct,
    read_state,
    with_prefix,
    write_state,
)

# With Adam the best learning rate falls with the width (Yang et al., arXiv 2203.03466).
_RATE_TIMES_WIDTH = 0.4


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    Attributes:
        step: count of steps, this one included.
        loss: mean objective over its rows.
        acceptance: mean sum(min(p, q)) at each draft depth.
        tokens: rollout tokens in it.
        grad_norm: before clipping.
    """

    step: int
    loss: float
    acceptance: list[float]
    tokens: int
    grad_norm: float


class Trainer:
    """Owns the drafter's fp32 weights, the optimizer, the schedule and the sampling RNG.

    Attributes:
        drafter: float32, trained in place.
        average: exponential moving average of its weights: what is offered for publishing. Without
            a learning rate that decays, it is what takes the noise of the last steps out.
        step_count: optimizer steps so far.
        tokens_seen: rollout tokens trained on so far.
        heads: the policy's, on the device that trains.
        generator: decides which rollouts a step samples; part of the saved state.
    """

    def __init__(
        self,
        drafter: Drafter,
        config: TrainingConfig,
        total_steps: int | None = None,
        devices: Devices | None = None,
    ) -> None:
        """With `total_steps` the learning rate decays over the last fifth (WSD), else it stays.

        With `devices` several processes may train together; without, this one does.
        """
        if config.lora_rank is not None:
            drafter.add_lora(config.lora_rank)
        self._devices = devices or Devices()
        self.heads = DeviceHeads(self._devices.device)
        self._plain = copy.deepcopy(drafter) if self._devices.sharded else drafter
        self.drafter = drafter.float()
        self.config = config
        self.learning_rate = config.learning_rate or _RATE_TIMES_WIDTH / drafter.hidden_size
        self.total_steps = total_steps
        self.step_count = 0
        self.tokens_seen = 0
        self.generator = torch.Generator().manual_seed(config.seed)
        self._averaged = WeightAverage(self.drafter, config.average_decay)
        for placed in (self.drafter, self.average):
            self._devices.place(placed)
        self.optimizer = torch.optim.AdamW(
            [weight for weight in drafter.parameters() if weight.requires_grad],
            lr=self.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        if not config.train_head:
            # After the optimizer is made: its saved state counts parameters, these among them.
            drafter.head_weight(torch.empty(0)).requires_grad_(False)

    @property
    def average(self) -> Drafter:
        return self._averaged.module

    @property
    def whole_drafter(self) -> Drafter:
        """The drafter, gathered when its weights are divided among processes."""
        if not self._devices.sharded:
            return self.drafter
        return whole_copy(self.drafter, self._plain).to(self._devices.device)

    def step(
        self,
        rollouts: Sequence[Rollout],
        layout: FeatureLayout,
        heads: dict[int, PolicyHead],
        newest_policy: int | None = None,
    ) -> StepReport:
        """One optimizer step on `rollouts`, divided into microbatches here.

        Args:
            newest_policy: as for :meth:`step_on`.

        Raises:
            RolloutError: as :meth:`step_on`.
        """
        parts = []
        for version in sorted({rollout.policy_version for rollout in rollouts}):
            same_policy = [rollout for rollout in rollouts if rollout.policy_version == version]
            parts += list(split_by_tokens(same_policy, self.config.tokens_per_step))
        return self.step_on(parts, layout, heads, newest_policy)

    def step_on(
        self,
        parts: Sequence[Sequence[Rollout]],
        layout: FeatureLayout,
        heads: dict[int, PolicyHead],
        newest_policy: int | None = None,
    ) -> StepReport:
        """One optimizer step; gradients add up over microbatches and processes, each row as
        much as its weight.

        Args:
            parts: this process's microbatches, each of one policy version; with sharded weights
                every process has the same number of them.
            newest_policy: the policy version that staleness counts from; when absent, the newest
                of these microbatches.

        Raises:
            RolloutError: their aux layers are not the drafter's, or NaN or infinity came of them.
        """
        self.drafter.check_layout(layout)
        self._set_learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        if newest_policy is None:
            newest_policy = max((part[0].policy_version for part in parts), default=0)
        # Loss (times weight), weight, tokens, rows, and acceptance at each depth (times rows).
        sums = torch.zeros(4 + self.config.draft_tokens, dtype=torch.float64)
        for part in parts:
            version = part[0].policy_version
            freshness = self.config.staleness_decay ** (newest_policy - version)
            result = self._backward(part, layout, heads[version], freshness)
            sums[2] += sum(rollout.length for rollout in part)
            if result is not None:
                loss, weight = result.loss.item(), result.weight.item()
                sums[:2] += torch.tensor([loss * weight, weight], dtype=torch.float64)
                sums[3] += result.rows
                sums[4:] += result.acceptance.double().cpu() * result.rows
        sums = self._devices.total(sums).cpu()
        total, weight, tokens, rows = sums[:4].tolist()
        norm = self._update(weight or 1.0, [rollout for part in parts for rollout in part])
        self.step_count += 1
        self.tokens_seen += int(tokens)
        acceptance = (sums[4:] / (rows or 1.0)).tolist()
        loss = total / (weight or 1.0)
        return StepReport(self.step_count, loss, acceptance, int(tokens), float(norm))

    def _update(self, weight: float, rollouts: Sequence[Rollout]) -> Tensor:
        """Apply the gradients, sums of `weight` in all; returns their norm before clipping."""
        self._devices.add_gradients(self.drafter.parameters())
        for parameter in self.drafter.parameters():
            if parameter.grad is not None:
                parameter.grad /= weight
        norm = torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), self.config.gradient_clip)
        norm = whole(norm)
        if not torch.isfinite(norm):
            names = ", ".join(rollout.rollout_id for rollout in rollouts[:5])
            problem = "gives gradients that are not finite; or the learning rate is too high"
            raise RolloutError("rollouts", f"one of {names} …", problem)
        self.optimizer.step()
        self._averaged.update(self.drafter)
        return norm

    def _backward(
        self,
        rollouts: Sequence[Rollout],
        layout: FeatureLayout,
        head: PolicyHead,
        freshness: float,
    ) -> DraftLoss | None:
        """Adds gradients times the rows' weight and `freshness`; None where nothing is drafted."""
        device = self._devices.device
        batch = self._with_noise(make_batch(rollouts, layout, head, device))
        # Completions of one token: no drafts. Processes that share weights must unroll together.
        if not len(batch.rounds) and not self._devices.sharded:
            return None
        head = self.heads.moved(head)
        bfloat16 = computed_in(self.config.precision, device) == torch.bfloat16
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            depths = 1 if self.drafter.same_at_every_depth else self.config.draft_tokens
            hidden = self.drafter.unroll(batch, head.embed_tokens, depths)
            result = draft_loss(
                hidden,
                self.drafter.head_weight(head.lm_head),
                batch,
                head.lm_head,
                objective=self.config.objective,
                depth_decay=self.config.depth_decay,
                draft_ids=self.drafter.draft_ids,
                token_weights=self._token_weights(batch),
            )
        (result.loss * (result.weight * freshness)).backward()
        return result

    def _token_weights(self, batch: Batch) -> Tensor | None:
        if batch.rejected is None or self.config.rejected_weight == 1:
            return None
        return torch.where(batch.rejected, self.config.rejected_weight, 1.0)

    def _with_noise(self, batch: Batch) -> Batch:
        """Features with noise, as EAGLE trains on them (arXiv 2401.15077, section 3.2)."""
        features, level = batch.aux_hidden, self.config.feature_noise
        if features is None or level == 0:
            return batch
        seed = int(torch.randint(1 << 62, (), generator=self.generator))
        generator = torch.Generator(features.device).manual_seed(seed)
        noise = torch.empty_like(features).normal_(generator=generator)
        size = features.square().mean((0, 2), keepdim=True).sqrt()  # of each layer
        return replace(batch, aux_hidden=features.addcmul(noise, size, value=level))

    def _set_learning_rate(self) -> None:
        factor = min(1.0, (self.step_count + 1) / max(self.config.warmup_steps, 1))
        if self.total_steps is not None:
            decay_steps = math.ceil(self.total_steps / 5)
            left = self.total_steps - self.step_count
            factor *= min(1.0, max(left, 0) / decay_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor

    def save(self, folder: Path, **progress: Any) -> None:
        """Write everything a resumed run needs, whole or not at all.

        Args:
            folder: the state's folder; its ``trainer.safetensors`` is replaced atomically.
            progress: what else the caller must remember, as JSON.

        Raises:
            CheckpointError: it cannot be written; an earlier state is as it was.
        """
        tensors = {f"drafter.{name}": t for name, t in distinct(self.drafter).items()}
        tensors |= {f"average.{name}": t for name, t in distinct(self._averaged).items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
        tensors["rng"] = self.generator.get_state()
        tensors = {name: whole(tensor).cpu() for name, tensor in tensors.items()}
        if self._devices.rank == 0:
            counts = {"step_count": self.step_count, "tokens_seen": self.tokens_seen}
            write_state(folder, tensors, counts | {"progress": progress})

    def restore(self, folder: Path) -> dict[str, Any]:
        """Continue from :meth:`save`; returns the caller's progress.

        Raises:
            CheckpointError: the state is damaged, newer, or of another drafter.
        """
        tensors, document = read_state(folder)
        try:
            load_distinct(self.drafter, with_prefix(tensors, "drafter."))
            load_distinct(self._averaged, with_prefix(tensors, "average."))
        except RuntimeError as error:
            problem = f"does not fit the drafter: {error}"
            raise CheckpointError(folder / STATE, "drafter", problem) from error
        self._restore_optimizer(with_prefix(tensors, "optimizer."))
        self.generator.set_state(tensors["rng"])
        self.step_count = document["step_count"]
        self.tokens_seen = document["tokens_seen"]
        progress: dict[str, Any] = document["progress"]
        return progress

    def _restore_optimizer(self, tensors: dict[str, Tensor]) -> None:
        """Take what its state has for each parameter, named "index.key"."""
        state: dict[int, dict[str, Tensor]] = {}
        parameters = self.optimizer.param_groups[0]["params"]  # what the saved state counts
        for name, tensor in tensors.items():
            index, key = name.split(".", 1)
            reference = parameters[int(index)]
            state.setdefault(int(index), {})[key] = (
                divided_as(reference, tensor) if tensor.shape == reference.shape else tensor
            )
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
