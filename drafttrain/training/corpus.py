"""A corpus: the rollouts of an offline run, in microbatches whose features come on demand.

::

    saved rollouts ──▶ Teacher ─┐
                                ├──▶ Corpus ──▶ Loader (a thread, ahead of the step) ──▶ Trainer
    spool ──────────▶ mapped ───┘

The microbatch is the unit of everything: its rollouts, of one policy version, go through the policy
and through the drafter together, always in the same order. So features come out with the same bits
however often they are computed, in whichever process, before or after a restart; and a step is the
same step for one process and for many.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout
from drafttrain.rollouts.replay import Replay, is_held_out
from drafttrain.rollouts.sources.samples import SavedRollout
from drafttrain.training.teacher import Teacher

Entry = Rollout | SavedRollout

# Steps after which those before them come again, when steps are used several times.
_BLOCK = 4


@dataclass(frozen=True)
class Microbatch:
    """Rollouts that are always computed together, with or without their features.

    Attributes:
        index: within its corpus.
        entries: at least one.
    """

    index: int
    entries: Sequence[Entry]

    @property
    def tokens(self) -> int:
        return sum(entry.length for entry in self.entries)


class Corpus:
    """See the module.

    Attributes:
        layout: of all features.
        heads: the policy's head for every policy version.
        training, held_out: whole prompt groups are on one side.
        teaching_seconds: spent in the teacher so far.
    """

    def __init__(
        self,
        training: Sequence[Entry],
        held_out: Sequence[Entry],
        layout: FeatureLayout,
        heads: dict[int, PolicyHead],
        *,
        microbatch_tokens: int,
        features: Callable[[Sequence[SavedRollout]], list[Rollout]] | None = None,
        keep_bytes: int = 0,
        uses: int = 1,
        seed: int = 0,
    ) -> None:
        """Divide rollouts into microbatches of at most `microbatch_tokens` each.

        Args:
            features: what computes those of rollouts saved without.
            keep_bytes: features that may stay in memory once they were computed.
            uses: how often every step is taken, the next times soon after the first.
            seed: of the division.
        """
        self.layout, self.heads = layout, heads
        self._features, self._uses = features, uses
        self._keep_bytes = keep_bytes
        self.teaching_seconds = 0.0
        # One model, and it is asked from the loader's thread as well as for estimates.
        self._teaching = threading.Lock()
        self._sides, self._seed = (training, held_out), seed
        self.divide(microbatch_tokens)

    def divide(self, microbatch_tokens: int) -> None:
        """Divide the rollouts anew."""
        self._kept = _Kept(self._keep_bytes)
        start = 0
        sides = []
        for side in self._sides:
            groups = _divide(side, microbatch_tokens, self._seed)
            sides.append([Microbatch(index, group) for index, group in enumerate(groups, start)])
            start += len(sides[-1])
        self.training, self.held_out = sides

    @classmethod
    def of_spool(
        cls, path: Path, *, microbatch_tokens: int, holdout_fraction: float, seed: int = 0
    ) -> Corpus:
        """The rollouts of a spool, with the features that the engine captured; mapped.

        Raises:
            RolloutError: it cannot be read, or is empty.
        """
        replay = Replay(path, holdout_fraction=holdout_fraction, seed=seed)
        replay.refresh()
        return cls.of_replay(replay, microbatch_tokens=microbatch_tokens, seed=seed)

    @classmethod
    def of_replay(cls, replay: Replay, *, microbatch_tokens: int, seed: int = 0) -> Corpus:
        """What a replay holds now."""
        return cls(
            replay.training,
            replay.held_out,
            replay.layout,
            replay.heads_of([*replay.training, *replay.held_out]),
            microbatch_tokens=microbatch_tokens,
            seed=seed,
        )

    @classmethod
    def of_saved(
        cls,
        rollouts: Sequence[SavedRollout],
        teacher: Teacher,
        *,
        microbatch_tokens: int,
        holdout_fraction: float,
        keep_bytes: int,
        uses: int = 1,
        seed: int = 0,
    ) -> Corpus:
        """Rollouts saved without features; the teacher computes them."""
        sides: tuple[list[SavedRollout], list[SavedRollout]] = ([], [])
        for rollout in rollouts:
            sides[is_held_out(rollout.group, seed, holdout_fraction)].append(rollout)
        return cls(
            *sides,
            teacher.layout,
            {0: teacher.head},
            microbatch_tokens=microbatch_tokens,
            features=teacher.features,
            keep_bytes=keep_bytes,
            uses=uses,
            seed=seed,
        )

    @property
    def taught(self) -> bool:
        """Whether features are computed here, by a teacher."""
        return self._features is not None

    def load(self, microbatch: Microbatch) -> list[Rollout]:
        """Its rollouts with features; computed, unless they were kept or captured."""
        if self._features is None:
            return [entry for entry in microbatch.entries if isinstance(entry, Rollout)]
        with self._teaching:
            return self._kept.get(microbatch.index) or self._compute(microbatch)

    def _compute(self, microbatch: Microbatch) -> list[Rollout]:
        assert self._features is not None
        start = time.perf_counter()
        saved = [entry for entry in microbatch.entries if isinstance(entry, SavedRollout)]
        rollouts = self._features(saved)
        self.teaching_seconds += time.perf_counter() - start
        self._kept.add(microbatch.index, rollouts)
        return rollouts

    def steps(
        self, microbatches: int, *, first: int = 0, seed: int = 0, rank: int = 0, count: int = 1
    ) -> Iterator[list[Microbatch]]:
        """This process's share of every step, without end, from step `first` on.

        A step is the next `microbatches` of a sequence of epochs, each of them all training
        microbatches in an order of its own; or one of the last few steps again, when steps are used
        several times. What a step is depends on its number alone.
        """
        number = len(self.training)

        @lru_cache(maxsize=2)
        def order(epoch: int) -> list[int]:
            return _shuffled(number, seed * 1_000_003 + epoch)

        for taken in itertools.count(first):
            start = _new_step(taken, self._uses, seed) * microbatches
            places = (divmod(at, number) for at in range(start, start + microbatches))
            step = [self.training[order(epoch)[place]] for epoch, place in places]
            yield step[rank::count]


class _Kept:
    """Features in memory: the first ones for good, and beside them the newest.

    Half of the memory is for each: later epochs find the first, a step's next uses the newest.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes // 2
        self._first: dict[int, list[Rollout]] = {}
        self._newest: dict[int, list[Rollout]] = {}
        self._first_bytes = self._newest_bytes = 0

    def get(self, index: int) -> list[Rollout] | None:
        return self._first.get(index) or self._newest.get(index)

    def add(self, index: int, rollouts: list[Rollout]) -> None:
        size = _feature_bytes(rollouts)
        if size > self._most:
            return
        kept = [_on_cpu(rollout) for rollout in rollouts]
        if self._first_bytes + size <= self._most:
            self._first[index] = kept
            self._first_bytes += size
            return
        self._newest[index] = kept
        self._newest_bytes += size
        while self._newest_bytes > self._most:
            oldest = self._newest.pop(next(iter(self._newest)))
            self._newest_bytes -= _feature_bytes(oldest)


