"""What a coming step needs, loaded while the one before it trains."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from drafttrain.rollouts.record import Rollout
from drafttrain.training.corpus import Corpus, Microbatch

AHEAD = 4
"""Steps: enough for a teacher to work on a new one while those taken again are trained on."""


class Loader:
    """Loads the microbatches of coming steps in a thread, and times how long a step waits for them.

    While it is open, a teacher in that thread and whoever opened it have half of torch's threads
    each: all of them for both would wait for one another at every operation on a CPU.

    Attributes:
        waited_seconds: that the trainer stood still for data.
    """

    def __init__(self, corpus: Corpus, steps: Iterator[list[Microbatch]]) -> None:
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
        for _ in range(AHEAD):
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
