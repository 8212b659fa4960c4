"""The whole loop on a real engine: tap, train, estimate, publish, swap."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engines import Rollouts, generate, greedy, make_engine, prompts, sampled, status

from drafttrain.checkpoints.registry import Registry
from drafttrain.config import TrainingConfig
from drafttrain.control.acceptance import estimate_acceptance, usable
from drafttrain.drafters import Eagle3Drafter, PolicyShape, load_drafter
from drafttrain.integrations.vllm.local import serve_engine
from drafttrain.pretrain import pretrain
from drafttrain.publishing import UNTRAINED, publish_drafter, publish_folder
from drafttrain.rollouts.replay import Replay
from drafttrain.telemetry import EventLog

K = 3


class Loop:
    """One engine with its own spool and registry; version 1 is untrained."""

    def __init__(self, folder: Path, policy: Path) -> None:
        self.folder, self.policy = folder, policy
        self.shape = PolicyShape.from_folder(policy)
        self.registry = Registry(folder / "registry")
        torch.manual_seed(0)
        drafter = Eagle3Drafter.from_policy(policy, self.shape, layer_ids=(1, 2, 3))
        drafter.export(folder / "untrained", torch.float32)
        publish_folder(folder / "untrained", policy, self.registry)
        self.spool = folder / "spool"
        self.engine = make_engine(
            policy,
            self.registry.folder(1),
            {"spool": str(self.spool), "registry": str(self.registry.root), "engine": "loop"},
            speculative_config={"draft_sample_method": "probabilistic"},
        )

    def rollouts(self, count: int, salt: int, temperature: float = 1.0) -> None:
        lengths = [8 + i % 9 for i in range(count)]
        generate(self.engine, prompts(lengths, salt), sampled(temperature, 40))
        self.engine.collective_rpc("drafttrain_flush")


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory, policy: Path) -> Loop:
    return Loop(tmp_path_factory.mktemp("loop"), policy)


@pytest.fixture(scope="module")
def trained(loop: Loop) -> int:
    """Registry version of a drafter trained on what the tap wrote, serving in the engine."""
    loop.rollouts(160, salt=0)
    drafter = load_drafter(loop.registry.folder(1), loop.shape)
    config = TrainingConfig(draft_tokens=K, learning_rate=5e-3, tokens_per_step=512)
    with torch.enable_grad():
        report = pretrain(drafter, Replay(loop.spool), config, steps=80)
    target = loop.registry.manifest(1).target
    manifest = publish_drafter(
        loop.registry, drafter, target, parent=1, lineage=report.lineage, acceptance=None
    )
    with serve_engine(loop.engine) as server:
        server.swap(manifest.version)
    return manifest.version


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_estimate_is_what_the_engine_counts(
    loop: Loop, trained: int, temperature: float
) -> None:
    came = Rollouts(loop.spool)
    before = status(loop.engine).acceptance
    loop.rollouts(320, salt=1 + int(10 * temperature), temperature=temperature)
    after = status(loop.engine).acceptance
    rounds = after.rounds - before.rounds
    counted = 1 + (after.accepted - before.accepted) / rounds
    assert K * rounds > 10_000

    rollouts = [rollout for rollout in came.read() if usable(rollout, K)]
    replay = Replay(loop.spool)
    replay.refresh()
    estimate = estimate_acceptance(
        load_drafter(loop.registry.folder(trained), loop.shape),
        rollouts,
        replay.layout,
        replay.heads_of(rollouts),
        k=K,
    )
    assert estimate.acceptance_length > 1.3, "a drafter that accepts nothing shows nothing"
    assert estimate.acceptance_length == pytest.approx(counted, rel=0.02)


@pytest.fixture
def sidecar(loop: Loop) -> Iterator[EventLog]:
    """A sidecar process beside the engine, which serves its control routes."""
    with serve_engine(loop.engine) as server:
        config: dict[str, Any] = {
            "target": str(loop.policy),
            "spool": str(loop.spool),
            "registry": str(loop.registry.root),
            "state": str(loop.folder / "state"),
            "engines": [server.url],
            "threads": 1,
            "training": {"draft_tokens": K, "learning_rate": 5e-3, "tokens_per_step": 512},
            "gate": {"steps_between": 20, "margin": 0.0},
        }
        (loop.folder / "sidecar.yaml").write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "drafttrain", "sidecar", str(loop.folder / "sidecar.yaml")]
        process = subprocess.Popen(command)
        yield EventLog(loop.folder / "state" / "events.jsonl")
        process.terminate()
        assert process.wait(60) == 0


def swapped_versions(events: EventLog) -> list[int]:
    return [event["version"] for event in events.read() if event["event"] == "swapped"]


def test_the_sidecar_swaps_while_the_engine_generates(
    loop: Loop, sidecar: EventLog, plain_engine: Any
) -> None:
    loop.registry.set_latest(1)
    batch = prompts([8, 11, 14, 17], salt=99)
    expected = generate(plain_engine, batch, greedy(60))
    deadline = time.monotonic() + 120
    salt = 1000
    while max(swapped := swapped_versions(sidecar), default=0) <= 1:
        assert time.monotonic() < deadline, list(sidecar.read())
        loop.rollouts(16, salt)
        assert generate(loop.engine, batch, greedy(60)) == expected
        salt += 1
    # It goes on: a newer version may have been swapped in since.
    serving = status(loop.engine).drafter_version
    assert serving is not None
    assert max(swapped) <= serving <= loop.registry.versions()[-1]
    assert generate(loop.engine, batch, greedy(60)) == expected


def test_lineage_names_what_it_was_trained_on(loop: Loop, trained: int) -> None:
    lineage = loop.registry.manifest(trained).lineage
    assert lineage.rollouts > 100
    assert lineage.policy_versions == [0]
    assert loop.registry.manifest(1).lineage == UNTRAINED
