"""Layer two, the engines: continuous batching of requests of different lengths, event by event.

Between two events (a request ends, or others arrive) an engine's batch is constant, so all steps of
that stretch are taken at once. All replicas move in lockstep of events, not of time: each has its
own clock, and one numpy operation advances them all.

A replica's *progress* counts the tokens gained by a request that has run since the start; every
running request gains the same number of tokens in a step, the acceptance length at the k in use.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from drafttrain.simulator.roofline import StepModel

Array = NDArray[np.float64]

# Tokens of context at which the step model is asked, to see what each of them costs.
_FAR = float(1 << 20)


@dataclass(frozen=True)
class Speculation:
    """How an engine drafts: k and the tokens a request gains in a step, by running batch.

    Attributes:
        k: int64 [slots + 1], indexed by the number of running requests.
        tokens: float64 [slots + 1].
    """

    k: NDArray[np.int64]
    tokens: Array

    @classmethod
    def fixed(cls, k: int, tokens: float, slots: int) -> Speculation:
        """The same k at every batch."""
        return cls(np.full(slots + 1, k), np.full(slots + 1, tokens))


class Fleet:
    """Replicas of one engine that generate what is submitted, in the order of submission.

    Attributes:
        request_steps: steps that each request took part in, summed over requests.
        tokens: that the requests gained in them.
    """

    def __init__(
        self, model: StepModel, speculation: Speculation, replicas: int, prompt_tokens: float
    ) -> None:
        self._model = model
        self._speculation = speculation
        self._slots = len(speculation.k) - 1
        self._prompt = prompt_tokens
        self._now = np.zeros(replicas)
        self._progress = np.zeros(replicas)
        nothing = np.zeros((replicas, 0))
        self._arrival = np.zeros(0)  # of each request, on all replicas
        self._length = nothing  # tokens of each request still to come when it is admitted
        self._start = nothing  # progress at admission; NaN while it waits
        self._end = nothing  # time at its end; NaN before
        self._names, self._empty, self._token = _affine(model, speculation)
        self._prefilling = np.zeros(replicas)
        self._stepping = np.zeros((len(self._names), replicas))
        self.request_steps = 0.0
        self.tokens = 0.0

    @property
    def busy(self) -> Array:
        """Seconds each replica has spent in steps and prefill; float64 [replicas]."""
        return np.asarray(self._prefilling + self._stepping.sum(axis=0))

    @property
    def parts(self) -> dict[str, float]:
        """Busy seconds by part of the step, mean over replicas."""
        seconds = self._stepping.mean(axis=1).tolist()
        return {
            "prefill": float(self._prefilling.mean()),
            **dict(zip(self._names, seconds, strict=True)),
        }

    def submit(self, lengths: Array, at: float, prefill_share: float = 1.0) -> None:
        """Hand requests to the engines.

        Args:
            lengths: float64 [replicas, requests], tokens that each will generate.
            at: when; not before any earlier submission.
            prefill_share: part of the prompts' tokens computed; the rest is in the prefix cache.
        """
        unknown = np.full_like(lengths, np.nan)
        self._arrival = np.append(self._arrival, np.full(lengths.shape[1], at))
        self._length = np.hstack([self._length, lengths])
        self._start = np.hstack([self._start, unknown])
        self._end = np.hstack([self._end, unknown])
        self._prefill = float(self._model.prefill_seconds(self._prompt * prefill_share))

    def complete(self, requests: int) -> float:
        """Run until each replica's first `requests` requests are done, and forget those.

        Returns:
            the time at which the last of them ended.
        """
        while True:
            waiting_for = np.any(np.isnan(self._end[:, :requests]), axis=1)
            if not waiting_for.any():
                break
            self._advance(waiting_for)
        last = float(self._end[:, :requests].max())
        self._arrival = self._arrival[requests:]
        self._length = self._length[:, requests:]
        self._start = self._start[:, requests:]
        self._end = self._end[:, requests:]
        return last

    def _advance(self, active: NDArray[np.bool_]) -> None:
        """Take each active replica to its next event."""
        self._admit(active)
        running = ~np.isnan(self._start) & np.isnan(self._end)
        batch = running.sum(axis=1)
        arrived = np.searchsorted(self._arrival, self._now, side="right")
        until_arrival = np.append(self._arrival, np.inf)[arrived] - self._now
        idle = active & (batch == 0)
        self._now[idle] += until_arrival[idle]
        stepping = active & (batch > 0)
        if stepping.any():
            self._step(stepping, running, batch, until_arrival)

    def _admit(self, active: NDArray[np.bool_]) -> None:
        waiting = np.isnan(self._start)
        arrived = waiting & (self._arrival <= self._now[:, None])
        if not arrived.any():
            return
        running = (~waiting & np.isnan(self._end)).sum(axis=1)
        free = np.where(active, self._slots - running, 0)
        admitted = arrived & (np.cumsum(arrived, axis=1) <= free[:, None])
        self._start = np.where(admitted, self._progress[:, None], self._start)
        seconds = admitted.sum(axis=1) * self._prefill
        self._now += seconds
        self._prefilling += seconds

    def _step(
        self,
        stepping: NDArray[np.bool_],
        running: NDArray[np.bool_],
        batch: NDArray[np.int64],
        until_arrival: Array,
    ) -> None:
        """All steps until the first running request ends or others arrive."""
        done = self._progress[:, None] - self._start
        left = np.where(running, self._length - done, np.inf)
        gain = np.where(stepping, left.min(axis=1), 0.0)
        grown = np.where(running, done, 0.0).sum(axis=1)
        context = self._prompt + grown / np.maximum(batch, 1) + gain / 2
        steps = gain / self._speculation.tokens[batch]
        parts = steps * (self._empty[:, batch] + self._token[:, batch] * context)
        seconds = parts.sum(axis=0)
        cut = np.minimum(1.0, until_arrival / np.maximum(seconds, 1e-12))
        ended = stepping[:, None] & running & (cut[:, None] == 1.0)
        ended &= left <= gain[:, None] * (1 + 1e-12) + 1e-9
        self.request_steps += float((batch * steps * cut).sum())
        self.tokens += float((batch * gain * cut).sum())
        self._stepping += parts * cut
        self._progress += gain * cut
        self._now += seconds * cut
        self._end = np.where(ended, self._now[:, None], self._end)


def _affine(model: StepModel, speculation: Speculation) -> tuple[list[str], Array, Array]:
    """A step's parts by running batch: names, seconds at no context, seconds a token of context.

    The model is affine in the context, so that asking it twice saves asking it at every event.

    Returns:
        names, and twice float64 [parts, slots + 1].
    """
    batches = np.arange(len(speculation.k))
    empty = model.parts(batches, 0.0, speculation.k)
    far = model.parts(batches, _FAR, speculation.k)
    at_none, at_far = np.stack(list(empty.values())), np.stack(list(far.values()))
    return list(empty), at_none, (at_far - at_none) / _FAR
