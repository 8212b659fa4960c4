"""The benchmarks run: every contender takes whole steps, and the JSON is the promised one."""

from __future__ import annotations

import pytest

from benchmarks.measure import measure
from benchmarks.peers import FLOOR, OURS, PEERS
from benchmarks.train_step import row_of
from benchmarks.workload import Cell

TINY = Cell(hidden=64, vocab=96, tokens=64, rollout_length=16, ttt=2)


def test_a_cell_of_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than all else here
    names = [OURS, FLOOR, *PEERS]
    results = measure(TINY, dict.fromkeys(names, "float32"))
    row = row_of(TINY, results, PEERS)
    assert set(row) == {
        *("hidden", "vocab", "tokens", "rollout_length", "ttt", "tokens_per_s", "speed_ratio"),
        *("matmul_floor_tokens_per_s", "peer_tokens_per_s", "peak_bytes", "peer_peak_bytes"),
        *("memory_ratio", "settings", "repetitions", "skipped"),
    }
    assert set(row["peer_tokens_per_s"]) == set(row["peer_peak_bytes"]) == set(PEERS)
    assert row["speed_ratio"] == row["tokens_per_s"] / max(row["peer_tokens_per_s"].values())
    assert row["skipped"] == {}
