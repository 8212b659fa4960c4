"""The benchmarks run: every contender takes whole steps, and the JSON is the promised one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.floor import operations
from benchmarks.measure import faster_precisions, measure
from benchmarks.peers import FLOOR, OURS, PEERS, Variant
from benchmarks.train_step import row_of
from benchmarks.worker import Timing
from benchmarks.workload import Cell, policy_config
from drafttrain.drafters import PolicyShape, load_drafter
from drafttrain.opening import Inputs, read_inputs

TINY = Cell(hidden=64, vocab=96, tokens=64, rollout_length=16, ttt=2)
NARROW = replace(TINY, draft_vocab=40, key_value_heads=1, intermediate=96)


@pytest.mark.parametrize(("cell", "apart"), [(TINY, False), (NARROW, True)])
def test_a_cell_of_everyone(cell: Cell, apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")  # compiling takes longer than all else here
    monkeypatch.setattr(Cell, "apart", apart)
    names = [OURS, FLOOR, *PEERS]
    results = measure(cell, dict.fromkeys(names, "float32"))
    row = row_of(cell, results, PEERS)
    assert set(row) == {
        *("hidden", "vocab", "tokens", "rollout_length", "ttt", "tokens_per_s", "speed_ratio"),
        *("matmul_floor_tokens_per_s", "peer_tokens_per_s", "peak_bytes", "peer_peak_bytes"),
        *("memory_ratio", "settings", "repetitions", "skipped", "mfu"),
        *("draft_vocab", "head_dim", "key_value_heads", "intermediate"),
    }
    assert set(row["peer_tokens_per_s"]) == set(row["peer_peak_bytes"]) == set(PEERS)
    assert row["speed_ratio"] == row["tokens_per_s"] / max(row["peer_tokens_per_s"].values())
    assert row["skipped"] == {}


def test_the_operations_of_a_step() -> None:
    rows, drafted, hidden, attended = 4 * 15, 4 * 14, 64, 4 * 15 * 15
    layer = hidden * (2 * (64 + 2 * 32) + 64 + 3 * 96)
    depth = 3 * (rows * layer + drafted * hidden * 40) + 6 * attended * 64
    once = 2 * rows * 3 * hidden * hidden + drafted * hidden * 96
    assert operations(NARROW) == 2 * (once + 2 * depth)


class ScriptedWorker:
    """Stands in for a process: its steps take the seconds that are written down."""

    taken: ClassVar[list[str]]
    seconds: ClassVar[dict[str, list[float]]]

    def __init__(self, name: str, cell: Cell, variant: Variant) -> None:
        self._precision, self._left = variant.precision, iter(self.seconds[variant.precision])

    def wait(self) -> ScriptedWorker:
        return self

    def step(self) -> Timing:
        self.taken.append(self._precision)
        return Timing(next(self._left))

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("bfloat16", "chosen", "steps"),
    [([60.0, 0.5, 0.4], "bfloat16", 3), ([60.0, 60.0, 60.0], "float32", 2)],
    ids=["compiles in its first step", "hopeless"],
)
def test_the_faster_precision_is_chosen(
    bfloat16: list[float], chosen: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ScriptedWorker, "taken", [], raising=False)
    script = {"float32": [20.0, 1.0, 1.0], "bfloat16": bfloat16}
    monkeypatch.setattr(ScriptedWorker, "seconds", script, raising=False)
    monkeypatch.setattr("benchmarks.measure.Worker", ScriptedWorker)
    assert faster_precisions([OURS], TINY) == {OURS: chosen, FLOOR: chosen}
    assert ScriptedWorker.taken.count("bfloat16") == steps


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
