"""Which rollouts the tap keeps when it is told not to keep everything."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.integrations.vllm.selection import Selection
from drafttrain.integrations.vllm.settings import EngineSettings


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_a_fraction_of_prompt_groups_is_kept_whole(fraction: float) -> None:
    selection = Selection(EngineSettings(keep_fraction=fraction))
    kept = [selection.keeps(f"group {i}") for i in range(4000)]
    assert kept == [selection.keeps(f"group {i}") for i in range(4000)]
    assert sum(kept) / 4000 == pytest.approx(fraction, abs=0.03)


@given(st.text(), st.integers(1, 500), st.integers(1, 500))
def test_windows_lie_within_the_request(req_id: str, window: int, longest: int) -> None:
    selection = Selection(EngineSettings(window_tokens=window))
    start, end = selection.window(req_id, longest)
    assert 0 <= start < end <= longest
    assert end - start == min(window, longest)


def test_windows_lie_everywhere() -> None:
    selection = Selection(EngineSettings(window_tokens=10))
    starts = {selection.window(str(i), 20)[0] for i in range(200)}
    assert starts == set(range(11))


def test_a_budget_is_kept_on_average() -> None:
    now = 0.0
    selection = Selection(EngineSettings(max_bytes_per_second=100), clock=lambda: now)
    spent = 0
    for tick in range(1000):
        now = tick / 10
        if selection.keeps("any"):
            selection.spend(250)
            spent += 250
    assert spent == pytest.approx(100 * 100, rel=0.05)
