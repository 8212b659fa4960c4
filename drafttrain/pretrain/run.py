"""The loop of offline training: steps, held-out estimates, an early and gentle end, exact resume.

The learning rate warms up, stays, and decays over the last fifth of the steps (WSD). Because it
stays until then, an early stop is only an earlier beginning of the decay: when the held-out
estimate has not gained for a while, the steps that are left are cut down to the decay.

Everything that decides what comes next is in the saved state or follows from the step's number, so
a run that was killed goes on with the same losses, bit for bit on a CPU.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from drafttrain.checkpoints.manifest import Lineage
from drafttrain.config import PretrainConfig, TrainingConfig
from drafttrain.control.acceptance import AcceptanceEstimate, estimate_acceptance, usable
from drafttrain.drafters.contract import Drafter
from drafttrain.errors import ConfigError, RolloutError
from drafttrain.rollouts.record import Rollout
from drafttrain.rollouts.replay import Replay
from drafttrain.rollouts.sources.samples import SavedRollout
from drafttrain.training.corpus import Corpus, Microbatch
from drafttrain.training.devices import Devices
from drafttrain.training.loader import Loader
from drafttrain.training.trainer import StepReport, Trainer

# Held-out tokens of an estimate on the way for each one trained on since the last, at most: with
# long rollouts estimates would else take most of the time.
_LOOKED_AT = 0.5


@dataclass(frozen=True)
class Progress:
    """Where a run stands after a step.

    Attributes:
        report: of the step.
        steps: that the run will take, as far as is known.
        tokens_per_second: rollout tokens, since this process began.
        waited: share of that time the trainer stood still for data.
        estimate: the newest held-out acceptance length, None before the first.
    """

    report: StepReport
    steps: int
    tokens_per_second: float
    waited: float
    estimate: float | None


@dataclass(frozen=True)
class PretrainReport:
    """How a drafter came out of offline training.

    Attributes:
        lineage: what it was trained on.
        acceptance: on the held-out prompt groups.
        history: (step, held-out acceptance length) of the estimates on the way.
        losses: of every step of this process.
        tokens_per_second: rollout tokens.
        waited: share of the training time the trainer stood still for data.
        taught: share of it that the teacher computed, most of it meanwhile.
        stopped_early: whether the estimate had stopped gaining.
    """

    lineage: Lineage
    acceptance: AcceptanceEstimate
    history: list[tuple[int, float]]
    losses: list[float]
    tokens_per_second: float
    waited: float
    taught: float
    stopped_early: bool


class Pretraining:
    """One run over a corpus. See the module.

    Attributes:
        trainer: owns the drafter.
        history: (step, held-out acceptance length) so far.
    """

    def __init__(
        self,
        drafter: Drafter,
        corpus: Corpus,
        config: PretrainConfig,
        *,
        devices: Devices | None = None,
        state: Path | None = None,
        identity: str = "",
    ) -> None:
        """Prepare a run.

        Args:
            drafter: trained in place.
            state: folder for the run's state; None keeps none.
            identity: of what the run is about; a state with another one is refused.

        Raises:
            ConfigError: the microbatches of a step cannot be shared evenly among the processes.
            RolloutError: the rollouts are not for this drafter, or too few.
        """
        self._corpus, self._config = corpus, config
        self._devices = devices or Devices()
        self._state, self._identity = state, identity
        if config.microbatches_per_step % self._devices.count:
            problem = (
                f"a step of {config.microbatches_per_step} microbatches cannot be shared by "
                f"{self._devices.count} processes; change tokens_per_step or microbatch_tokens"
            )
            raise ConfigError("pretrain", "microbatch_tokens", problem)
        for name, side in (("train on", corpus.training), ("hold out", corpus.held_out)):
            if not side:
                raise RolloutError("rollouts", "prompt groups", f"too few: none to {name}")
        drafter.check_layout(corpus.layout)
        self.trainer = Trainer(drafter, config.training, config.steps, self._devices)
        self.history: list[tuple[int, float]] = []
        self._losses: list[float] = []
        self._stopped_early = False
        self._seen = self._waited = self._seconds = 0.0

    def resume(self) -> None:
        """Continue from the saved state.

        Raises:
            CheckpointError: there is none, or it is of another drafter.
            ConfigError: it is of a run with other rollouts or settings.
        """
        assert self._state is not None
        progress = self.trainer.restore(self._state)
        if progress["identity"] != self._identity:
            problem = "is of a run with other rollouts, another policy or other settings"
            raise ConfigError(self._state, "state", problem)
        self.trainer.total_steps = progress["total_steps"]
        self.history = [(step, length) for step, length in progress["history"]]
        self._stopped_early = progress["stopped_early"]

    def run(self, on_step: Callable[[Progress], None] = lambda progress: None) -> PretrainReport:
        """Train to the end, saving the state on the way.

        Raises:
            RolloutError: features that are not finite.
        """
        trainer, config = self.trainer, self._config
        steps = self._corpus.steps(
            config.microbatches_per_step,
            first=trainer.step_count,
            seed=config.training.seed,
            rank=self._devices.rank,
            count=self._devices.count,
        )
        with Loader(self._corpus, steps) as loader:
            while trainer.step_count < self._steps:
                started = time.perf_counter()
                report = trainer.step_on(loader.next(), self._corpus.layout, self._corpus.heads)
                self._seconds += time.perf_counter() - started
                self._waited = loader.waited_seconds
                self._seen += report.tokens
                self._losses.append(report.loss)
                if report.step % config.evaluate_every == 0 and report.step < self._steps:
                    self._look()
                on_step(self._progress(report))
        return self._report()

    @property
    def _steps(self) -> int:
        assert self.trainer.total_steps is not None
        return self.trainer.total_steps

    @property
    def _at_a_look(self) -> int:
        """How many rollouts an estimate on the way looks at."""
        config, held_out = self._config, self._corpus.held_out
        length = statistics.mean(entry.length for part in held_out for entry in part.entries)
        trained = config.evaluate_every * config.training.tokens_per_step
        return min(config.held_out_rollouts, math.ceil(_LOOKED_AT * trained / length))

    def _look(self) -> None:
        """Estimate, perhaps begin the decay, and save."""
        length = self._shared(self.estimate(self._at_a_look).acceptance_length)
        self.history.append((self.trainer.step_count, length))
        if not self._stopped_early and self._has_stalled():
            self._stopped_early = True
            decay = math.ceil(self.trainer.step_count / 4)
            self.trainer.total_steps = min(self._steps, self.trainer.step_count + decay)
        if self._state is not None:
            self.trainer.save(
                self._state,
                identity=self._identity,
                total_steps=self._steps,
                history=self.history,
                stopped_early=self._stopped_early,
            )

    def _has_stalled(self) -> bool:
        lengths = [length for _, length in self.history]
        recent, before = lengths[-self._config.patience :], lengths[: -self._config.patience]
        return bool(before) and max(recent) < max(before) + self._config.min_gain

    def _shared(self, value: float) -> float:
        """The first process's value, in all."""
        own = value if self._devices.rank == 0 else 0.0
        return float(self._devices.total(torch.tensor(own, dtype=torch.float64)))

    def estimate(self, limit: int | None = None, k: int | None = None) -> AcceptanceEstimate:
        """Acceptance on held-out rollouts, of the drafter as it is now; every process must ask.

        Args:
            limit: about how many rollouts to look at; all when None.
            k: draft tokens; by default as many as are trained.

        Raises:
            RolloutError: none of them is whole.
        """
        k = k or self._config.training.draft_tokens
        drafter, layout = self.trainer.whole_drafter, self._corpus.layout
        heads = self.trainer.heads.of(self._corpus.heads)
        method = self._config.draft_sample_method
        # One microbatch after the other: the features of all of them may not fit the memory.
        parts = [
            estimate_acceptance(drafter, rollouts, layout, heads, k=k, method=method)
            for rollouts in self._held_out(limit, k)
        ]
        if not parts:
            problem = "no complete rollout is held out; need more"
            raise RolloutError("rollouts", "prompt groups", problem)
        return AcceptanceEstimate.together(parts)

    def _held_out(self, limit: int | None, k: int) -> Iterator[list[Rollout]]:
        """What can be replayed of microbatches that are evenly spread."""
        held_out = self._corpus.held_out
        parts = len(held_out)
        if limit is not None:
            count = sum(len(part.entries) for part in held_out)
            parts = min(parts, math.ceil(parts * limit / count))
        for index in range(parts):
            part = held_out[index * len(held_out) // parts]
            if rollouts := [rollout for rollout in self._corpus.load(part) if usable(rollout, k)]:
                yield rollouts

    def _progress(self, report: StepReport) -> Progress:
        return Progress(
            report=report,
            steps=self._steps,
            tokens_per_second=self._seen / self._seconds,
            waited=self._waited / self._seconds,
            estimate=self.history[-1][1] if self.history else None,
        )

    def _report(self) -> PretrainReport:
        seconds = max(self._seconds, 1e-9)
        training = self._corpus.training
        acceptance = self.estimate()
        self.history.append((self.trainer.step_count, acceptance.acceptance_length))
        return PretrainReport(
            lineage=Lineage(
                policy_versions=_policy_versions(training),
                rollouts=sum(len(part.entries) for part in training),
                tokens=self.trainer.tokens_seen,
                optimizer_steps=self.trainer.step_count,
            ),
            acceptance=acceptance,
            history=self.history,
            losses=self._losses,
            tokens_per_second=self._seen / seconds,
            waited=self._waited / seconds,
            taught=self._corpus.teaching_seconds / seconds,
            stopped_early=self._stopped_early,
        )


def pretrain(
    drafter: Drafter,
    replay: Replay,
    config: TrainingConfig,
    *,
    steps: int,
    on_step: Callable[[StepReport], None] = lambda report: None,
) -> PretrainReport:
    """Train `drafter` in place on a spool for `steps` optimizer steps (warm-up, stable, decay).

    Raises:
        RolloutError: the rollouts leave nothing to train on, or nothing to hold out.
    """
    replay.refresh()
    settings = PretrainConfig(
        training=config,
        steps=steps,
        evaluate_every=steps,
        microbatch_tokens=config.tokens_per_step,
    )
    corpus = Corpus.of_replay(
        replay, microbatch_tokens=settings.microbatch_tokens, seed=config.seed
    )
    return Pretraining(drafter, corpus, settings).run(lambda now: on_step(now.report))


def _policy_versions(training: Sequence[Microbatch]) -> list[int]:
    """As the rollouts name them; those that name none are of the one policy at hand."""
    versions = set()
    for entry in (entry for part in training for entry in part.entries):
        if isinstance(entry, SavedRollout):
            versions.add(entry.facts.policy_version or 0)
        else:
            versions.add(entry.policy_version)
    return sorted(versions)
