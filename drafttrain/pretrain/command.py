"""The ``pretrain`` command: load, predict, train, publish, report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from drafttrain.checkpoints.manifest import FILE_NAME, Manifest, TargetFingerprint
from drafttrain.checkpoints.registry import Registry
from drafttrain.config import PretrainConfig
from drafttrain.drafters import load_drafter
from drafttrain.drafters.contract import Drafter
from drafttrain.drafters.policy import PolicyShape
from drafttrain.errors import ConfigError
from drafttrain.opening import Inputs, Opened, Say, open_corpus
from drafttrain.outputs import check_new_folder, make_folder, writing
from drafttrain.pretrain.memory import MemoryPlan, fit_microbatch, predict
from drafttrain.pretrain.report import REPORT, memory_bound_cost, write_report
from drafttrain.pretrain.run import Pretraining, PretrainReport, Progress
from drafttrain.publishing import as_manifest_entry, publish_drafter
from drafttrain.training.devices import Devices, computed_in
from drafttrain.training.state import STATE, unfinished_states


@dataclass(frozen=True)
class PretrainCommand:
    """What the user asked for.

    Attributes:
        inputs: policy and rollouts.
        drafter: folder to start from.
        registry: where the result is published.
        out: folder for the state, the report and the plot.
        config: of the run.
        resume: continue the unfinished run in `out`.
        memory: bytes that a process may take; the microbatch is made to fit. None does not ask.
        sharded: divide the drafter among the processes (FSDP2).
    """

    inputs: Inputs
    drafter: Path
    registry: Path
    out: Path
    config: PretrainConfig
    resume: bool = False
    memory: int | None = None
    sharded: bool = False

    def kept(self) -> str:
        """What an interrupted run leaves, for a person."""
        if (self.out / STATE).exists():
            return f"{self.out} keeps its last saved state, and --resume continues from there"
        return f"no state was saved in {self.out} yet"


@dataclass(frozen=True)
class Pretrained:
    """What came of it.

    Attributes:
        manifest: of the published version.
        report: of the run.
        report_path: of ``report.md``.
    """

    manifest: Manifest
    report: PretrainReport
    report_path: Path


def run_pretrain(
    command: PretrainCommand,
    say: Say = lambda sentence: None,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> Pretrained | None:
    """Do it; only the first of several processes publishes, the others return None.

    Raises:
        CheckpointError: the policy, the drafter or the registry is wrong.
        RolloutError: the rollouts are.
        ConfigError: the settings do not fit, or an unfinished run is in the way, or none is there
            to continue.
    """
    _open_out(command)
    devices = Devices(sharded=command.sharded)
    say = say if devices.rank == 0 else lambda sentence: None
    shape = PolicyShape.from_folder(command.inputs.target)
    drafter = load_drafter(command.drafter, shape)
    registry = Registry(command.registry)
    opened = _open(command, drafter, say, devices)
    config = command.config
    plan = _plan(drafter, shape, opened, config, devices)
    say(f"memory: about {plan}")
    if command.memory is not None:
        config = _fitted(command, drafter, shape, opened, devices)
        opened.corpus.divide(config.microbatch_tokens)
        say(f"memory: microbatches of {config.microbatch_tokens} tokens fit")
    run = Pretraining(
        drafter,
        opened.corpus,
        config,
        devices=devices,
        state=command.out,
        identity=_identity(command, config, opened),
    )
    if command.resume:
        run.resume()
        say(f"resumed after step {run.trainer.step_count}")
    report = run.run(on_step)
    estimates = {k: run.estimate(k=k) for k in range(1, config.training.draft_tokens + 1)}
    finished = run.trainer.whole_drafter
    if devices.rank > 0:
        return None
    manifest = _publish(command, registry, finished, report, opened)
    cost = memory_bound_cost(registry.folder(manifest.version), command.inputs.target)
    with writing(command.out, f"report of version {manifest.version}, which is published"):
        path = write_report(command.out, manifest, report, estimates, cost)
    for left in (command.out / STATE, *unfinished_states(command.out)):
        left.unlink(missing_ok=True)
    return Pretrained(manifest, report, path)


def _open_out(command: PretrainCommand) -> None:
    """Whether `out` can take the run is known before hours go into it."""
    with writing(command.out):
        unfinished = (command.out / STATE).exists()
    if command.resume and not unfinished:
        problem = "there is nothing to resume: no unfinished run has saved its state here"
        raise ConfigError(command.out, "run", problem)
    if unfinished and not command.resume:
        raise ConfigError(command.out, "run", "is unfinished; --resume continues it, or delete it")
    if not (command.resume or _is_done_with(command.out)):
        check_new_folder(command.out)
    make_folder(command.out)


def _is_done_with(out: Path) -> bool:
    """Whether a run has ended here, or was killed in its first save: another may use it."""
    return (out / REPORT).exists() or unfinished_states(out) == set(out.glob("*"))


def _open(command: PretrainCommand, drafter: Drafter, say: Say, devices: Devices) -> Opened:
    """Open the corpus; with a cache the first process writes it before the others read it."""
    if devices.rank > 0:
        devices.wait()
    opened = open_corpus(
        command.inputs, drafter.layer_ids, command.config, say, normed=drafter.reads_normed
    )
    if devices.rank == 0:
        devices.wait()
    return opened


def _plan(
    drafter: Drafter,
    shape: PolicyShape,
    opened: Opened,
    config: PretrainConfig,
    devices: Devices,
) -> MemoryPlan:
    parts = (*opened.corpus.training, *opened.corpus.held_out)
    return predict(
        drafter,
        shape,
        opened.corpus.layout,
        config,
        tokens=sum(part.tokens for part in parts),
        longest=max(entry.length for part in parts for entry in part.entries),
        policy_bytes=opened.policy_bytes,
        dtype=computed_in(config.training.precision, devices.device),
        shards=devices.count if devices.sharded else 1,
    )


def _fitted(
    command: PretrainCommand,
    drafter: Drafter,
    shape: PolicyShape,
    opened: Opened,
    devices: Devices,
) -> PretrainConfig:
    """The configuration with the largest microbatch that the memory holds."""
    assert command.memory is not None
    config, largest = command.config, command.config.training.tokens_per_step
    sizes = [size for size in (largest >> shift for shift in range(16)) if size >= 64] or [largest]
    configs = {size: config.model_copy(update={"microbatch_tokens": size}) for size in sizes}
    plans = {
        size: _plan(drafter, shape, opened, config, devices) for size, config in configs.items()
    }
    return configs[fit_microbatch(plans, command.memory)]


def _identity(command: PretrainCommand, config: PretrainConfig, opened: Opened) -> str:
    start = hashlib.sha256((command.drafter / "model.safetensors").read_bytes()).hexdigest()
    target = TargetFingerprint.from_folder(command.inputs.target).model_dump_json()
    text = "\n".join((target, start, opened.digest, config.model_dump_json()))
    return hashlib.sha256(text.encode()).hexdigest()


def _publish(
    command: PretrainCommand,
    registry: Registry,
    drafter: Drafter,
    report: PretrainReport,
    opened: Opened,
) -> Manifest:
    config = command.config
    last = opened.corpus.held_out[-1]
    temperature = opened.corpus.load(last)[-1].temperature
    k = config.training.draft_tokens
    return publish_drafter(
        registry,
        drafter,
        TargetFingerprint.from_folder(command.inputs.target),
        parent=_parent(command.drafter, registry),
        lineage=report.lineage,
        acceptance=as_manifest_entry(report.acceptance, k, temperature, config.draft_sample_method),
        dtype=getattr(torch, config.training.export_dtype),
    )


def _parent(folder: Path, registry: Registry) -> int | None:
    """The version that the run started from, when it is one of this registry."""
    inside = folder.resolve().is_relative_to(registry.root.resolve())
    return Manifest.read(folder).version if inside and (folder / FILE_NAME).exists() else None
