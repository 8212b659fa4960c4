"""One trainer for every kind of drafter: steps on batches, fp32 master weights, exact resume."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from drafttrain.config import TrainingConfig
from drafttrain.drafters.batch import make_batch, split_by_tokens
from drafttrain.drafters.contract import Drafter
from drafttrain.errors import CheckpointError, RolloutError
from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout
from drafttrain.training.losses import draft_loss

STATE_SCHEMA = 1


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
        generator: decides which rollouts a step samples; part of the saved state.
    """

    def __init__(
        self, drafter: Drafter, config: TrainingConfig, total_steps: int | None = None
    ) -> None:
        """With `total_steps` the learning rate decays over the last fifth (WSD), else it stays."""
        if config.lora_rank is not None:
            drafter.add_lora(config.lora_rank)
        self.drafter = drafter.float()
        self.config = config
        self.total_steps = total_steps
        self.step_count = 0
        self.tokens_seen = 0
        self.generator = torch.Generator().manual_seed(config.seed)
        self._averaged = AveragedModel(
            self.drafter, multi_avg_fn=get_ema_multi_avg_fn(config.average_decay)
        )
        self.optimizer = torch.optim.AdamW(
            [weight for weight in drafter.parameters() if weight.requires_grad],
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )

    @property
    def average(self) -> Drafter:
        return cast(Drafter, self._averaged.module)

    def step(
        self, rollouts: Sequence[Rollout], layout: FeatureLayout, heads: dict[int, PolicyHead]
    ) -> StepReport:
        """One optimizer step on `rollouts`.

        Rollouts of one policy version go through the drafter together; gradients add up over these
        parts, weighted by their rows.

        Raises:
            RolloutError: their aux layers are not the drafter's, or NaN or infinity came of them.
        """
        self.drafter.check_layout(layout)
        self._set_learning_rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss, acceptance, rows = 0.0, torch.zeros(self.config.draft_tokens), 0.0
        newest = max(rollout.policy_version for rollout in rollouts)
        for version in sorted({rollout.policy_version for rollout in rollouts}):
            same_policy = [rollout for rollout in rollouts if rollout.policy_version == version]
            weight = self.config.staleness_decay ** (newest - version)
            for part in split_by_tokens(same_policy, self.config.tokens_per_step):
                part_loss, part_acceptance, part_rows = self._backward(
                    part, layout, heads[version], weight
                )
                loss += part_loss
                acceptance += part_acceptance * part_rows
                rows += part_rows
        rows = rows or 1.0
        for parameter in self.drafter.parameters():
            if parameter.grad is not None:
                parameter.grad /= rows
        norm = torch.nn.utils.clip_grad_norm_(self.drafter.parameters(), self.config.gradient_clip)
        if not torch.isfinite(norm):
            names = ", ".join(rollout.rollout_id for rollout in rollouts[:5])
            raise RolloutError(
                "rollouts", f"one of {names} …", "gives gradients that are not finite"
            )
        self.optimizer.step()
        self._averaged.update_parameters(self.drafter)
        self.step_count += 1
        tokens = sum(rollout.length for rollout in rollouts)
        self.tokens_seen += tokens
        return StepReport(
            self.step_count, loss / rows, (acceptance / rows).tolist(), tokens, float(norm)
        )

    def _backward(
        self,
        rollouts: Sequence[Rollout],
        layout: FeatureLayout,
        head: PolicyHead,
        weight: float,
    ) -> tuple[float, Tensor, float]:
        """Adds gradients; returns summed loss, mean acceptance and rows, all weighted."""
        batch = make_batch(rollouts, layout, head)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bfloat16"):
            hidden = self.drafter.unroll(batch, head.embed_tokens, self.config.draft_tokens)
            draft_head = self.drafter.head_weight(head.lm_head)
            result = draft_loss(
                hidden,
                draft_head if self.config.train_head else draft_head.detach(),
                batch,
                head.lm_head,
                objective=self.config.objective,
                depth_decay=self.config.depth_decay,
                draft_ids=self.drafter.draft_ids,
            )
        rows = result.rows * weight
        (result.loss * rows).backward()
        return result.loss.item() * rows, result.acceptance, rows

    def _set_learning_rate(self) -> None:
        factor = min(1.0, (self.step_count + 1) / max(self.config.warmup_steps, 1))
        if self.total_steps is not None:
            decay_steps = math.ceil(self.total_steps / 5)
            left = self.total_steps - self.step_count
            factor *= min(1.0, max(left, 0) / decay_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * factor

    def save(self, folder: Path, **progress: Any) -> None:
        """Write everything a resumed run needs, whole or not at all.

        Args:
            folder: the state's folder; its ``trainer.safetensors`` is replaced atomically.
            progress: what else the caller must remember, as JSON.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"drafter.{name}": t for name, t in self.drafter.state_dict().items()}
        tensors |= {f"average.{name}": t for name, t in self._averaged.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
        tensors["rng"] = self.generator.get_state()
        document = {
            "schema": STATE_SCHEMA,
            "step_count": self.step_count,
            "tokens_seen": self.tokens_seen,
            "progress": progress,
        }
        temporary = folder / "trainer.safetensors.tmp"
        save_file(tensors, temporary, metadata={"drafttrain": json.dumps(document)})
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(folder / "trainer.safetensors")

    def restore(self, folder: Path) -> dict[str, Any]:
        """Continue from :meth:`save`; returns the caller's progress.

        Raises:
            CheckpointError: the state is damaged, newer, or of another drafter.
        """
        path = folder / "trainer.safetensors"
        document = _state_document(path)
        tensors = load_file(path)
        drafter = _with_prefix(tensors, "drafter.")
        try:
            self.drafter.load_state_dict(drafter)
            self._averaged.load_state_dict(_with_prefix(tensors, "average."))
        except RuntimeError as error:
            raise CheckpointError(path, "drafter", f"does not fit the drafter: {error}") from error
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _with_prefix(tensors, "optimizer.").items():
            index, key = name.split(".", 1)
            state.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.generator.set_state(tensors["rng"])
        self.step_count = document["step_count"]
        self.tokens_seen = document["tokens_seen"]
        progress: dict[str, Any] = document["progress"]
        return progress


def _state_document(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            document: dict[str, Any] = json.loads((file.metadata() or {})["drafttrain"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(path, "file", f"is not a trainer's state: {error}") from error
    if document["schema"] != STATE_SCHEMA:
        raise CheckpointError(path, "schema", f"{document['schema']}; expected {STATE_SCHEMA}")
    return document


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
