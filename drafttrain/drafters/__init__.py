"""The drafter architectures in plain torch, behind one contract.

A new kind is one module, one line in :data:`KINDS` and the shared contract tests.
"""

from __future__ import annotations

from pathlib import Path

from drafttrain.checkpoints.formats import kind_of
from drafttrain.checkpoints.manifest import Kind, read_json
from drafttrain.drafters.batch import Batch
from drafttrain.drafters.contract import Drafter
from drafttrain.drafters.draft_model import DraftModel
from drafttrain.drafters.eagle3 import Eagle3Drafter
from drafttrain.drafters.mtp import MTPDrafter
from drafttrain.drafters.policy import PolicyShape

KINDS: dict[Kind, type[Drafter]] = {
    drafter.kind: drafter for drafter in (Eagle3Drafter, MTPDrafter, DraftModel)
}


def load_drafter(folder: str | Path, policy: PolicyShape) -> Drafter:
    """Load a drafter folder of any kind.

    Raises:
        CheckpointError: no kind recognises the folder, or it does not fit the policy.
    """
    path = Path(folder) / "config.json"
    return KINDS[kind_of(read_json(path), path)].load(Path(folder), policy)


__all__ = [
    "KINDS",
    "Batch",
    "DraftModel",
    "Drafter",
    "Eagle3Drafter",
    "MTPDrafter",
    "PolicyShape",
    "load_drafter",
]
