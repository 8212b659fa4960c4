"""A trainer's state on disk: one safetensors file of tensors and a JSON document."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafttrain.errors import CheckpointError
from drafttrain.outputs import writing
from drafttrain.training.devices import divided_as

STATE = "trainer.safetensors"
STATE_SCHEMA = 1
# Our name for it, and safetensors' own.
_UNFINISHED = (f"{STATE}.tmp", ".tmp??????")


def unfinished_states(folder: Path) -> set[Path]:
    """What a kill leaves in `folder` of a state that is being saved."""
    return {path for pattern in _UNFINISHED for path in folder.glob(pattern)}


def write_state(folder: Path, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    """Replace the state in `folder` atomically.

    Raises:
        CheckpointError: it cannot be written; an earlier state is as it was.
    """
    path, temporary = folder / STATE, folder / f"{STATE}.tmp"
    metadata = {"drafttrain": json.dumps({"schema": STATE_SCHEMA} | document)}
    with writing(path, "state"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary, metadata=metadata)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:  # of this one, unless it has its name, and of those that were killed
            for left in unfinished_states(folder):
                left.unlink(missing_ok=True)


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and document of :func:`write_state`.

    Raises:
        CheckpointError: the state is damaged, or of another schema.
    """
    path = folder / STATE
    try:
        with safe_open(path, framework="pt") as file:
            document: dict[str, Any] = json.loads((file.metadata() or {})["drafttrain"])
            schema = document["schema"]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise CheckpointError(path, "file", f"is not a trainer's state: {error}") from error
    if schema != STATE_SCHEMA:
        raise CheckpointError(path, "schema", f"{schema}; expected {STATE_SCHEMA}")
    return load_file(path), document


def distinct(module: torch.nn.Module) -> dict[str, Tensor]:
    """The state of `module`, a tensor that has several names (a tied head) under the first."""
    state = module.state_dict()
    return {name: state[name] for name in dict.fromkeys(_first_names(module).values())}


def _first_names(module: torch.nn.Module) -> dict[str, str]:
    """Every name in its state to the first name of the same tensor."""
    first: dict[int, str] = {}
    named = module.state_dict(keep_vars=True)
    return {name: first.setdefault(id(tensor), name) for name, tensor in named.items()}


def load_distinct(module: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load what :func:`distinct` gave."""
    own, firsts = module.state_dict(), _first_names(module).items()
    given = tensors | {name: tensors[first] for name, first in firsts if first in tensors}
    module.load_state_dict(
        {
            name: divided_as(own[name], tensor) if name in own else tensor
            for name, tensor in given.items()
        }
    )


def with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
