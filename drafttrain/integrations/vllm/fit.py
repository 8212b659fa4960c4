"""Whether a verified checkpoint fits the drafter that runs, judged before anything is touched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from drafttrain.errors import CheckpointError

Shape = tuple[int, ...]

# vLLM computes these checkpoint tensors as one.
_FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj"} | {
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_NOT_LOADED = {"t2d"}

# Keys that change what the drafter computes without changing a shape; where both folders name one,
# the values must agree.
_SAME_CONFIG = (
    "eagle_aux_hidden_state_layer_ids",
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)


def live_name(name: str) -> str | None:
    """The running eagle3 module's parameter that a checkpoint tensor belongs to; None: to none."""
    if name in _NOT_LOADED:
        return None
    if name == "d2t":
        return "draft_id_to_target_id"
    if name.startswith("lm_head."):
        return name
    name = "model." + re.sub(r"^midlayer\.", "layers.0.", name)
    return re.sub(r"(?<=\.)(\w+_proj)(?=\.)", lambda m: _FUSED.get(m[1], m[1]), name)


def aliased(drafter: nn.Module, policy: nn.Module) -> set[str]:
    """Parameters of the drafter that *are* the policy's: loading them would overwrite it."""
    policy_ids = {id(parameter) for parameter in policy.parameters()}
    return {
        name
        for name, parameter in drafter.named_parameters(remove_duplicate=False)
        if id(parameter) in policy_ids
    }


def check_tensors(
    where: str, tensors: Mapping[str, Tensor], drafter: nn.Module, policy: nn.Module, *, tp: int
) -> None:
    """Every tensor has its parameter, every parameter its tensors, and the shapes agree.

    Args:
        where: the checkpoint, for the message.
        tensors: of the checkpoint.
        drafter: the running module.
        policy: the running policy.
        tp: tensor-parallel ranks; with more than one a rank holds part of a shape, which is then
            left to vLLM's loaders.

    Raises:
        CheckpointError: names the tensor.
    """
    shared, shapes = aliased(drafter, policy), _checkpoint_shapes(drafter)
    given: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        live = live_name(name)
        if live is None:
            continue
        if live in shared:
            raise CheckpointError(where, name, "is shared with the policy and would overwrite it")
        if live not in shapes:
            raise CheckpointError(where, name, "the running drafter has no such tensor")
        given.setdefault(live, []).append(tensor)
    for live, shape in shapes.items():
        if live in shared:
            continue
        if live not in given:
            raise CheckpointError(where, live, "missing; the running drafter has it")
        rows = sum(tensor.shape[0] for tensor in given[live])
        # vLLM pads vocabularies.
        fits = rows <= shape[0] if live.startswith(("lm_head", "model.embed")) else rows == shape[0]
        if tp == 1 and not (fits and given[live][0].shape[1:] == shape[1:]):
            found = [rows, *given[live][0].shape[1:]]
            raise CheckpointError(where, live, f"{found}, the running drafter has {list(shape)}")


def check_config(where: str, config: Mapping[str, Any], running: Mapping[str, Any]) -> None:
    """Both configurations make the same computation of the same shapes.

    Raises:
        CheckpointError: names the key.
    """
    for key in _SAME_CONFIG:
        if key in config and key in running and config[key] != running[key]:
            raise CheckpointError(
                where, key, f"{config[key]!r}, the running drafter has {running[key]!r}"
            )


def _checkpoint_shapes(module: nn.Module) -> dict[str, Shape]:
    """Parameter shapes as checkpoints have them: on CPU, vLLM packs linears and empties them."""
    return {
        f"{prefix}.{name}" if prefix else name: tuple(meta.shape)
        for prefix, layer in module.named_modules()
        for name, meta in get_layerwise_info(layer).restore_metadata[0].items()
    }
