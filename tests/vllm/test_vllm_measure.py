"""``eval --engine``: what the estimate says of saved rollouts is what a real vLLM counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from engines import generate, prompts, sampled

from drafttrain.checkpoints.registry import Registry


@pytest.fixture(scope="module")
def rollouts(plain_engine: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sampled without speculation, and saved as token ids."""
    asked = prompts([8 + i % 9 for i in range(240)], salt=77)
    outputs = generate(plain_engine, asked, sampled(1.0, 48))
    path = tmp_path_factory.mktemp("saved") / "rollouts.jsonl"
    rows = [
        {"prompt_token_ids": prompt, "completion_token_ids": list(output)}
        for prompt, output in zip(asked, outputs, strict=True)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_estimate_and_engine_agree(rollouts: Path, policy: Path, registry: Registry) -> None:
    command = [
        sys.executable, "-m", "drafttrain", "eval", "--engine", "--json",
        "--target", str(policy),
        "--rollouts", str(rollouts),
        "--drafter", str(registry.folder(2)),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    row = json.loads(result.stdout.strip().splitlines()[-1])
    assert row["acceptance_length"] > 1.3
    assert row["engine_acceptance_length"] == pytest.approx(row["acceptance_length"], rel=0.02)
    assert row["engine_tokens_per_second"] > 0
