"""The demo's arithmetic and its report; the demo itself is run by `make demo`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from drafttrain.demo.report import last_third, print_report, write_report
from drafttrain.demo.statistics import two_sample_p_value
from drafttrain.errors import InputError


def draw(rng: np.random.Generator, weights: list[float], count: int) -> Counter[tuple[int, ...]]:
    return Counter((int(x),) for x in rng.choice(len(weights), size=count, p=weights))


def test_two_sample_p_value_is_uniform_for_equal_samples_and_tiny_for_others() -> None:
    rng = np.random.default_rng(0)
    weights = [0.4, 0.3, 0.2, 0.0995, 0.0005]
    shifted = [0.34, 0.36, 0.2, 0.0995, 0.0005]
    same = [
        two_sample_p_value(draw(rng, weights, 2000), draw(rng, weights, 2000)) for _ in range(200)
    ]
    assert 0.4 < np.mean(same) < 0.6
    assert np.mean(np.array(same) < 0.05) < 0.12
    assert two_sample_p_value(draw(rng, weights, 2000), draw(rng, shifted, 2000)) < 1e-3


def summary() -> dict[str, Any]:
    steps = [
        {
            "step": i,
            "time": float(i),
            "reward": 0.1 * i,
            "length": 50.0,
            "drafter_version": 2 + i,
            "arms": {
                "none": {"tokens_per_s": 100.0},
                "frozen": {"tokens_per_s": 120.0, "acceptance_length": 2.0},
                "sidecar": {"tokens_per_s": 150.0 + 10 * i, "acceptance_length": 2.0 + 0.2 * i},
            },
        }
        for i in range(6)
    ]
    totals = {
        "swaps": 2,
        "swap_seconds": [0.03, 0.04],
        "swap_steps": [0.5, 2.5],
        "aborted_requests": 0,
        "tap_overhead": 0.01,
        "converged_acceptance_length": 3.1,
        "ngram": {"tokens_per_s": 80.0, "acceptance_length": 1.2},
        "greedy_identical": True,
        "sampled_p_value": 0.5,
        "policy_drift": {"kl_to_start": 0.1, "entropy_first": 0.2, "entropy_last": 0.1},
    }
    return {"steps": steps, "totals": totals}


def test_last_third_takes_ratios_within_a_step() -> None:
    assert last_third(summary())["sidecar_over_none"] == pytest.approx(1.95)


def test_report_is_written_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(tmp_path, summary())
    assert json.loads((tmp_path / "summary.json").read_text()) == summary()
    print_report(tmp_path)
    assert "1.95x" in capsys.readouterr().out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_without_a_summary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"summary\.json"):
        print_report(tmp_path)
