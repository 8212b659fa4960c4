"""Offline: from saved rollouts to a drafter in the registry, with its held-out acceptance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from drafttrain.checkpoints.manifest import Lineage, Manifest, TargetFingerprint
from drafttrain.checkpoints.registry import Registry
from drafttrain.config import TrainingConfig
from drafttrain.control.acceptance import (
    AcceptanceEstimate,
    DraftSampleMethod,
    estimate_acceptance,
    usable,
)
from drafttrain.drafters import load_drafter
from drafttrain.drafters.contract import Drafter
from drafttrain.drafters.policy import PolicyShape
from drafttrain.errors import RolloutError
from drafttrain.publishing import as_manifest_entry, publish_drafter
from drafttrain.rollouts.record import Rollout
from drafttrain.rollouts.replay import Replay
from drafttrain.training.trainer import StepReport, Trainer


@dataclass(frozen=True)
class PretrainReport:
    """How a drafter came out of offline training.

    Attributes:
        lineage: what it was trained on.
        acceptance: on the held-out prompt groups.
    """

    lineage: Lineage
    acceptance: AcceptanceEstimate


def pretrain(
    drafter: Drafter,
    replay: Replay,
    config: TrainingConfig,
    *,
    steps: int,
    method: DraftSampleMethod = "probabilistic",
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> PretrainReport:
    """Train `drafter` in place for `steps` optimizer steps (warm-up, stable, decay).

    Raises:
        RolloutError: the rollouts leave nothing to train on, or nothing to hold out.
    """
    replay.refresh()
    if not replay.training:
        raise RolloutError(replay.root, "rollouts", "none to train on")
    trainer = Trainer(drafter, config, total_steps=steps)
    for _ in range(steps):
        rollouts = replay.sample(trainer.generator, config.tokens_per_step)
        on_step(trainer.step(rollouts, replay.layout, replay.heads_of(rollouts)))
    lineage = Lineage(
        policy_versions=sorted({rollout.policy_version for rollout in replay.training}),
        rollouts=len(replay.training),
        tokens=trainer.tokens_seen,
        optimizer_steps=steps,
    )
    held_out = replayable(replay, config.draft_tokens)
    return PretrainReport(lineage, estimate(drafter, replay, held_out, config.draft_tokens, method))


def replayable(replay: Replay, k: int) -> list[Rollout]:
    """Held-out rollouts that the acceptance estimate can use.

    Raises:
        RolloutError: there is none.
    """
    rollouts = [rollout for rollout in replay.held_out if usable(rollout, k)]
    if not rollouts:
        raise RolloutError(replay.root, "rollouts", "no complete rollout is held out; need more")
    return rollouts


def estimate(
    drafter: Drafter,
    replay: Replay,
    rollouts: Sequence[Rollout],
    k: int,
    method: DraftSampleMethod,
) -> AcceptanceEstimate:
    """:func:`estimate_acceptance` on rollouts of a replay."""
    heads = replay.heads_of(rollouts)
    return estimate_acceptance(drafter, rollouts, replay.layout, heads, k=k, method=method)


def pretrain_from_folders(
    *,
    target: Path,
    rollouts: Path,
    drafter: Path,
    registry: Path,
    steps: int,
    k: int,
    method: DraftSampleMethod = "probabilistic",
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> Manifest:
    """The ``pretrain`` command: load, train, publish.

    Raises:
        CheckpointError: the policy, the drafter or the registry is wrong.
        RolloutError: the rollouts are.
    """
    model = load_drafter(drafter, PolicyShape.from_folder(target))
    shelf = Registry(registry)
    replay = Replay(rollouts)
    config = TrainingConfig(draft_tokens=k)
    report = pretrain(model, replay, config, steps=steps, method=method, on_step=on_step)
    temperature = replay.held_out[-1].temperature
    return publish_drafter(
        shelf,
        model,
        TargetFingerprint.from_folder(target),
        parent=None,
        lineage=report.lineage,
        acceptance=as_manifest_entry(report.acceptance, k, temperature, method),
    )


def evaluate_folders(
    *, target: Path, rollouts: Path, drafter: Path, k: int, method: DraftSampleMethod
) -> AcceptanceEstimate:
    """The ``eval`` command: replay all complete rollouts of a spool with a drafter."""
    model = load_drafter(drafter, PolicyShape.from_folder(target))
    replay = Replay(rollouts, holdout_fraction=1.0)
    replay.refresh()
    return estimate(model, replay, replayable(replay, k), k, method)
