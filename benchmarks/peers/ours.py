"""drafttrain's own step, through the trainer that the sidecar uses."""

from __future__ import annotations

from benchmarks.peers import Contender, Variant
from benchmarks.workload import LAYER_IDS, Workload
from drafttrain.config import TrainingConfig
from drafttrain.drafters.eagle3 import Eagle3Drafter
from drafttrain.drafters.policy import PolicyShape
from drafttrain.training.trainer import Trainer


class Drafttrain(Contender):
    def __init__(self, workload: Workload, variant: Variant) -> None:
        cell = workload.cell
        drafter = Eagle3Drafter.initialise(
            PolicyShape(workload.config), layer_ids=LAYER_IDS, draft_ids=cell.draft_ids
        )
        config = TrainingConfig(
            draft_tokens=cell.ttt, tokens_per_step=cell.tokens, precision=variant.precision
        )
        self.workload = workload
        self.trainer = Trainer(drafter, config)

    def step(self) -> None:
        workload = self.workload
        self.trainer.step(workload.rollouts, workload.layout, {0: workload.head})


CONTENDER = Drafttrain
