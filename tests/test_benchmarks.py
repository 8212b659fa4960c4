"""The benchmarks run: every contender takes whole steps, and the JSON is the promised one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.measure import measure
from benchmarks.peers import FLOOR, OURS, PEERS
from benchmarks.train_step import row_of
from benchmarks.workload import Cell, policy_config
from drafttrain.drafters import PolicyShape, load_drafter
from drafttrain.opening import Inputs, read_inputs

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


def test_specforges_recipe_ends_with_a_drafter(tmp_path: Path) -> None:
    from benchmarks import specforge_pipeline  # slow to import

    policy = tmp_path / "policy"
    LlamaForCausalLM(policy_config(TINY)).save_pretrained(policy)
    file = tmp_path / "rollouts.jsonl"
    row = json.dumps({"prompt_token_ids": [1, 2], "completion_token_ids": list(range(3, 13))})
    file.write_text(f"{row}\n" * (2 * specforge_pipeline.BATCH))
    saved = read_inputs(Inputs(policy, [file])).rollouts
    with torch.compiler.set_stance("force_eager"):
        folder = specforge_pipeline.train(
            policy, saved, (1, 2, 3), tmp_path / "drafter", epochs=1, learning_rate=1e-3
        )
    drafter = load_drafter(folder, PolicyShape.from_folder(policy))
    assert drafter.kind == "eagle3"
    assert drafter.layer_ids == (1, 2, 3)
