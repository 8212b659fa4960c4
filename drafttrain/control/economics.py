"""What drafting costs and brings: tokens per second by batch size and number of draft tokens.

One piece of code for two uses: at run time, with an :class:`EngineCost` fitted from an engine's own
step timings, it says how many draft tokens pay at the present batch; ahead of time the simulator
asks the same questions of a roofline of an engine that does not exist yet. Both are a
:class:`StepCost`.

Names: a *step* is one engine step, in which every running request verifies its k drafts (k = 0: no
speculation) and k further ones are drafted. ``accepted_per_position`` is, as in the engine's
counters, the fraction of rounds that accept the draft at each position; it never rises.

No torch here: this is imported where an answer must come at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import ValidationError
from scipy.optimize import brentq, nnls

from drafttrain.config import Seconds, Section, explain
from drafttrain.errors import ConfigError


class StepCost(ABC):
    """What an engine step costs, and what follows from it."""

    @abstractmethod
    def step_seconds(self, batch: float, k: int) -> float:
        """Seconds of one step of `batch` running requests with k draft tokens each."""

    def tokens_per_second(
        self, batch: float, k: int, accepted_per_position: Sequence[float]
    ) -> float:
        """Tokens per second of the whole batch.

        Raises:
            ValueError: fewer than k positions were given.
        """
        tokens = batch * acceptance_length(k, accepted_per_position)
        return tokens / self.step_seconds(batch, k)

    def speedup(self, batch: float, k: int, accepted_per_position: Sequence[float]) -> float:
        """Tokens per second against no speculation at the same batch."""
        with_drafts = self.tokens_per_second(batch, k, accepted_per_position)
        return with_drafts / self.tokens_per_second(batch, 0, ())

    def best_k(self, batch: float, accepted_per_position: Sequence[float]) -> int:
        """The number of draft tokens with most tokens per second; 0 when speculation does not pay.

        Searches up to the number of positions given. Ties go to fewer drafts.
        """
        rates = [
            self.tokens_per_second(batch, k, accepted_per_position)
            for k in range(len(accepted_per_position) + 1)
        ]
        return int(np.argmax(rates))

    def break_even_acceptance(self, batch: float, k: int) -> float | None:
        """Chance of each draft to be accepted at which k drafts just pay for themselves.

        The chance is the same at every position, given that the drafts before were accepted.

        Returns:
            a fraction in [0, 1]; None when not even a perfect drafter would pay.
        """
        needed = self.step_seconds(batch, k) / self.step_seconds(batch, 0)
        if needed > k + 1:
            return None
        if needed <= 1:
            return 0.0
        return float(brentq(lambda rate: 1 + sum(rate**j for j in range(1, k + 1)) - needed, 0, 1))


def acceptance_length(k: int, accepted_per_position: Sequence[float]) -> float:
    """Expected tokens of a request in one step, the policy's own included.

    Raises:
        ValueError: fewer than k positions were given.
    """
    if len(accepted_per_position) < k:
        found = len(accepted_per_position)
        raise ValueError(f"acceptance is known at {found} positions; {k} draft tokens need {k}")
    return 1.0 + sum(accepted_per_position[:k])


@dataclass(frozen=True)
class StepTiming:
    """One measured engine step, or the mean of many alike.

    Attributes:
        batch: requests that ran.
        k: draft tokens verified for each; 0 without speculation.
        seconds: wall time of the step, drafting included.
    """

    batch: float
    k: int
    seconds: float


class EngineCost(StepCost, Section):
    """A step's seconds as a sum of costs, none of them negative::

        step + request * batch + token * batch * (k + 1) + (speculation, where k > 0) + draft * k

    What a drafted token costs shows no more than it does here: batch * k is what `token` and
    `request` count together.

    It holds where a step's time grows evenly: within the range of batches it was fitted on, and not
    across an edge of the engine such as the largest captured CUDA graph.
    """

    step: Seconds
    """Seconds of every step: scheduler, launches, reading the policy's weights."""
    request: Seconds = 0.0
    """Seconds for each running request, however many tokens it computes: its bookkeeping."""
    token: Seconds
    """Seconds for each token that the policy computes, its share of the drafting included."""
    speculation: Seconds = 0.0
    """Seconds of every step with drafts: accepting and rejecting, preparing the drafter."""
    draft: Seconds
    """Seconds of each of the k drafting passes."""

    def step_seconds(self, batch: float, k: int) -> float:
        """Seconds of one step of `batch` running requests with k draft tokens each."""
        costs = self.model_dump()
        return float(sum(costs[name] * count for name, count in _counts(batch, k).items()))

    @classmethod
    def fit(cls, timings: Sequence[StepTiming]) -> Self:
        """Fit the four costs to measured steps.

        Least squares of the relative error, so that a fast step counts as much as a slow one; a
        cost that the timings do not show is zero. Steps without drafts at two batch sizes, and with
        two numbers of drafts at two batch sizes each, determine all of them.

        Raises:
            ValueError: fewer than two timings, or one that is not positive.
        """
        if len(timings) < 2:
            raise ValueError(f"{len(timings)} timings; expected at least 2")
        if any(t.seconds <= 0 or t.batch <= 0 or t.k < 0 for t in timings):
            raise ValueError("a timing is not of a positive batch and time with k of 0 or more")
        counts = [_counts(t.batch, t.k) for t in timings]
        rows = np.array([list(count.values()) for count in counts])
        relative = rows / np.array([[t.seconds] for t in timings])
        scale = np.linalg.norm(relative, axis=0)
        scale[scale == 0] = 1.0
        costs, _ = nnls(relative / scale, np.ones(len(timings)))
        return cls(**dict(zip(counts[0], (costs / scale).tolist(), strict=True)))

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what :meth:`save` wrote.

        Raises:
            ConfigError: the file is missing, or a key or value in it is wrong.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise ConfigError(path, "file", f"cannot be read: {error.strerror}") from error
        except ValidationError as error:
            raise explain(error, path, ConfigError) from error

    def save(self, path: str | Path) -> None:
        """Write the costs as JSON."""
        Path(path).write_text(self.model_dump_json(indent=2) + "\n")


def _counts(batch: float, k: int) -> dict[str, float]:
    """How often a step pays each cost of :class:`EngineCost`."""
    return {
        "step": 1.0,
        "request": batch,
        "token": batch * (k + 1),
        "speculation": float(k > 0),
        "draft": k,
    }
