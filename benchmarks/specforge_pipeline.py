"""SpecForge 0.2's own recipe on a CPU: its strategy, loss, optimizer and schedule, seven depths.

What of it needs a GPU is replaced as in ``benchmarks/peers/specforge_eagle3.py``. Features stay in
memory, where it would write them to disk and read them back, so its time is a lower bound. Its
batch of one rollout is for long ones: here as many make a batch as come to about as many tokens as
drafttrain's step has.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.peers import Variant
from benchmarks.peers.specforge_eagle3 import SpecForge
from benchmarks.workload import Cell, Workload
from drafttrain.drafters.contract import write_drafter
from drafttrain.drafters.policy import PolicyShape
from drafttrain.rollouts.sources import SavedRollout
from drafttrain.training.teacher import TransformersTeacher

DEPTHS = 7
BATCH = 16


def train(
    target: Path,
    rollouts: Sequence[SavedRollout],
    layer_ids: Sequence[int],
    out: Path,
    *,
    epochs: int,
    learning_rate: float,
) -> Path:
    """Train on all of `rollouts`, `epochs` times; returns a folder that vLLM loads."""
    teacher = TransformersTeacher(target, layer_ids)
    by_length = sorted(rollouts, key=lambda rollout: rollout.length)
    taught = [
        rollout
        for start in range(0, len(by_length), 32)
        for rollout in teacher.features(by_length[start : start + 32])
    ]
    config = PolicyShape.from_folder(target).config
    assert isinstance(config, LlamaConfig), "its drafter is shaped like a Llama policy"
    longest = max(rollout.length for rollout in taught)
    cell = Cell(config.hidden_size, config.vocab_size, BATCH * longest, longest, DEPTHS)
    workload = Workload(cell, config, teacher.layout, taught, teacher.head)
    steps = epochs * (len(taught) // BATCH)
    trainer = SpecForge(workload, Variant("bfloat16"), learning_rate, steps)
    samples, shuffle = trainer.samples, random.Random(0)
    for _ in range(epochs):
        shuffle.shuffle(samples)
        for start in range(0, len(samples) - BATCH + 1, BATCH):
            trainer.samples = samples[start : start + BATCH]
            trainer.step()
    _export(trainer, config, layer_ids, out)
    return out


def _export(
    trainer: SpecForge, config: LlamaConfig, layer_ids: Sequence[int], folder: Path
) -> None:
    """In vLLM's raw layout; its tensors have those names."""
    document = config.to_dict() | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": config.vocab_size,
        "target_hidden_size": config.hidden_size,
        "norm_before_residual": False,
        "eagle_aux_hidden_state_layer_ids": list(layer_ids),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(layer_ids)},
    }
    skipped = ("embed_tokens", "d2t", "t2d")  # the policy's embedding; the whole vocabulary
    tensors: dict[str, Tensor] = {
        name: tensor
        for name, tensor in trainer.draft.state_dict().items()
        if not name.startswith(skipped)
    }
    write_drafter(folder, document, tensors, torch.float32)
