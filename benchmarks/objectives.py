"""Which objective fits which way of drafting: measured by a real engine's own counters.

One Eagle3 drafter, one set of rollouts of the demo's policy, one number of steps; only the
objective differs. Each trained drafter is swapped into an engine that drafts greedily and one that
drafts probabilistically, and both sample new prompts at the temperature the rollouts were made at.

    python -m benchmarks.objectives [--json] [--policy DIR] [--steps N] [--temperature T] ...
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.engines import Engine
from benchmarks.subjects import demo_policy
from drafttrain.checkpoints.manifest import TargetFingerprint
from drafttrain.checkpoints.registry import Registry
from drafttrain.config import ObjectiveName, TrainingConfig
from drafttrain.control.acceptance import DraftSampleMethod
from drafttrain.demo.saved import MAX_TOKENS
from drafttrain.demo.task import Task
from drafttrain.drafters import Eagle3Drafter, PolicyShape, load_drafter
from drafttrain.integrations.vllm.local import serve_engine
from drafttrain.pretrain import pretrain
from drafttrain.publishing import publish_drafter, publish_folder
from drafttrain.rollouts.replay import Replay
from drafttrain.training.objectives import OBJECTIVES

K = 3
ROLLOUTS = 1024
METHODS: tuple[DraftSampleMethod, ...] = ("greedy", "probabilistic")


@dataclass(frozen=True)
class Cell:
    """Acceptance length of one objective's drafter under one way of drafting."""

    objective: str
    draft_sample_method: str
    temperature: float
    drafted: int
    acceptance_length: float


class Comparison:
    """A policy's rollouts, and a registry with one version for each objective.

    Args:
        folder: to work in.
        policy: of the demo.
        steps: of training.
        temperature: of all sampling.
    """

    def __init__(self, folder: Path, policy: Path, steps: int, temperature: float) -> None:
        self.folder, self.policy, self.task = folder, policy, Task()
        self.steps, self.temperature = steps, temperature
        self.registry = Registry(folder / "registry")
        start = folder / "start"
        torch.manual_seed(0)
        shape = PolicyShape.from_folder(policy)
        Eagle3Drafter.from_policy(policy, shape).export(start, torch.float32)
        publish_folder(start, policy, self.registry)
        self._sample(self.engine("probabilistic", "rollouts"), ROLLOUTS, "seen")
        self.replay = Replay(folder / "rollouts")
        self.versions = {name: self._train(name) for name in OBJECTIVES}

    def engine(self, method: DraftSampleMethod, spool: str) -> Engine:
        return Engine(
            self.policy,
            self.registry.folder(1),
            method="eagle3",
            k=K,
            spool=self.folder / spool,
            draft_sample_method=method,
            registry=self.registry.root,
        )

    def cells(self, drafted: int) -> Iterator[Cell]:
        for method in METHODS:
            engine = self.engine(method, method)
            with serve_engine(engine.llm) as server:
                for name, version in self.versions.items():
                    server.swap(version)
                    yield self._count(engine, name, method, drafted)

    def _train(self, name: ObjectiveName) -> int:
        target = TargetFingerprint.from_folder(self.policy)
        drafter = load_drafter(self.registry.folder(1), PolicyShape.from_folder(self.policy))
        config = TrainingConfig(objective=name, draft_tokens=K, tokens_per_step=1024)
        report = pretrain(drafter, self.replay, config, steps=self.steps)
        manifest = publish_drafter(
            self.registry, drafter, target, parent=1, lineage=report.lineage, acceptance=None
        )
        return manifest.version

    def _count(
        self, engine: Engine, name: ObjectiveName, method: DraftSampleMethod, drafted: int
    ) -> Cell:
        before, part = engine.acceptance(), 0
        while engine.acceptance().drafted - before.drafted < drafted:
            self._sample(engine, 64, f"unseen {part}")  # the same prompts for all
            part += 1
        after = engine.acceptance()
        accepted = sum(after.accepted_per_position) - sum(before.accepted_per_position)
        length = 1 + accepted / (after.rounds - before.rounds)
        return Cell(name, method, self.temperature, after.drafted - before.drafted, length)

    def _sample(self, engine: Engine, count: int, seed: str) -> None:
        rng = random.Random(seed)
        prompts = [self.task.sample_problem(rng).prompt_ids for _ in range(count)]
        engine.generate(prompts, self.temperature, MAX_TOKENS, stop=self.task.eos_id)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--policy", type=Path, help="a policy of the demo; trained when absent")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps each")
    parser.add_argument("--drafted", type=int, default=20_000, help="draft tokens a measurement")
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        policy = options.policy or demo_policy(Path(folder))
        comparison = Comparison(Path(folder), policy, options.steps, options.temperature)
        cells = list(comparison.cells(options.drafted))
    if options.json:
        print(json.dumps({"cells": [asdict(cell) for cell in cells]}))
        return
    for cell in cells:
        print(
            f"{cell.draft_sample_method:14} {cell.objective:20} {cell.acceptance_length:.3f} "
            f"({cell.drafted} drafted)"
        )


if __name__ == "__main__":
    main()
