"""Eagle3 drafters in the layout of the ``speculators`` library (0.9), which ``vllm serve`` reads.

The tensors are those of the raw layout with the decoder layer called ``layers.0.``; ``config.json``
nests the layer's configuration and names the policy. A draft vocabulary has ``t2d`` beside ``d2t``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafttrain.checkpoints.eagle3_format import LLAMA, QWEN3
from drafttrain.errors import CheckpointError

_TYPE = "speculators_model_type"
_LAYER_CONFIG = "transformer_layer_config"

# Keys of the drafter itself, and what the engine takes them for when they are absent.
_OWN: dict[str, Any] = {
    "draft_vocab_size": None,
    "target_hidden_size": None,
    "norm_before_residual": True,
    "norm_before_fc": False,
    "fc_norm": False,
    "norm_output": False,
    "eagle_aux_hidden_state_layer_ids": None,
}
_ARCHITECTURES = {"llama": LLAMA, "qwen3": QWEN3}


def is_speculators(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is of this layout."""
    return _TYPE in config


def as_raw(config: dict[str, Any], where: str | Path = "config.json") -> dict[str, Any]:
    """The raw layout's ``config.json`` that says the same.

    Raises:
        CheckpointError: not an Eagle3 drafter, or of a layer the engine does not know.
    """
    if config[_TYPE] != "eagle3":
        raise CheckpointError(where, _TYPE, f"{config[_TYPE]!r:.80}, expected 'eagle3'")
    layer = config.get(_LAYER_CONFIG)
    if not isinstance(layer, dict):
        raise CheckpointError(where, _LAYER_CONFIG, "expected an object")
    model_type = layer.get("model_type", "llama")
    if model_type not in _ARCHITECTURES:
        known = " or ".join(_ARCHITECTURES)
        problem = f"{model_type!r:.80}, expected {known}"
        raise CheckpointError(where, f"{_LAYER_CONFIG}.model_type", problem)
    given = {key: config[key] for key in _OWN if config.get(key) is not None}
    own = {key: value for key, value in (_OWN | given).items() if value is not None}
    # Of this layout the engine does not ask whether a window is used: layers say it themselves.
    own["use_sliding_window"] = bool(layer.get("layer_types"))
    return {**layer, **own, "architectures": [_ARCHITECTURES[model_type]]}


def as_speculators(
    config: dict[str, Any], policy: str, policy_architectures: list[str], k: int
) -> dict[str, Any]:
    """``config.json`` of this layout.

    Args:
        config: of the raw layout, with defaults filled in.
        policy: its name or folder, which ``vllm serve`` starts from.
        policy_architectures: as its ``config.json`` has them.
        k: draft tokens ``vllm serve`` then drafts.
    """
    qwen3 = config["architectures"] == [QWEN3]
    # The number of aux layers stays: the engine finds it there, or takes it for three.
    dropped = {*_OWN, "architectures", "eagle_config"}
    layer = {key: value for key, value in config.items() if key not in dropped}
    layer["model_type"] = "qwen3" if qwen3 else "llama"
    greedy = {
        "proposal_type": "greedy",
        "speculative_tokens": k,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    return {
        _TYPE: "eagle3",
        "architectures": ["Eagle3Speculator"],
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [greedy],
            "verifier": {"name_or_path": policy, "architectures": policy_architectures},
        },
        _LAYER_CONFIG: layer,
        **{key: config[key] for key in _OWN},
    }


def with_t2d(tensors: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """With ``t2d`` (bool [V], the target ids that can be drafted) where there is ``d2t``.

    vLLM passes it over; SGLang and ``speculators`` need it.
    """
    if "d2t" not in tensors:
        return tensors
    drafted = torch.zeros(vocab_size, dtype=torch.bool)
    offsets = tensors["d2t"].cpu()
    drafted[torch.arange(len(offsets)) + offsets] = True
    return tensors | {"t2d": drafted}