def _new_step(taken: int, uses: int, seed: int) -> int:
    """Which of the different steps is the one that is taken as number `taken`.

    New ones come in blocks. Between those of a block stand the ones of the block before, again and
    shuffled, so that a teacher always has one to work on ahead.
    """
    if uses == 1 or taken < _BLOCK:
        return taken
    block, place = divmod(taken - _BLOCK, uses * _BLOCK)
    row, column = divmod(place, uses)
    if column == 0:
        return (block + 1) * _BLOCK + row
    again = _shuffled(_BLOCK * (uses - 1), seed * 1_000_003 + block)
    return block * _BLOCK + again[row * (uses - 1) + column - 1] % _BLOCK


def _shuffled(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    shuffled: list[int] = torch.randperm(count, generator=generator).tolist()
    return shuffled


def _divide(entries: Sequence[Entry], tokens: int, seed: int) -> Iterator[list[Entry]]:
    """Groups of at most `tokens` tokens and one policy version, otherwise drawn by chance.

    Not of one length: a drafter learns far less from steps that are all short or all long.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = [entries[i] for i in torch.randperm(len(entries), generator=generator).tolist()]
    versions = sorted({_version(entry) for entry in entries})
    for version in versions:
        group: list[Entry] = []
        room = tokens
        for entry in (entry for entry in shuffled if _version(entry) == version):
            if group and entry.length > room:
                yield _by_length(group)
                group, room = [], tokens
            group.append(entry)
            room -= entry.length
        if group:
            yield _by_length(group)


def _by_length(group: list[Entry]) -> list[Entry]:
    """Attention and the teacher are cheapest when similar lengths stand together."""
    return sorted(group, key=lambda entry: entry.length)


def _version(entry: Entry) -> int:
    return entry.policy_version if isinstance(entry, Rollout) else 0


def _feature_bytes(rollouts: Sequence[Rollout]) -> int:
    features = [f for r in rollouts for f in (r.last_hidden, r.aux_hidden) if f is not None]
    return sum(feature.nbytes for feature in features)


def _on_cpu(rollout: Rollout) -> Rollout:
    """With features in memory of their own: a view would keep the whole padded batch."""
    aux = rollout.aux_hidden
    return replace(
        rollout,
        last_hidden=rollout.last_hidden.to("cpu", copy=True),
        aux_hidden=None if aux is None else aux.to("cpu", copy=True),
    )
