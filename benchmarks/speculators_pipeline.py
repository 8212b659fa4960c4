"""The pipeline of speculators 0.9 on a CPU: features to disk, then its own trainer.

Its features come from a vLLM server whose connector needs a GPU, so they are written here, in its
layout, by transformers; that is no slower. Its trainer asks for an accelerator in three places,
which are pointed at the CPU; flex attention and its Triton loss have no CPU form, so its ``sdpa``
and ``eager`` ones are used. Nothing else is changed: optimizer and schedule are its defaults, but
for the learning rate, which has to fit so small a policy.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset
from safetensors.torch import save_file

from drafttrain.drafters.policy import PolicyShape
from drafttrain.rollouts.sources import SavedRollout
from drafttrain.training.teacher import TransformersTeacher

_TRAINER = """
import torch
import speculators.train.trainer as trainer
from speculators.train.__main__ import TrainConfig, main

trainer.get_local_rank = lambda: torch.device("cpu")
torch.accelerator.synchronize = lambda *_: None
main(TrainConfig.resolve())
"""


def dump_features(
    target: Path, rollouts: Sequence[SavedRollout], layer_ids: Sequence[int], folder: Path
) -> None:
    """Write its dataset, and one file of hidden states for each rollout."""
    last = PolicyShape.from_folder(target).num_layers
    rows = [
        {
            "input_ids": rollout.tokens.tolist(),
            "loss_mask": rollout.generated.int().tolist(),
            "seq_len": rollout.length,
        }
        for rollout in rollouts
    ]
    Dataset.from_list(rows).with_format("torch").save_to_disk(str(folder))
    (folder / "hidden_states").mkdir()
    # It wants the last hidden state before the final norm: the state after the last layer.
    teacher = TransformersTeacher(target, (*layer_ids, last))
    numbers = {id(rollout): number for number, rollout in enumerate(rollouts)}
    by_length = sorted(rollouts, key=lambda rollout: rollout.length)
    for start in range(0, len(rollouts), 32):
        part = by_length[start : start + 32]
        for rollout, features in zip(part, teacher.features(part), strict=True):
            assert features.aux_hidden is not None
            tensors = {
                "token_ids": rollout.tokens.long(),
                "hidden_states": features.aux_hidden.contiguous(),
            }
            save_file(tensors, folder / "hidden_states" / f"hs_{numbers[id(rollout)]}.safetensors")


def train(
    target: Path,
    layer_ids: Sequence[int],
    data: Path,
    out: Path,
    *,
    k: int,
    epochs: int,
    learning_rate: float,
) -> Path:
    """Run its trainer; returns the checkpoint it holds best.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    options = {
        "speculator-type": "eagle3",
        "verifier-name-or-path": target,
        "draft-vocab-size": PolicyShape.from_folder(target).vocab_size,
        "draft-attn-impl": "sdpa",
        "draft-arch": "llama",
        "full-attention-indices": 0,
        "mask-token-id": 0,
        "loss-implementation": "eager",
        "data-path": data,
        "hidden-states-path": data / "hidden_states",
        "hidden-states-dtype": "float32",
        "on-missing": "raise",
        "total-seq-len": 2048,
        "num-workers": 0,
        "ttt-steps": k,
        "lr": learning_rate,
        "epochs": epochs,
        "save-path": out,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    arguments += ["--target-layer-ids", *map(str, layer_ids), "--save-best"]
    command = [sys.executable, "-c", _TRAINER, *arguments]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return out / "checkpoint_best"
