"""Whether a verified checkpoint fits the drafter that runs, judged before anything is touched."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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

# What every MTP head shares with its policy, wherever its family keeps it.
_POLICYS_OWN = ("embed_tokens", "lm_head", "shared_head.head")

# vLLM stacks a layer's experts by rules of its own; whether all came shows when they are loaded.
_STACKED = ".experts."

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
    "partial_rotary_factor",
    "attention_bias",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "num_hidden_layers",
)


@dataclass(frozen=True)
class Names:
    """How a drafter's checkpoint names the parameters of the running module.

    Attributes:
        live: a checkpoint tensor's parameter in the running module; None: it belongs to none.
            Without the function itself only the module's own ``load_weights`` knows (some MTP
            families), and whether everything came shows when it has been called.
        shared: parameters of the drafter that *are* the policy's: loading them would overwrite it.
    """

    live: Callable[[str], str | None] | None
    shared: frozenset[str]

    @classmethod
    def of_drafter(cls, drafter: nn.Module, policy: nn.Module, method: str) -> Names:
        """Of a drafter that vLLM runs with this method."""
        policy_ids = {id(parameter) for parameter in policy.parameters()}
        parameters = drafter.named_parameters(remove_duplicate=False)
        shared = frozenset(name for name, p in parameters if id(p) in policy_ids)
        if method == "eagle3":
            return cls(_eagle3_name, shared)
        mapper = getattr(drafter, "hf_to_vllm_mapper", None)
        return cls(None if mapper is None else mapper.map_name, shared)

    def is_shared(self, name: str) -> bool:
        """Whether a checkpoint tensor is one of the policy's own."""
        if self.live is None:
            return any(part in name for part in _POLICYS_OWN)
        return self.live(name) in self.shared


def _eagle3_name(name: str) -> str | None:
    if name in _NOT_LOADED:
        return None
    if name == "d2t":
        return "draft_id_to_target_id"
    if name.startswith("lm_head."):
        return name
    name = "model." + re.sub(r"^midlayer\.", "layers.0.", name)
    return re.sub(r"(?<=\.)(\w+_proj)(?=\.)", lambda m: _FUSED.get(m[1], m[1]), name)


def check_tensors(
    where: str, tensors: Mapping[str, Tensor], names: Names, drafter: nn.Module, *, tp: int
) -> None:
    """Every tensor has its parameter, every parameter its tensors, and the shapes agree.

    Args:
        where: the checkpoint, for the message.
        tensors: of the checkpoint.
        names: of the drafter.
        drafter: the running module.
        tp: tensor-parallel ranks; with more than one a rank holds part of a shape, which is then
            left to vLLM's loaders.

    Raises:
        CheckpointError: names the tensor.
    """
    for name in tensors:
        if names.is_shared(name):
            raise CheckpointError(where, name, "is shared with the policy and would overwrite it")
    if names.live is None:
        return
    shapes, given = _checkpoint_shapes(drafter), defaultdict[str, list[Tensor]](list)
    for name, tensor in tensors.items():
        live = names.live(name)
        if live is None or _STACKED in live:
            continue
        if live not in shapes:
            raise CheckpointError(where, name, "the running drafter has no such tensor")
        given[live].append(tensor)
    for live, shape in shapes.items():
        if live in names.shared or _STACKED in live:
            continue
        if live not in given:
            raise CheckpointError(where, live, "missing; the running drafter has it")
        if tp == 1:
            _check_shape(where, live, given[live], shape)


def _check_shape(where: str, live: str, parts: list[Tensor], shape: Shape) -> None:
    """Of a parameter and the checkpoint tensors that vLLM fuses into it."""
    found = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    # vLLM pads vocabularies.
    padded = live.startswith(("lm_head", "model.embed")) and found[0] <= shape[0]
    if found[1:] != shape[1:] or not (padded or found[0] == shape[0]):
        problem = f"{list(found)}, the running drafter has {list(shape)}"
        raise CheckpointError(where, live, problem)


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
    """Parameter shapes as checkpoints have them: on CPU, vLLM packs linears and empties them.

    vLLM notes shapes before a linear gets its bias, which it never packs.
    """
    shapes: dict[str, Shape] = {}
    for prefix, layer in module.named_modules():
        noted = get_layerwise_info(layer).restore_metadata[0]
        own = {name: p for name, p in layer.named_parameters(recurse=False) if p.numel()}
        for name, parameter in (own | noted).items():
            shapes[f"{prefix}.{name}" if prefix else name] = tuple(parameter.shape)
    return shapes
