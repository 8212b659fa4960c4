"""What trains and estimates does so on another device as on the CPU, and keeps there what it needs.

No GPU is needed: the other device is pretended (``pretend_gpu.py``), in a process of its own.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import device_runs
import making
import pytest
import torch

from drafttrain.config import TrainingConfig
from drafttrain.training.devices import computed_in
from drafttrain.training.heads import LmHeads

CPU, GPU, META = torch.device("cpu"), torch.device("cuda", 0), torch.device("meta")
POLICY = making.policy_shape()


def test_everything_trained_and_estimated_elsewhere_is_as_on_the_cpu(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    program = [sys.executable, device_runs.__file__, str(tmp_path / "there")]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:4000]
    found = json.loads(done.stdout)
    for name, figures in device_runs.runs(tmp_path / "here", CPU):
        assert found.pop(name) == pytest.approx(figures, rel=1e-4), name
    assert not found


def test_a_policys_head_is_moved_once() -> None:
    heads = LmHeads(META, most_bytes=1 << 20)
    first, second = (making.policy_head(POLICY, version) for version in (0, 1))
    moved = heads.on_device(first)
    assert moved.device == META
    assert heads.on_device(second) is not moved
    assert heads.on_device(first) is moved
    # The same version of another run, or written anew.
    assert heads.on_device(dataclasses.replace(first, lm_head=first.lm_head.clone())) is not moved


def test_heads_used_last_stay_within_the_bytes() -> None:
    first, second, third = (making.policy_head(POLICY, version) for version in (0, 1, 2))
    heads = LmHeads(META, most_bytes=2 * first.lm_head.nbytes)
    moved = [heads.on_device(head) for head in (first, second)]
    assert heads.on_device(first) is moved[0]
    heads.on_device(third)
    assert heads.on_device(first) is moved[0]
    assert heads.on_device(second) is not moved[1]
    narrow = LmHeads(META, most_bytes=0)
    assert narrow.on_device(first) is narrow.on_device(first)


def test_heads_that_are_there_are_not_copied() -> None:
    head = making.policy_head(POLICY)
    assert LmHeads(CPU).on_device(head) is head.lm_head


def test_the_default_precision_is_the_devices() -> None:
    default = TrainingConfig().precision
    assert computed_in(default, CPU) == torch.float32
    assert computed_in(default, GPU) == torch.bfloat16
    assert computed_in("float32", GPU) == torch.float32
    assert computed_in("bfloat16", CPU) == torch.bfloat16
