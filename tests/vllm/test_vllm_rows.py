"""The rows of a request against a plain record of what was noted last at each position."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.integrations.vllm.rows import Part, Rows

LENGTH, STATES, WIDTH = 12, 3, 2

# Where a step's rows start, how many they are, and whether they are noted with those of the step
# before, in one call.
steps = st.lists(
    st.tuples(st.integers(0, LENGTH - 1), st.integers(0, 5), st.booleans()), min_size=1, max_size=12
)
windows = st.tuples(st.integers(0, LENGTH), st.integers(1, LENGTH)).filter(lambda w: w[0] < w[1])


@given(steps, windows, st.integers(1, LENGTH))
def test_the_last_row_noted_at_each_position_is_kept(
    steps: list[tuple[int, int, bool]], window: tuple[int, int], length: int
) -> None:
    rows, noted = Rows(window), {}
    calls: list[list[Part]] = [[]]
    for number, (start, count, together) in enumerate(steps):
        step = np.full((count, STATES, WIDTH), number + 1, dtype=np.uint8)
        step[:, 0] += 100
        if not together:
            calls.append([])
        calls[-1].append((start, step.view(f"V{WIDTH}")[..., 0]))
        inside = range(max(start, window[0]), min(start + count, window[1]))
        noted |= dict.fromkeys(inside, number + 1)
    for parts in calls:
        rows.note(parts)
        for _, memory in parts:  # an engine's steps use theirs again
            memory.view(np.uint8)[:] = 0
    assert bool(rows) == bool(noted)
    if not noted:
        return
    taken = rows.take(length)
    last, aux = (states.view(np.uint8).reshape(*states.shape, WIDTH) for states in taken[:2])
    captured = taken[2]
    numbers = np.array([noted.get(position, 0) for position in range(length)])
    assert np.array_equal(captured, numbers > 0)
    assert np.array_equal(last, np.where(captured, numbers + 100, 0)[:, None].repeat(WIDTH, 1))
    assert np.array_equal(aux, np.broadcast_to(numbers[:, None, None], aux.shape))
    assert not rows
    assert rows.held_bytes == 0
