"""What trains and estimates, run on one device: as a program on the pretended one.

``python tests/device_runs.py FOLDER`` prints, as JSON, the figures of every run.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import making
import torch
from torch import Tensor

from drafttrain.config import GateConfig, SidecarConfig, TrainingConfig
from drafttrain.control.acceptance import estimate_acceptance
from drafttrain.drafters import KINDS
from drafttrain.drafters.eagle3 import Eagle3Drafter
from drafttrain.evaluation import evaluate
from drafttrain.opening import Inputs
from drafttrain.pretrain import pretrain
from drafttrain.rollouts.record import PolicyHead, Rollout
from drafttrain.rollouts.replay import Replay
from drafttrain.rollouts.spool import SpoolWriter
from drafttrain.sidecar import Sidecar
from drafttrain.training.devices import Devices
from drafttrain.training.trainer import Trainer

POLICY = making.policy_shape()
LAYOUT = making.layout(POLICY)
UNNORMED = dataclasses.replace(LAYOUT, last_hidden_normed=False)
HEADS = {version: making.policy_head(POLICY, version) for version in (0, 1)}
CONFIG = TrainingConfig(draft_tokens=3, learning_rate=3e-3, tokens_per_step=64, precision="float32")
OPTIONS = {"eagle3": {"layer_ids": making.LAYERS}, "mtp": {}, "draft_model": {"layers": 2}}
HELD_OUT = making.rollouts(POLICY, 6, seed=9)


def put_on(device: torch.device) -> None:
    """Let it be what every process here trains on."""
    plain = Devices.__init__

    def joined(self: Devices, *, sharded: bool = False) -> None:
        plain(self, sharded=sharded)
        self.device = device

    Devices.__init__ = joined  # type: ignore[method-assign]


def runs(folder: Path, device: torch.device) -> Iterator[tuple[str, list[float]]]:
    """Names and figures, in `folder`."""
    for kind in KINDS:
        torch.manual_seed(0)
        drafter = KINDS[kind].initialise(POLICY, **OPTIONS[kind])
        yield kind, _steps(Trainer(drafter, CONFIG), folder / kind)
    yield "several policies", _steps(_trainer(staleness_decay=0.5), folder / "s", _several)
    yield "features on both", _steps(_trainer(), folder / "b", lambda seed: _on_both(seed, device))
    yield "temperatures", _steps(_trainer(objective="lk"), folder / "t", _warm)
    yield "rejected", _steps(_trainer(rejected_weight=4.0), folder / "r", _rejected)
    yield "before the norm", _steps(_trainer(), folder / "n", layout=UNNORMED)
    yield "draft vocabulary", _steps(_trainer(draft_ids=torch.arange(0, 23, 2)), folder / "v")
    precision = "bfloat16" if device.type == "cpu" else "auto"
    yield "bfloat16", _steps(_trainer(precision=precision), folder / "p")
    _write_spool(folder)
    yield "pretrain", _pretrained(folder)
    yield "sidecar", _sidecar(folder)
    yield "eval", _evaluated(folder)


def _trainer(draft_ids: Tensor | None = None, **settings: object) -> Trainer:
    torch.manual_seed(0)
    drafter = Eagle3Drafter.initialise(POLICY, layer_ids=making.LAYERS, draft_ids=draft_ids)
    return Trainer(drafter, CONFIG.model_copy(update=settings))


def _plain(seed: int) -> list[Rollout]:
    return making.rollouts(POLICY, 6, seed=seed)


def _several(seed: int) -> list[Rollout]:
    return _plain(seed) + making.rollouts(POLICY, 6, seed=seed, version=1)


def _on_both(seed: int, device: torch.device) -> list[Rollout]:
    first, *rest = _plain(seed)
    assert first.aux_hidden is not None
    moved = {"last_hidden": first.last_hidden.to(device), "aux_hidden": first.aux_hidden.to(device)}
    return [dataclasses.replace(first, **moved), *rest]


def _warm(seed: int) -> list[Rollout]:
    return [dataclasses.replace(rollout, temperature=0.7) for rollout in _plain(seed)]


def _rejected(seed: int) -> list[Rollout]:
    return [
        dataclasses.replace(rollout, rejected=torch.arange(rollout.length) % 3 == 0)
        for rollout in _plain(seed)
    ]


def _steps(
    trainer: Trainer,
    state: Path,
    rollouts: Callable[[int], list[Rollout]] = _plain,
    layout: object = LAYOUT,
    heads: dict[int, PolicyHead] = HEADS,
) -> list[float]:
    """Losses of two steps, with a save and a restore in between; then the acceptance length."""
    losses = [trainer.step(rollouts(0), layout, heads).loss]
    trainer.save(state)
    trainer.restore(state)
    losses.append(trainer.step(rollouts(1), layout, heads).loss)
    estimate = estimate_acceptance(trainer.average, HELD_OUT, layout, heads, k=3)
    trainer.average.export(state / "drafter", torch.float32)
    return [*losses, estimate.acceptance_length]


def _write_spool(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    POLICY.config.save_pretrained(folder / "policy")
    making.drafter(POLICY).export(folder / "first")
    writer = SpoolWriter(folder / "spool", engine="test")
    writer.write_head(HEADS[0])
    writer.write(making.rollouts(POLICY, 60), LAYOUT)


def _pretrained(folder: Path) -> list[float]:
    report = pretrain(making.drafter(POLICY), Replay(folder / "spool"), CONFIG, steps=4)
    return [*report.losses, report.acceptance.acceptance_length]


def _sidecar(folder: Path) -> list[float]:
    """A candidate, judged."""
    sidecar = Sidecar(
        SidecarConfig(
            target=folder / "policy",
            spool=folder / "spool",
            registry=folder / "registry",
            state=folder / "state",
            drafter=folder / "first",
            training=CONFIG,
            gate=GateConfig(steps_between=3, held_out_rollouts=8),
        ),
        engines=[],
    )
    sidecar.replay.refresh()
    sidecar._train_until_candidate()
    sidecar._offer_candidate()
    (judged,) = (event for event in sidecar.events.read() if event["event"] == "judged")
    assert sidecar.serving.device == sidecar.trainer.drafter.device
    return [judged["candidate"], judged["serving"]]


def _evaluated(folder: Path) -> list[float]:
    inputs = Inputs(folder / "policy", [folder / "spool"])
    (result,) = evaluate(inputs, [folder / "first"], k=2, method="greedy")
    return [result.estimate.acceptance_length]


if __name__ == "__main__":
    import pretend_gpu

    elsewhere = pretend_gpu.register()
    try:  # what all of this is for
        torch.ones(2, device=elsewhere) + torch.ones(2)
    except RuntimeError:
        put_on(elsewhere)
    print(json.dumps(dict(runs(Path(sys.argv[1]), elsewhere))))
