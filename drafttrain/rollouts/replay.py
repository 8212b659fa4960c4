"""Replay: the rollouts of a spool that training samples from, and those held out from it.

Follows the spool by listing it (:meth:`Replay.refresh`) and mapping what is new. Which rollouts
are held out depends on their prompt group alone, so it is the same after a restart, and no prompt
is ever on both sides.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Iterable
from pathlib import Path

import torch

from drafttrain.errors import RolloutError, SpoolError
from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout
from drafttrain.rollouts.segment import Segment
from drafttrain.rollouts.spool import HEADS_KEPT, SpoolReader, sized

_log = logging.getLogger(__name__)


class Replay:
    """See the module. Lists are in the spool's order, oldest rollout first.

    Attributes:
        root: the spool's folder.
        segments_folder: where new segments appear.
        training: to be sampled from.
        held_out: whole prompt groups kept from training.
        damaged: segments that could not be read, so far.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        max_bytes: int | None = None,
        holdout_fraction: float = 0.125,
        seed: int = 0,
        max_staleness: int | None = None,
        evict: bool = False,
        freshness: float = 0.9,
    ) -> None:
        """Open a spool; nothing is read before :meth:`refresh`.

        Args:
            root: the spool's folder.
            max_bytes: segments beyond this, the oldest, are forgotten.
            holdout_fraction: of prompt groups held out.
            seed: decides which groups are held out.
            max_staleness: rollouts more policy versions behind the newest are not trained on.
            evict: this process owns the spool: create it when absent, and delete what is forgotten.
            freshness: a rollout is this much less likely to be sampled for every policy version
                that it lies behind the newest; 1 samples all alike.

        Raises:
            RolloutError: there is no spool, and `evict` is false; or it cannot be created.
        """
        self.root = Path(root)
        self.segments_folder = self.root / "segments"
        self.training: list[Rollout] = []
        self.held_out: list[Rollout] = []
        self.damaged = 0
        self._reader = SpoolReader(self.root)
        self._max_bytes, self._max_staleness, self._evict = max_bytes, max_staleness, evict
        self._holdout_fraction, self._seed = holdout_fraction, seed
        self._log_freshness = math.log(freshness)
        # None: damaged, or spent; remembered so that it is read and counted once.
        self._segments: dict[Path, Segment | None] = {}
        self._heads: dict[int, PolicyHead] = {}
        self._warned: set[str] = set()
        self._open_folder()

    def refresh(self) -> int:
        """Look for new segments, and let go of the oldest beyond ``max_bytes``.

        Returns:
            the number of rollouts that are new.

        Raises:
            SpoolError: a segment to evict cannot be deleted.
        """
        kept, excess = self._within_budget()
        self._forget(excess)
        before = self._segments
        self._segments = {
            path: before[path] if path in before else self._read(path) for path in kept
        }
        self._let_go_of_spent()
        self._sort_out()
        new = (self._segments[path] for path in kept if path not in before)
        return sum(len(segment.rollouts) for segment in new if segment is not None)

    def sample(self, generator: torch.Generator, token_budget: int) -> list[Rollout]:
        """Draw training rollouts of one policy version, fresh versions first, each at most once.

        One version, because its rollouts share a policy head: a step on several would fall apart
        into as many small batches. Over many steps the versions mix.

        Args:
            generator: on the CPU; decides the draw.
            token_budget: the drawn rollouts together stay within it, but there is always one.

        Raises:
            RolloutError: there is nothing to train on.
        """
        if not self.training:
            raise RolloutError(self.root, "rollouts", "none to train on")
        versions = torch.tensor([rollout.policy_version for rollout in self.training])
        log_weights = (versions.max() - versions).double() * self._log_freshness
        # The order of weighted draws without replacement, in logarithms: no weight underflows.
        noise = torch.empty_like(log_weights).exponential_(generator=generator)
        order = (log_weights - noise.log()).argsort(descending=True)
        order = order[versions[order] == versions[order[0]]]
        drawn: list[Rollout] = []
        for index in order.tolist():
            token_budget -= self.training[index].length
            if drawn and token_budget < 0:
                break
            drawn.append(self.training[index])
        return drawn

    @property
    def newest_policy_version(self) -> int | None:
        """The newest policy version with a segment; None while there is none."""
        return max((segment.policy_version for segment in self._sound()), default=None)

    @property
    def layout(self) -> FeatureLayout:
        """How all these rollouts were captured: as in the newest segment.

        Raises:
            RolloutError: there is no segment yet.
        """
        for segment in reversed(self._sound()):
            return segment.layout
        raise RolloutError(self.segments_folder, "segments", "none to read")

    def head(self, policy_version: int) -> PolicyHead:
        """The head of a policy version; mapped once.

        Raises:
            RolloutError: the spool does not have it, or it is damaged.
        """
        if policy_version not in self._heads:
            self._heads[policy_version] = self._reader.read_head(policy_version)
        return self._heads[policy_version]

    def heads_of(self, rollouts: Iterable[Rollout]) -> dict[int, PolicyHead]:
        """The head of every policy version among `rollouts`.

        Raises:
            RolloutError: as :meth:`head`.
        """
        versions = {rollout.policy_version for rollout in rollouts}
        return {version: self.head(version) for version in sorted(versions)}

    def _open_folder(self) -> None:
        try:
            if self._evict:
                self.segments_folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            problem = f"cannot be created: {error.strerror}"
            raise RolloutError(self.root, "spool", problem) from error
        if not self.segments_folder.is_dir():
            raise RolloutError(self.root, "segments", "missing; expected a spool folder")

    def _within_budget(self) -> tuple[list[Path], list[Path]]:
        """Segments on disk that fit into ``max_bytes`` (the newest always), and the others."""
        kept: list[Path] = []
        excess: list[Path] = []
        total = 0
        for path, size in sized(self._reader.segment_paths()[::-1]):
            total += size
            fits = self._max_bytes is None or total <= self._max_bytes or not kept
            (kept if fits else excess).append(path)
        return kept[::-1], excess

    def _forget(self, paths: list[Path]) -> None:
        if not self._evict:
            return
        for path in paths:
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise SpoolError(f"{path}: cannot be deleted: {error.strerror}") from error

    def _read(self, path: Path) -> Segment | None:
        try:
            return self._reader.read(path)
        except RolloutError as error:
            self.damaged += 1
            _log.warning("segment passed over: %s", error)
            return None

    def _let_go_of_spent(self) -> None:
        """Unmap segments whose policy's head is gone for good: engines keep the newest heads."""
        heads = self._reader.heads()
        if len(heads) < HEADS_KEPT:
            return
        for path, segment in self._segments.items():
            if segment is not None and segment.policy_version < heads[0]:
                self._segments[path] = None

    def _sound(self) -> list[Segment]:
        return [segment for segment in self._segments.values() if segment is not None]

    def _sort_out(self) -> None:
        """Divide the rollouts that can be used into training and held out."""
        self.training, self.held_out = [], []
        newest = self.newest_policy_version or 0
        for segment in self._usable_segments():
            stale = newest - segment.policy_version
            trainable = self._max_staleness is None or stale <= self._max_staleness
            for rollout in segment.rollouts:
                if is_held_out(rollout.group, self._seed, self._holdout_fraction):
                    self.held_out.append(rollout)
                elif trainable:
                    self.training.append(rollout)

    def _usable_segments(self) -> list[Segment]:
        """Segments of the newest one's layout whose policy's head is there."""
        sound = self._sound()
        self._map_heads({segment.policy_version for segment in sound})
        usable = []
        for segment in sound:
            if segment.layout != self.layout:
                self._warn_once(segment.path, "another layout than the newest segment; passed over")
            elif segment.policy_version in self._heads:
                usable.append(segment)
        return usable

    def _map_heads(self, versions: set[int]) -> None:
        """Hold the heads of `versions` that the spool still has, and no others.

        They are mapped now, so that none can go away between a refresh and its use.
        """
        there = set(self._reader.heads())
        self._heads = {v: self._heads[v] for v in versions & there & self._heads.keys()}
        # Engines keep the newest heads only: that older ones are gone is nothing to warn of.
        oldest = min(there, default=0)
        for version in sorted(v for v in versions - self._heads.keys() if v >= oldest):
            try:
                self.head(version)
            except RolloutError as error:
                self._warn_once(error.where, f"{error.problem}; its rollouts cannot be used")

    def _warn_once(self, where: str | Path, problem: str) -> None:
        if (warning := f"{where}: {problem}") not in self._warned:
            self._warned.add(warning)
            _log.warning("%s", warning)


def is_held_out(group: str, seed: int, fraction: float) -> bool:
    """Whether a prompt group is among the `fraction` that is kept from training; by hash."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8]) / 2**64 < fraction
