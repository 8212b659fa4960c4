"""The hidden states of one running request, out of the rows of its steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

States = NDArray[np.void]
"""[n, 1 + A], each element all bytes of one state. Numpy knows no bfloat16; and it lets go of
Python's lock to copy 500 elements and more, which between two small copies costs the engine's
thread more than it gives."""

Part = tuple[int, States]
"""The position of the first row, and the rows."""


class Rows:
    """Rows by position: the last hidden state and the aux states.

    Attributes:
        held_bytes: of what was noted.
    """

    def __init__(self, window: tuple[int, int]) -> None:
        """Args:
        window: positions [start, end) that are kept.
        """
        self.held_bytes = 0
        self._window = window
        self._parts: list[Part] = []

    def __bool__(self) -> bool:
        return bool(self._parts)

    def note(self, parts: Iterable[Part]) -> None:
        """Copies rows; noting a position again replaces it."""
        for start, following in _runs(self._inside(parts)):
            rows = np.concatenate(following)
            self._parts.append((start, rows))
            self.held_bytes += rows.nbytes

    def _inside(self, parts: Iterable[Part]) -> Iterator[Part]:
        """What is in the window."""
        first, end = self._window
        for start, rows in parts:
            if start < first or start + len(rows) > end:
                rows = rows[max(first - start, 0) : max(end - start, 0)]
                start = max(start, first)
            if len(rows):
                yield start, rows

    def clear(self) -> None:
        self.held_bytes = 0
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


def _runs(parts: Iterable[Part]) -> list[tuple[int, list[States]]]:
    """Parts of which each begins where the one before it ends, together, with the first's start."""
    runs: list[tuple[int, list[States]]] = []
    end = None
    for start, rows in parts:
        if start != end:
            runs.append((start, []))
        runs[-1][1].append(rows)
        end = start + len(rows)
    return runs
