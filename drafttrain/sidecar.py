"""The loop beside an RL job: follow the spool, train, prove, publish, swap.

::

    spool ──▶ replay ──▶ trainer ──▶ candidate ──▶ gate ──▶ registry ──▶ engines

The sidecar owns the trainer's state and the registry's next version. It shares nothing with the
engines but the spool (which it reads), the registry (which they read) and their control routes. An
engine that cannot be reached is tried again; whatever else goes wrong ends the sidecar with a clear
error, never the RL job.
"""

from __future__ import annotations

import fcntl
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Event
from typing import BinaryIO

import torch
import watchfiles

from drafttrain.checkpoints.manifest import Lineage, TargetFingerprint
from drafttrain.checkpoints.registry import Registry
from drafttrain.config import SidecarConfig
from drafttrain.control.acceptance import AcceptanceEstimate, estimate_acceptance, usable
from drafttrain.control.gate import Verdict, judge
from drafttrain.drafters import load_drafter
from drafttrain.drafters.contract import Drafter
from drafttrain.drafters.policy import PolicyShape
from drafttrain.errors import ConfigError, EngineUnreachable, OvertakenError
from drafttrain.outputs import writing
from drafttrain.publishing import as_manifest_entry, publish_drafter, publish_folder
from drafttrain.rollouts.record import Rollout
from drafttrain.rollouts.replay import Replay
from drafttrain.serving import Engine, bring_to
from drafttrain.telemetry import EventLog
from drafttrain.training.devices import Devices
from drafttrain.training.state import STATE
from drafttrain.training.trainer import Trainer

# How long to wait for a file event before looking anyway: an engine may have come back meanwhile.
_LOOK_AGAIN_MS = 2000
# How much longer it trains than it then judges, publishes, swaps and saves: with a large drafter
# these would else take most of the time.
_TRAINING_TO_REST = 2.0


