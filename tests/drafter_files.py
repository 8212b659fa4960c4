"""Small Eagle3 drafter folders for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.checkpoints.formats import expected_tensors
from drafttrain.checkpoints.manifest import Lineage, TargetFingerprint

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLMEagle3"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 20,
    "norm_before_residual": False,
    "eagle_aux_hidden_state_layer_ids": [1, 2, 4],
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 4]},
}
TARGET = TargetFingerprint(
    architecture="LlamaForCausalLM", hidden_size=8, vocab_size=20, num_hidden_layers=4
)
NOTHING = Lineage(policy_versions=[], rollouts=0, tokens=0, optimizer_steps=0)


def make_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random values for every required tensor."""
    generator = torch.Generator().manual_seed(seed)
    required = expected_tensors(config).required
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in required.items()}
    if "d2t" in tensors:
        size = config["draft_vocab_size"]
        ids = torch.randperm(config["vocab_size"], generator=generator)[:size].sort().values
        tensors["d2t"] = ids - torch.arange(size)
    return tensors


def write_drafter(
    folder: Path, config: dict[str, Any] = CONFIG, tensors: dict[str, Tensor] | None = None
) -> Path:
    """A drafter folder as an exporter would leave it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(make_tensors(config) if tensors is None else tensors, folder / "model.safetensors")
    return folder
