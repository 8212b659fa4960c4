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
from drafttrain.training.heads import DeviceHeads

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
    heads = DeviceHeads(META, most_bytes=1 << 20)
    first, second = (making.policy_head(POLICY, version) for version in (0, 1))
    moved = heads.moved(first)
    assert moved.lm_head.device == META
    assert moved.embed_tokens is first.embed_tokens
    assert heads.moved(second).lm_head is not moved.lm_head
    assert heads.of({0: first})[0].lm_head is moved.lm_head
    # The same version of another run, or written anew.
    again = dataclasses.replace(first, lm_head=first.lm_head.clone())
    assert heads.moved(again).lm_head is not moved.lm_head


def test_heads_used_last_stay_within_the_bytes() -> None:
    first, second, third = (making.policy_head(POLICY, version) for version in (0, 1, 2))
    heads = DeviceHeads(META, most_bytes=2 * first.lm_head.nbytes)
    moved = [heads.moved(head).lm_head for head in (first, second)]
    assert heads.moved(first).lm_head is moved[0]
    heads.moved(third)
    assert heads.moved(first).lm_head is moved[0]
    assert heads.moved(second).lm_head is not moved[1]
    narrow = DeviceHeads(META, most_bytes=0)
    assert narrow.moved(first).lm_head is narrow.moved(first).lm_head


def test_heads_that_are_there_are_not_copied() -> None:
    head = making.policy_head(POLICY)
    assert DeviceHeads(CPU).moved(head) is head


def test_the_default_precision_is_the_devices() -> None:
    default = TrainingConfig().precision
    assert computed_in(default, CPU) == torch.float32
    assert computed_in(default, GPU) == torch.bfloat16
    assert computed_in("float32", GPU) == torch.float32
    assert computed_in("bfloat16", CPU) == torch.bfloat16
