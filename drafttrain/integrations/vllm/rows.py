"""The hidden states of one running request, out of the rows of its steps."""

from __future__ import annotations

from itertools import groupby

import numpy as np
from numpy.typing import NDArray

States = NDArray[np.void]
"""[n, 1 + A], each element all bytes of one state. Numpy knows no bfloat16; and it lets go of
Python's lock to copy 500 elements and more, which between two small copies costs the engine's
thread more than it gives."""

_Part = tuple[int, States]


class Rows:
    """Rows by position: the last hidden state and the aux states.

    A step's rows are only referred to at first: copying those of several steps at once takes far
    less time under Python's lock, for which the engine's thread would have to wait. Whoever owns
    the step's memory has :meth:`own` called before it is used again.

    Attributes:
        held_bytes: of what was noted.
    """

    def __init__(self, window: tuple[int, int]) -> None:
        """Args:
        window: positions [start, end) that are kept.
        """
        self.held_bytes = 0
        self._window = window
        self._parts: list[_Part] = []
        self._owned = 0  # the first so many parts

    def __bool__(self) -> bool:
        return bool(self._parts)

    def note(self, start: int, rows: States) -> None:
        """Rows of positions ``start`` on; noting a position again replaces it."""
        first, end = self._window
        if start < first or start + len(rows) > end:
            rows = rows[max(first - start, 0) : max(end - start, 0)]
            start = max(start, first)
        if len(rows):
            self._parts.append((start, rows))
            self.held_bytes += rows.nbytes

    def own(self) -> None:
        """Copies what is only referred to."""
        noted = self._parts[self._owned :]
        self._parts[self._owned :] = _joined(noted)
        self._owned = len(self._parts)

    def clear(self) -> None:
        self.held_bytes = self._owned = 0
        self._parts = []

    def take(self, length: int) -> tuple[States, States, NDArray[np.bool_]]:
        """All of them, for a request of ``length`` tokens; nothing is left here.

        Returns:
            last [T], aux [T, A], captured [T]; what was not captured is zero.
        """
        parts = self._parts[::-1]
        self.clear()
        kind = parts[0][1]
        last = np.empty(length, dtype=kind.dtype)
        aux = np.empty((length, kind.shape[1] - 1), dtype=kind.dtype)
        captured = np.zeros(length, dtype=np.bool_)
        while parts:  # popped: a long request's rows should not be there twice
            start, rows = parts.pop()
            rows = rows[: max(length - start, 0)]
            here = slice(start, start + len(rows))
            last[here], aux[here], captured[here] = rows[:, 0], rows[:, 1:], True
        missing = ~captured
        last[missing] = aux[missing] = np.zeros((), dtype=kind.dtype)
        return last, aux, captured


def _joined(parts: list[_Part]) -> list[_Part]:
    """Copies, in which parts that follow each other are one."""
    ends = np.cumsum([len(rows) for _, rows in parts])
    # Of parts in a row, the start less the rows before it is the same.
    offsets = [start + len(rows) - end for (start, rows), end in zip(parts, ends, strict=True)]
    runs = groupby(zip(offsets, parts, strict=True), key=lambda each: each[0])
    joined = []
    for _, run in runs:
        together = [part for _, part in run]
        joined.append((together[0][0], np.concatenate([rows for _, rows in together])))
    return joined
