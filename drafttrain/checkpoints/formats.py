"""The checkpoint formats an engine loads, described so that a folder can be checked against them.

===========  ================================================  ========================
kind         ``config.json``                                   module
===========  ================================================  ========================
eagle3       vLLM's raw layout                                 ``eagle3_format``
eagle3       the layout of the ``speculators`` library         ``speculators_format``
mtp          a policy family that ships MTP heads              ``mtp_format``
draft_model  any other causal LM                               ``causal_format``
===========  ================================================  ========================

A format is a checked ``config.json`` (:func:`with_defaults`) and, from it, the tensors with their
shapes (:func:`expected_tensors`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drafttrain.checkpoints.causal_format import causal_tensors
from drafttrain.checkpoints.decoder_format import ExpectedTensors
from drafttrain.checkpoints.eagle3_format import (
    LAYER,
    LAYER_ALIAS,
    eagle3_tensors,
    is_eagle3,
    parse_eagle3,
    with_layer_ids,
    with_rope_type,
)
from drafttrain.checkpoints.manifest import Kind
from drafttrain.checkpoints.mtp_format import family_of, mtp_tensors
from drafttrain.checkpoints.speculators_format import as_raw, is_speculators
from drafttrain.errors import CheckpointError

__all__ = [
    "LAYER",
    "LAYER_ALIAS",
    "ExpectedTensors",
    "aux_layer_ids",
    "expected_tensors",
    "kind_of",
    "with_defaults",
]


def kind_of(config: dict[str, Any], where: str | Path = "config.json") -> Kind:
    """The drafter kind a ``config.json`` declares.

    Raises:
        CheckpointError: none that can be checked and published.
    """
    if is_speculators(config) or is_eagle3(config):
        return "eagle3"
    architectures = config.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and len(architectures) == 1 else None
    if isinstance(name, str) and name.endswith("ForCausalLM"):
        # The engine takes a family that has MTP heads for one, whatever it is asked to do with it.
        return "mtp" if family_of(config) else "draft_model"
    problem = f"{architectures!r:.120}, expected an Eagle3 drafter's, or a causal language model's"
    raise CheckpointError(where, "architectures", problem)


def with_defaults(
    config: dict[str, Any], where: str | Path = "config.json", policy_layers: int | None = None
) -> dict[str, Any]:
    """`config` with what the engine fills in for absent keys written out, and checked.

    One of the ``speculators`` layout comes back as the raw layout's, which says the same. An Eagle3
    drafter that names no aux layers reads those that follow from the policy's number of layers.

    Raises:
        CheckpointError: a key is missing, or its value is wrong or contradicts another.
    """
    kind = kind_of(config, where)
    if kind == "eagle3":
        raw = as_raw(config, where) if is_speculators(config) else config
        raw = with_rope_type(raw, where)
        if policy_layers is not None:
            raw = with_layer_ids(raw, policy_layers)
        return {**raw, **parse_eagle3(raw, where).model_dump()}
    expected_tensors(config, where)
    return {**config, "target_hidden_size": config["hidden_size"]} if kind == "mtp" else config


def expected_tensors(config: dict[str, Any], where: str | Path = "config.json") -> ExpectedTensors:
    """The tensors a checkpoint with this ``config.json`` must and may hold.

    Raises:
        CheckpointError: as :func:`with_defaults`.
    """
    kind = kind_of(config, where)
    if kind == "eagle3":
        raw = as_raw(config, where) if is_speculators(config) else config
        return eagle3_tensors(parse_eagle3(raw, where))
    return (mtp_tensors if kind == "mtp" else causal_tensors)(config, where)


def aux_layer_ids(config: dict[str, Any]) -> list[int]:
    """The policy's aux layers that a drafter with this checked ``config.json`` reads."""
    ids: list[int] = config.get("eagle_aux_hidden_state_layer_ids", [])
    return ids
