"""speculators 0.9: one packed sequence with document ids, its Eagle3 model, its trainer's step.

Its defaults need a GPU: flex attention has no backward on CPU, the fused loss has no Triton driver
and the command line assumes an accelerator. So on a CPU its ``sdpa`` attention (``eager`` takes 2
to 4 times as long) and its eager kl_div are used, in the step of its
``train/trainer.py:train_epoch`` with its AdamW; the lm_head is frozen, as it comes.
"""

from __future__ import annotations

import torch
from speculators.config import SpeculatorsConfig, VerifierConfig
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from speculators.models.eagle3.data import shift_batch
from speculators.proposals.greedy import GreedyTokenProposalConfig
from speculators.train.data import CollateFn
from torch import Tensor
from transformers import LlamaConfig

from benchmarks.peers import Contender, Variant
from benchmarks.workload import DEVICE, LAYER_IDS, Workload
from drafttrain.rollouts.record import Rollout

ATTENTION, LOSS = ("sdpa", "eager") if DEVICE.type == "cpu" else ("simple_flex_attention", "fused")


class Speculators(Contender):
    def __init__(self, workload: Workload, variant: Variant) -> None:
        cell = workload.cell
        self.dtype = getattr(torch, variant.precision)
        self.model = _draft_model(workload).train().to(DEVICE)
        self.arguments = Eagle3DraftModel.get_trainer_kwargs(
            loss_fn="kl_div",
            loss_implementation=LOSS,
            ttt_steps=cell.ttt,
            ttt_step_loss_decay=1.0,
        )[0]
        self.optimizer = torch.optim.AdamW(self.model.named_parameters(), lr=1e-3)
        self.samples = [_sample(rollout) for rollout in workload.rollouts]
        self.per_pack = -(-len(self.samples) // variant.micro_batches)
        self.collate = CollateFn(
            max_len=self.per_pack * (cell.rollout_length - 1),
            hidden_size=cell.hidden,
            dtype=self.dtype,
            preprocess=shift_batch,
        )

    def step(self) -> None:
        self.optimizer.zero_grad()
        for start in range(0, len(self.samples), self.per_pack):
            part = self.samples[start : start + self.per_pack]
            batch = {
                name: value.to(DEVICE, non_blocking=True) if torch.is_tensor(value) else value
                for name, value in self.collate(part).items()
            }
            with torch.autocast(DEVICE.type, self.dtype, enabled=self.dtype != torch.float32):
                _, loss, _ = self.model(**batch, **self.arguments)
            (loss * (len(part) / len(self.samples))).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()


def _draft_model(workload: Workload) -> Eagle3DraftModel:
    cell, head = workload.cell, workload.head
    layer = LlamaConfig(**workload.config.to_dict() | {"num_hidden_layers": 1})
    layer._attn_implementation = ATTENTION
    config = Eagle3SpeculatorConfig(
        transformer_layer_config=layer,
        draft_vocab_size=cell.draft_vocab or cell.vocab,
        eagle_aux_hidden_state_layer_ids=list(LAYER_IDS),
        speculators_config=SpeculatorsConfig(
            algorithm="eagle3",
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=cell.ttt)],
            default_proposal_method="greedy",
            verifier=VerifierConfig.from_config(workload.config, name_or_path=None),
        ),
    )
    model = Eagle3DraftModel(config)
    ids = cell.draft_ids
    if ids is not None:
        drafted = torch.zeros(cell.vocab, dtype=torch.bool)
        drafted[ids] = True
        model.load_vocab_mappings(drafted, ids - torch.arange(len(ids)))
    lm_head = head.lm_head if ids is None else head.lm_head[ids]
    with torch.no_grad():
        model.embed_tokens.weight.copy_(head.embed_tokens)
        model.lm_head.weight.copy_(lm_head)
        model.verifier_lm_head.weight.copy_(lm_head)
    return model


def _sample(rollout: Rollout) -> dict[str, Tensor]:
    """What its dataset gives for one rollout."""
    assert rollout.aux_hidden is not None
    return {
        "hidden_states": rollout.aux_hidden.flatten(1),
        "input_ids": rollout.tokens.long(),
        "verifier_last_hidden_states": rollout.last_hidden,
        "loss_mask": torch.ones(rollout.length, dtype=torch.bool),
        "lengths": torch.tensor([rollout.length]),
        "position_ids": torch.arange(rollout.length),
    }


CONTENDER = Speculators
