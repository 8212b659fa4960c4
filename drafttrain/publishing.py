"""Putting drafters into a registry, with where they came from and how they did."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from drafttrain.checkpoints.manifest import Acceptance, Lineage, Manifest, TargetFingerprint
from drafttrain.checkpoints.registry import Registry
from drafttrain.checkpoints.verify import verify
from drafttrain.control.acceptance import AcceptanceEstimate, DraftSampleMethod
from drafttrain.drafters import load_drafter
from drafttrain.drafters.contract import Drafter, exact_dtype
from drafttrain.drafters.policy import PolicyShape
from drafttrain.outputs import writing

UNTRAINED = Lineage(policy_versions=[], rollouts=0, tokens=0, optimizer_steps=0)


def as_manifest_entry(
    estimate: AcceptanceEstimate, k: int, temperature: float, method: DraftSampleMethod
) -> Acceptance:
    """An estimate as the registry records it."""
    return Acceptance(
        acceptance_length=estimate.acceptance_length,
        accepted_per_position=estimate.accepted_per_position,
        k=k,
        temperature=temperature,
        draft_sample_method=method,
        interval=estimate.interval(),
        held_out_rollouts=len(estimate.groups),
    )


def publish_drafter(
    registry: Registry,
    drafter: Drafter,
    target: TargetFingerprint,
    *,
    parent: int | None,
    lineage: Lineage,
    acceptance: Acceptance | None,
    dtype: torch.dtype = torch.float32,
    over: int | None = None,
) -> Manifest:
    """Export `drafter` and publish it (:meth:`Registry.publish`); it is verified on the way."""
    with tempfile.TemporaryDirectory() as folder:
        with writing(Path(folder)):
            drafter.export(Path(folder), dtype)
        return registry.publish(
            Path(folder),
            kind=drafter.kind,
            target=target,
            parent=parent,
            lineage=lineage,
            acceptance=acceptance,
            over=over,
        )


def publish_folder(folder: Path, target: Path, registry: Registry) -> Manifest:
    """Publish a drafter made elsewhere, in the one form that every engine reads and swaps.

    Its numbers stay bit for bit, in the dtype they have.

    Raises:
        CheckpointError: it is not sound, or does not fit the policy in `target`.
    """
    fingerprint = TargetFingerprint.from_folder(target)
    drafter = load_drafter(folder, PolicyShape.from_folder(target))
    return publish_drafter(
        registry,
        drafter,
        fingerprint,
        parent=registry.latest(),
        lineage=UNTRAINED,
        acceptance=None,
        dtype=exact_dtype(verify(folder, fingerprint).tensors),
    )