class Sidecar:
    """See the module.

    Attributes:
        events: what it did, for people and reports.
        stop: set it (from a signal handler, say) to end after the step under way.
    """

    def __init__(self, config: SidecarConfig, engines: Sequence[Engine]) -> None:
        """Open everything and continue where an earlier run ended.

        Raises:
            CheckpointError: the policy, the starting drafter, the registry or the state is wrong.
            ConfigError: another sidecar works on the state.
        """
        self.config = config
        self.engines = engines
        self.stop = Event()
        self._lock = _locked(config.state)
        self.events = EventLog(config.state / "events.jsonl")
        self.policy = PolicyShape.from_folder(config.target)
        self.registry = Registry(config.registry, config.registry_name)
        self.replay = Replay(
            config.spool,
            max_bytes=config.replay.max_bytes,
            holdout_fraction=config.replay.holdout_fraction,
            max_staleness=config.replay.max_staleness,
            evict=True,
        )
        self.target = TargetFingerprint.from_folder(config.target)
        self._devices = Devices()
        self._serve(self._open_registry())
        drafter = self._load(self.serving_version)
        self.trainer = Trainer(drafter, config.training, devices=self._devices)
        self.tokens_on_current = 0
        self._rest = 0.0  # seconds that the last candidate took after its training
        self._restore()

    def run(self) -> None:
        """Work until :attr:`stop` is set; state is consistent whenever this returns or dies.

        The state's lock is then given back: another sidecar may go on, this one may not.
        """
        with self._lock:
            self._work()

    def _work(self) -> None:
        self.events.append("started", step=self.trainer.step_count, serving=self.serving_version)
        while not self.stop.is_set():
            if self.replay.refresh():
                self.tokens_on_current = 0
            self._catch_up_engines()
            if not self._worth_training():
                self._wait_for_rollouts()
                continue
            self._train_until_candidate()
            trained = time.monotonic()
            if self._offer_candidate():
                self._catch_up_engines()
            self._save()
            self._rest = time.monotonic() - trained
        self._save()
        self.events.append("stopped", step=self.trainer.step_count)

    def _worth_training(self) -> bool:
        rollouts = self.replay.training
        if len(rollouts) < self.config.replay.min_rollouts:
            return False
        available = sum(rollout.length for rollout in rollouts)
        return self.tokens_on_current < self.config.passes_per_rollout * available

    def _train_until_candidate(self) -> None:
        least = self.trainer.step_count + self.config.gate.steps_between
        ends = time.monotonic() + _TRAINING_TO_REST * self._rest
        while self.trainer.step_count < least or (
            time.monotonic() < ends and self._worth_training()
        ):
            if self.stop.is_set():
                return
            rollouts = self.replay.sample(
                self.trainer.generator, self.config.training.tokens_per_step
            )
            report = self.trainer.step(
                rollouts,
                self.replay.layout,
                self.replay.heads_of(rollouts),
                self.replay.newest_policy_version,
            )
            self.tokens_on_current += report.tokens
        self.events.append(
            "trained",
            step=report.step,
            loss=report.loss,
            acceptance=report.acceptance,
            rollouts=len(self.replay.training),
            policy_version=self.replay.newest_policy_version,
        )

    def _offer_candidate(self) -> bool:
        """Publish the trainer's drafter if held-out rollouts say it is better."""
        k = self.config.training.draft_tokens
        held_out = [rollout for rollout in self.replay.held_out if usable(rollout, k)]
        held_out = held_out[-self.config.gate.held_out_rollouts :]
        if not held_out:
            return False
        candidate = self._estimate(self.trainer.average, held_out)
        serving = self._estimate(self.serving, held_out)
        gate = self.config.gate
        verdict = judge(candidate, serving, margin=gate.margin, level=gate.level)
        self.events.append("judged", step=self.trainer.step_count, **vars(verdict))
        if not verdict.publish:
            return False
        try:
            self._publish(candidate, verdict, held_out)
        except OvertakenError:  # the next candidate is judged by what is the latest now
            latest = self.registry.latest()
            self.events.append("overtaken", judged_against=self.serving_version, latest=latest)
            return False
        return True

    def _estimate(self, drafter: Drafter, rollouts: list[Rollout]) -> AcceptanceEstimate:
        return estimate_acceptance(
            drafter,
            rollouts,
            self.replay.layout,
            self.trainer.heads.of(self.replay.heads_of(rollouts)),
            k=self.config.training.draft_tokens,
            method=self.config.gate.draft_sample_method,
        )

    def _publish(
        self, candidate: AcceptanceEstimate, verdict: Verdict, held_out: list[Rollout]
    ) -> None:
        k, method = self.config.training.draft_tokens, self.config.gate.draft_sample_method
        trained_on = self.replay.training
        manifest = publish_drafter(
            self.registry,
            self.trainer.average,
            self.target,
            parent=self.serving_version,
            over=self.serving_version,
            lineage=Lineage(
                policy_versions=sorted({rollout.policy_version for rollout in trained_on}),
                rollouts=len(trained_on),
                tokens=self.trainer.tokens_seen,
                optimizer_steps=self.trainer.step_count,
            ),
            acceptance=as_manifest_entry(candidate, k, held_out[-1].temperature, method),
            dtype=getattr(torch, self.config.training.export_dtype),
        )
        self._serve(manifest.version)
        self.registry.prune(self.config.keep_versions)
        self.events.append(
            "published",
            version=manifest.version,
            acceptance_length=candidate.acceptance_length,
            gain=verdict.gain,
            policy_version=self.replay.newest_policy_version,
            step=self.trainer.step_count,
        )

    def _catch_up_engines(self) -> None:
        """Bring every engine to the latest version; also one that was down at an earlier swap."""
        latest = self.registry.latest() or self.serving_version
        if latest != self.serving_version:  # someone rolled back, or published by hand
            self._serve(latest)
        for brought in bring_to(self.engines, latest):
            url, error = brought.url, brought.error
            if isinstance(error, EngineUnreachable):
                self.events.append("engine_unreachable", engine=url, reason=str(error))
            elif error is not None:
                raise error
            elif brought.seconds is not None:
                self.events.append("swapped", engine=url, version=latest, seconds=brought.seconds)

    def _open_registry(self) -> int:
        """The version that serves; an empty registry gets the configured drafter as its first."""
        latest = self.registry.latest()
        if latest is not None:
            return latest
        if self.config.drafter is None:
            problem = "missing; the registry is empty, so a drafter to start from is needed"
            raise ConfigError(self.config.registry, "drafter", problem)
        return publish_folder(self.config.drafter, self.config.target, self.registry).version

    def _serve(self, version: int) -> None:
        """From now on engines are to serve `version`, and candidates are compared with it."""
        self.serving_version = version
        self.serving = self._load(version)

    def _load(self, version: int) -> Drafter:
        return self._devices.place(load_drafter(self.registry.folder(version), self.policy))

    def _wait_for_rollouts(self) -> None:
        for _ in watchfiles.watch(
            self.replay.segments_folder,
            stop_event=self.stop,
            rust_timeout=_LOOK_AGAIN_MS,
            yield_on_timeout=True,
            raise_interrupt=False,
        ):
            return

    def _save(self) -> None:
        self.trainer.save(self.config.state, tokens_on_current=self.tokens_on_current)

    def _restore(self) -> None:
        if (self.config.state / STATE).exists():
            progress = self.trainer.restore(self.config.state)
            self.tokens_on_current = progress["tokens_on_current"]


def _locked(state: Path) -> BinaryIO:
    """The state's lock, which dies with its holder.

    Raises:
        ConfigError: another sidecar holds it.
        CheckpointError: the folder cannot be made or written.
    """
    with writing(state, "state"):
        state.mkdir(parents=True, exist_ok=True)
        lock = (state / ".lock").open("wb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        lock.close()
        problem = "another sidecar works on it; expected a folder of its own"
        raise ConfigError(state, "state", problem) from error
    return lock


def run_until_signal(sidecar: Sidecar) -> None:
    """Run until SIGINT or SIGTERM; the step under way is finished and the state saved."""
    if sidecar.config.threads is not None:
        torch.set_num_threads(sidecar.config.threads)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sidecar.stop.set())
    sidecar.run()
