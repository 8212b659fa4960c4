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

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import torch

from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout
from drafttrain.rollouts.replay import Replay, is_held_out
from drafttrain.rollouts.sources.samples import SavedRollout
from drafttrain.training.teacher import Teacher

Entry = Rollout | SavedRollout


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
        seed: int = 0,
    ) -> None:
        """Divide rollouts into microbatches of at most `microbatch_tokens` each.

        Args:
            features: what computes those of rollouts saved without.
            keep_bytes: features that may stay in memory once they were computed.
            seed: of the division.
        """
        self.layout, self.heads = layout, heads
        self._features, self._keep_bytes = features, keep_bytes
        self._kept: dict[int, list[Rollout]] = {}
        self.teaching_seconds = 0.0
        # One model, and it is asked from the loader's thread as well as for estimates.
        self._teaching = threading.Lock()
        self._sides, self._seed = (training, held_out), seed
        self.divide(microbatch_tokens)

    def divide(self, microbatch_tokens: int) -> None:
        """Divide the rollouts anew."""
        self._kept.clear()
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
            if microbatch.index not in self._kept:
                return self._compute(microbatch)
            return self._kept[microbatch.index]

    def _compute(self, microbatch: Microbatch) -> list[Rollout]:
        assert self._features is not None
        start = time.perf_counter()
        saved = [entry for entry in microbatch.entries if isinstance(entry, SavedRollout)]
        rollouts = self._features(saved)
        self.teaching_seconds += time.perf_counter() - start
        size = sum(map(_feature_bytes, rollouts))
        if size <= self._keep_bytes:
            self._keep_bytes -= size
            self._kept[microbatch.index] = [_on_cpu(rollout) for rollout in rollouts]
        return rollouts

    def steps(
        self, microbatches: int, *, first: int = 0, seed: int = 0, rank: int = 0, count: int = 1
    ) -> Iterator[list[Microbatch]]:
        """This process's share of every step, without end, from step `first` on.

        A step is the next `microbatches` of a sequence of epochs, each of them all training
        microbatches in an order of its own: what a step is depends on its number alone.
        """
        number = len(self.training)
        orders: dict[int, list[int]] = {}
        position = first * microbatches
        while True:
            step = []
            for at in range(position, position + microbatches):
                epoch, place = divmod(at, number)
                if epoch not in orders:
                    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                    orders = {epoch: torch.randperm(number, generator=generator).tolist()}
                step.append(self.training[orders[epoch][place]])
            position += microbatches
            yield step[rank::count]


class Loader:
    """Loads the microbatches of coming steps in a thread, and times how long a step waits for them.

    While it is open, a teacher in that thread and whoever opened it have half of torch's threads
    each: all of them for both would wait for one another at every operation on a CPU.

    Attributes:
        waited_seconds: that the trainer stood still for data.
    """

    def __init__(self, corpus: Corpus, steps: Iterator[list[Microbatch]], ahead: int = 2) -> None:
        self._corpus, self._steps = corpus, steps
        self._threads = torch.get_num_threads()
        half = max(1, self._threads // 2)
        self._pool = ThreadPoolExecutor(
            1, "drafttrain-loader", initializer=torch.set_num_threads, initargs=(half,)
        )
        if corpus.taught:
            torch.set_num_threads(max(1, self._threads - half))
        self._ahead: deque[Future[list[list[Rollout]]]] = deque()
        self.waited_seconds = 0.0
        for _ in range(ahead):
            self._submit()

    def next(self) -> list[list[Rollout]]:
        """The microbatches of the next step.

        Raises:
            Exception: whatever loading them raised.
        """
        start = time.perf_counter()
        loaded = self._ahead.popleft().result()
        self.waited_seconds += time.perf_counter() - start
        self._submit()
        return loaded

    def _submit(self) -> None:
        step = next(self._steps)
        self._ahead.append(self._pool.submit(lambda: [self._corpus.load(part) for part in step]))

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(self._threads)


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


def _feature_bytes(rollout: Rollout) -> int:
    aux = 0 if rollout.aux_hidden is None else rollout.aux_hidden.nbytes
    return rollout.last_hidden.nbytes + aux


def _on_cpu(rollout: Rollout) -> Rollout:
    """With features in memory of their own: a view would keep the whole padded batch."""
    aux = rollout.aux_hidden
    return replace(
        rollout,
        last_hidden=rollout.last_hidden.to("cpu", copy=True),
        aux_hidden=None if aux is None else aux.to("cpu", copy=True),
    )
