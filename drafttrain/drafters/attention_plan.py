"""How attention goes in a batch: rollouts of similar length together, laid out in padded blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from drafttrain.drafters.batch import Batch

# Share of a group's scores that may be padding.
_PADDING = 0.25
# Queries at a time that are worth a product, however few keys a window leaves them.
_BAND = 128


def square_at_once(dtype: torch.dtype) -> int:
    """Slots squared that are attended to together, over all rollouts of a group.

    It bounds the scores that exist at once. In float32 fewer fit a processor's cache, and its
    slower products hide what an operation costs to start.
    """
    return 1 << (19 if dtype.itemsize == 2 else 17)


@dataclass(frozen=True)
class Placed:
    """Where some packed rows lie in a group's [rollouts, size] block.

    Attributes:
        rows: the rows in the packed tensor.
        places: int64 [n], their places in the block; None when they fill it in order.
    """

    rows: slice
    places: Tensor | None


@dataclass(frozen=True)
class Tile:
    """Some queries of a group and the keys they see.

    Attributes:
        first, start, stop: places; queries [start, stop) see keys of [first, stop).
        window: how many places a query sees, its own the last; None: all.
        gone: bool [rollouts, stop - first, stop - start], which keys have left a query's window;
            None where places tell.
    """

    first: int
    start: int
    stop: int
    window: int | None = None
    gone: Tensor | None = None

    @property
    def keys(self) -> slice:
        return slice(self.first, self.stop)

    @property
    def queries(self) -> slice:
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class Group:
    """Rollouts attended to together, each padded behind to the longest.

    A round stands at the place of its slot, so that attention is plainly causal; the places of
    slots that start no round hold zeros.

    Attributes:
        rollouts: how many.
        size: slots of the longest.
        tile: queries of each that are attended from at a time.
        slots, rounds: their context and their queries.
        reach: positions from a rollout's first slot to its last.
        positions: int64 [rollouts, size], of the slots; None where they follow one another.
    """

    rollouts: int
    size: int
    tile: int
    slots: Placed
    rounds: Placed
    reach: int
    positions: Tensor | None

    def block(self, packed: Tensor, placed: Placed, spare: int = 0) -> Tensor:
        """[N, heads, d] to [rollouts * heads, size, d + spare]; empty places are zero.

        What stands in the spare columns is left to the caller.
        """
        rows = packed[placed.rows]
        if placed.places is not None:
            filled = rows.new_zeros(self.rollouts * self.size, *rows.shape[1:])
            filled[placed.places] = rows
            rows = filled
        by_head = rows.view(self.rollouts, self.size, *rows.shape[1:]).transpose(1, 2)
        block = rows.new_empty(*by_head.shape[:-1], rows.shape[-1] + spare)
        block[..., : rows.shape[-1]] = by_head
        return block.flatten(0, 1)

    def unblock(self, block: Tensor, placed: Placed, packed: Tensor) -> None:
        """Write [rollouts * heads, size, d + spare] back to its rows of [N, heads, d]."""
        heads, width = packed.shape[1:]
        rows = block[..., :width].unflatten(0, (self.rollouts, heads)).transpose(1, 2)
        if placed.places is None:
            packed[placed.rows].view(rows.shape).copy_(rows)
        else:
            packed[placed.rows] = rows.flatten(0, 1)[placed.places]

    def tiles(self, window: int | None) -> Iterator[Tile]:
        """Queries at a time, the last first: without a window they see the most keys."""
        if window is None:
            for stop in range(self.size, 0, -self.tile):
                yield Tile(0, max(stop - self.tile, 0), stop)
            return
        tile = self._banded_tile(window)
        for stop in range(self.size, 0, -tile):
            start = max(stop - tile, 0)
            first = max(start - window + 1, 0)
            yield Tile(first, start, stop, window, self._gone(first, start, stop, window))

    def narrowed(self, window: int | None) -> int | None:
        """`window`, in positions, if any query sees fewer keys for it."""
        return window if window is not None and window < self.reach else None

    def _banded_tile(self, window: int) -> int:
        """Queries with no more scores than a tile has without a window, and few outside it."""
        scores = self.tile * self.size
        most = (math.isqrt(window**2 + 4 * scores) - window) // 2
        return max(min(most, max(window // 4, _BAND), self.size), 1)

    def _gone(self, first: int, start: int, stop: int, window: int) -> Tensor | None:
        if self.positions is None:
            return None
        queries, keys = self.positions[:, None, start:stop], self.positions[:, first:stop, None]
        return queries - keys >= window


class AttentionPlan:
    """How the rollouts of a batch are grouped for attention; made once, used at every depth."""

    def __init__(self, batch: Batch, dtype: torch.dtype, queries: Tensor | None = None) -> None:
        """Plan for queries from every round, or from those slots where `queries`, bool [S], is.

        `dtype` is what scores are computed in.
        """
        queries = batch.starts_round if queries is None else queries
        rollout_of, positions = batch.rollout_of[batch.slots], batch.positions[batch.slots]
        slots = torch.bincount(rollout_of, minlength=len(batch.lengths))
        first = (slots.cumsum(0) - slots)[rollout_of]
        within = torch.arange(len(rollout_of), device=slots.device) - first
        since = positions - positions[first]
        self.groups = list(
            _groups(
                slots.tolist(),
                rollout_of,
                within,
                since if bool((since != within).any()) else None,
                queries,
                square_at_once(dtype),
            )
        )


def _groups(
    slots: list[int],
    rollout_of: Tensor,
    within: Tensor,
    since: Tensor | None,
    queries: Tensor,
    at_once: int,
) -> Iterator[Group]:
    """Neighbours of similar length, as many as keep the scores few and the padding low.

    Args:
        slots: how many each rollout has.
        rollout_of, within: int64 [S], each slot's rollout and its place there.
        since: int64 [S], its position, the rollout's first slot having 0; None when it is `within`.
        queries: bool [S], where a query comes from.
        at_once: see :func:`square_at_once`.
    """
    start, slot, row = 0, 0, 0
    while start < len(slots):
        stop = start + 1
        while stop < len(slots) and _fit_together(slots[start : stop + 1], at_once):
            stop += 1
        size, here = max(slots[start:stop]), slice(slot, slot + sum(slots[start:stop]))
        places = (rollout_of[here] - start) * size + within[here]
        asking = places[queries[here]]
        if size:
            yield Group(
                stop - start,
                size,
                max(1, at_once // ((stop - start) * size)),
                _placed(here.start, places, (stop - start) * size),
                _placed(row, asking, (stop - start) * size),
                *_spread(None if since is None else since[here], places, (stop - start, size)),
            )
        start, slot, row = stop, here.stop, row + len(asking)


def _fit_together(slots: list[int], at_once: int) -> bool:
    square = len(slots) * max(slots) ** 2
    return square <= at_once and square * (1 - _PADDING) <= sum(s * s for s in slots)


def _spread(
    since: Tensor | None, places: Tensor, shape: tuple[int, int]
) -> tuple[int, Tensor | None]:
    """The `reach` and `positions` of a group of that shape."""
    if since is None:
        return shape[1], None
    positions = since.new_zeros(math.prod(shape)).index_copy(0, places, since)
    return int(since.max()) + 1, positions.view(shape)


def _placed(first_row: int, places: Tensor, size: int) -> Placed:
    rows = slice(first_row, first_row + len(places))
    return Placed(rows, None if len(places) == size else places)
