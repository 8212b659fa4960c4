"""Acceptance by position, and how it moves while the policy does.

The chance that a draft is accepted, *given* that those before it were, falls slowly with its
position j: ``first * decay ** (j - 1)``. Two parameters are enough for published acceptance lengths
at several k; from one acceptance length only ``first`` can be told, and ``decay`` is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator
from scipy.optimize import brentq, least_squares

from drafttrain.config import Fraction, Section


class Drift(Section):
    """How acceptance moves with the policy's version, relative to a drafter trained on it."""

    initial_loss: Fraction = 0.0
    """Part of each position's acceptance missing at first: a drafter of another domain."""
    per_version: Fraction = 0.0
    """Part lost each time the policy moves by one version."""
    recovery: Fraction = 0.0
    """Part of what is missing that training on one version's rollouts wins back."""

    def losses(self, versions: int, trained: bool) -> NDArray[np.float64]:
        """Part of acceptance missing while version 0, 1, ... generates; float64 [versions]."""
        loss, losses = self.initial_loss, []
        for _ in range(versions):
            losses.append(loss)
            if trained:
                loss *= 1 - self.recovery
            loss = 1 - (1 - loss) * (1 - self.per_version)
        return np.array(losses)


class Acceptance(Section):
    """Acceptance by position, given in one of three ways."""

    constant: Fraction | None = None
    """The same chance at every position, given that the drafts before were accepted."""
    per_position: tuple[Fraction, ...] | None = None
    """As ``drafttrain eval`` prints it: the fraction of rounds that accept each position.
    Positions beyond the last go on with the last one's conditional chance."""
    lengths: dict[int, float] | None = None
    """Acceptance length by k, the policy's own token included."""
    drift: Drift = Drift()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (
            sum(source is not None for source in (self.constant, self.per_position, self.lengths))
            != 1
        ):
            raise ValueError("expected one of constant, per_position and lengths")
        if self.per_position is not None:
            falls = np.diff(self.per_position)
            if not self.per_position or np.any(falls > 0):
                raise ValueError("per_position needs at least one position and must not rise")
        for k, length in (self.lengths or {}).items():
            if not (1 <= k <= 64 and 1 <= length <= k + 1):
                raise ValueError(f"lengths: {length} at k {k}; expected 1 to k + 1, k up to 64")
        if self.lengths == {}:
            raise ValueError("lengths is empty")
        return self

    def conditional(self, k: int) -> NDArray[np.float64]:
        """Chance at each position given those before were accepted; float64 [k]."""
        if self.constant is not None:
            return np.full(k, self.constant)
        if self.per_position is not None:
            survive = np.array(self.per_position)
            before = np.concatenate([[1.0], survive[:-1]])
            chances = np.divide(survive, before, out=np.zeros_like(survive), where=before > 0)
            beyond = np.full(max(0, k - len(chances)), chances[-1])
            return np.asarray(np.concatenate([chances, beyond])[:k])
        first, decay = fit_lengths(self.lengths or {})
        return np.asarray(np.minimum(first * decay ** np.arange(k), 1.0))

    def per_position_at(self, k: int, loss: float = 0.0) -> NDArray[np.float64]:
        """Fraction of rounds that accept each position; float64 [k]."""
        return np.asarray(np.cumprod(self.conditional(k) * (1.0 - loss)))


def fit_lengths(lengths: dict[int, float]) -> tuple[float, float]:
    """``first`` and ``decay`` from acceptance lengths by k.

    Exact for one length; least squares of the relative error for more.
    """
    if len(lengths) == 1:
        [(k, length)] = lengths.items()
        return constant_chance(k, length), 1.0
    ks, published = list(lengths), np.array(list(lengths.values()))

    def errors(parameters: Sequence[float]) -> NDArray[np.float64]:
        chances = np.minimum(parameters[0] * parameters[1] ** np.arange(max(ks)), 1.0)
        survive = np.cumprod(chances)
        return np.asarray([1 + survive[:k].sum() for k in ks] / published - 1)

    start = [constant_chance(ks[0], lengths[ks[0]]), 0.98]
    fitted = least_squares(errors, start, bounds=([0.0, 0.0], [1.0, 1.2]))
    return float(fitted.x[0]), float(fitted.x[1])


def constant_chance(k: int, length: float) -> float:
    """The chance, the same at every position, that gives an acceptance length at k."""
    return float(brentq(lambda rate: 1 + sum(rate**j for j in range(1, k + 1)) - length, 0.0, 1.0))
