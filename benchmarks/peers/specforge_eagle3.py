"""SpecForge 0.2: padded batches, its Eagle3 strategy, its optimizer with float32 masters.

Its defaults need a GPU: flex attention has no backward on CPU and the Triton loss has no driver.
So there its ``sdpa`` backend and its reference loss (``specforge/core/loss.py:_compute_loss``) are
used; its ``torch.compile`` decorators stay on.
"""

from __future__ import annotations

import tempfile

import specforge.algorithms.eagle3.model as eagle3_model
import torch
from specforge.algorithms.eagle3.data import normalize_offline_sample
from specforge.core.loss import _compute_loss
from specforge.data.utils import DataCollatorWithPadding
from specforge.modeling.draft.llama3_eagle import LlamaForCausalLMEagle3
from specforge.modeling.target.target_head import TargetHead
from specforge.optimizer import BF16Optimizer
from specforge.runtime.contracts import TrainBatch
from specforge.training.strategies.base import Eagle3TrainStrategy
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.peers import Contender, Variant
from benchmarks.workload import DEVICE, Workload
from drafttrain.rollouts.record import PolicyHead, Rollout

ATTENTION = "sdpa" if DEVICE.type == "cpu" else "flex_attention"


class _ReferenceLoss:
    """Stands in for the Triton loss of the same signature."""

    apply = staticmethod(_compute_loss)


class SpecForge(Contender):
    """See the module.

    Attributes:
        draft: its drafter, in the variant's precision.
        samples: what a step trains on.
    """

    def __init__(
        self,
        workload: Workload,
        variant: Variant,
        learning_rate: float = 1e-4,
        total_steps: int = 800_000,
    ) -> None:
        if DEVICE.type == "cpu":
            eagle3_model.LogSoftmaxLoss = _ReferenceLoss
        dtype = getattr(torch, variant.precision)
        self.draft = _draft_model(workload).to(DEVICE, dtype)
        model = eagle3_model.OnlineEagle3Model(
            self.draft, length=workload.cell.ttt, attention_backend=ATTENTION
        )
        self.strategy = Eagle3TrainStrategy(
            model, target_head=_target_head(workload.config, workload.head).to(DEVICE, dtype)
        )
        self.optimizer = BF16Optimizer(self.draft, lr=learning_rate, total_steps=total_steps)
        self.collate = DataCollatorWithPadding()
        self.samples = [_sample(rollout, dtype) for rollout in workload.rollouts]
        self.micro_batches = variant.micro_batches

    def step(self) -> None:
        size = -(-len(self.samples) // self.micro_batches)
        for start in range(0, len(self.samples), size):
            part = self.samples[start : start + size]
            length = max(sample["input_ids"].shape[-1] for sample in part)
            tensors = self.collate([normalize_offline_sample(raw, length) for raw in part])
            batch = TrainBatch([], "eagle3", tensors, {"target_repr": "hidden_state"})
            output = self.strategy.forward_loss(batch)
            (output.loss * (len(part) / len(self.samples))).backward()
        self.optimizer.step()


def _draft_model(workload: Workload) -> LlamaForCausalLMEagle3:
    config = workload.config.to_dict() | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "num_hidden_layers": 1,
        "draft_vocab_size": workload.cell.draft_vocab or workload.cell.vocab,
    }
    draft = LlamaForCausalLMEagle3(LlamaConfig(**config), attention_backend=ATTENTION)
    ids = workload.cell.draft_ids
    if ids is not None:
        draft.t2d.zero_()[ids] = True
        draft.d2t.copy_(ids - torch.arange(len(ids)))
    with torch.no_grad():
        draft.embed_tokens.weight.copy_(workload.head.embed_tokens)
    draft.freeze_embedding()
    return draft


def _target_head(config: LlamaConfig, head: PolicyHead) -> TargetHead:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)  # it reads its sizes from a folder
        target_head = TargetHead(folder)
    with torch.no_grad():
        target_head.fc.weight.copy_(head.lm_head)
    target_head.freeze_weights()
    return target_head.eval()


def _sample(rollout: Rollout, dtype: torch.dtype) -> dict[str, Tensor]:
    """A record of its offline feature files."""
    assert rollout.aux_hidden is not None
    return {
        "input_ids": rollout.tokens.long(),
        "loss_mask": (rollout.sampled_runs > 0).long(),
        "hidden_state": rollout.last_hidden.to(dtype),
        "aux_hidden_state": rollout.aux_hidden.flatten(1).to(dtype),
    }


CONTENDER = SpecForge
