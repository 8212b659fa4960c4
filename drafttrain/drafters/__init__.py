"""The drafter architectures in plain torch, behind one contract.

A new kind is one module, one line in :data:`KINDS` and the shared contract tests.
"""

from __future__ import annotations

from pathlib import Path

from drafttrain.drafters.batch import Batch
from drafttrain.drafters.contract import Drafter
from drafttrain.drafters.eagle3 import Eagle3Drafter
from drafttrain.drafters.policy import PolicyShape
from drafttrain.errors import CheckpointError

KINDS: dict[str, type[Drafter]] = {Eagle3Drafter.kind: Eagle3Drafter}


def load_drafter(folder: str | Path, policy: PolicyShape) -> Drafter:
    """Load a drafter folder of any kind.

    Raises:
        CheckpointError: no kind recognises the folder, or it does not fit the policy.
    """
    for drafter_class in KINDS.values():
        if drafter_class.recognises(Path(folder)):
            return drafter_class.load(Path(folder), policy)
    known = ", ".join(sorted(KINDS))
    raise CheckpointError(folder, "config.json", f"is not a drafter of a known kind ({known})")


__all__ = ["KINDS", "Batch", "Drafter", "Eagle3Drafter", "PolicyShape", "load_drafter"]
