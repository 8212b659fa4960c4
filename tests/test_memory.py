"""The memory told before a run is about what the run then takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import making
import pytest

from drafttrain.config import PretrainConfig, TrainingConfig
from drafttrain.errors import ConfigError
from drafttrain.pretrain.memory import MemoryPlan, fit_microbatch, predict

MEASURE = """
import re, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
import test_memory as t
import making
from drafttrain.training.trainer import Trainer

def peak():  # of this program; getrusage's would count the process that started it
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024

policy, config = t.policy(), t.config({tokens})
layout = making.layout(policy)
rollouts = t.long_rollouts(policy, {tokens})
head = making.policy_head(policy)
drafter = making.drafter(policy)
trainer = Trainer(drafter, config.training)
before = peak()
trainer.step_on([rollouts], layout, {{0: head}})
trainer.step_on([rollouts], layout, {{0: head}})
print(peak() - before)
"""


def policy():
    return making.policy_shape(
        vocab_size=6000,
        hidden_size=128,
        intermediate_size=512,
        num_attention_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
    )


def config(tokens: int) -> PretrainConfig:
    training = TrainingConfig(tokens_per_step=tokens)
    return PretrainConfig(training=training, microbatch_tokens=tokens)


def long_rollouts(policy, tokens: int, length: int = 512):
    """Copies of a rollout with random features, as many as make up `tokens`."""
    import torch

    from drafttrain.rollouts.record import Rollout

    rollout = Rollout(
        rollout_id="long",
        group="g",
        tokens=torch.randint(6000, (length,), dtype=torch.int32),
        prompt_length=8,
        captured=torch.arange(length) < length - 1,
        last_hidden=torch.randn(length, policy.hidden_size),
        aux_hidden=torch.randn(length, 3, policy.hidden_size),
        policy_version=0,
        drafter_version=None,
        temperature=1.0,
    )
    return [rollout] * (tokens // length)


def plan(tokens: int) -> MemoryPlan:
    shape = policy()
    return predict(
        making.drafter(shape), shape, making.layout(shape), config(tokens),
        tokens=tokens, longest=512, policy_bytes=0,
    )  # fmt: skip


def test_the_prediction_is_near_what_steps_take() -> None:
    script = MEASURE.format(tests=str(Path(__file__).parent), tokens=4096)
    printed = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    parts = dict(plan(4096).parts)
    del parts["features of coming steps"]  # nothing is loaded ahead here
    assert 0.5 < int(printed) / sum(parts.values()) < 1.5


def test_more_tokens_take_more() -> None:
    totals = [plan(tokens).total for tokens in (512, 1024, 2048, 4096)]
    assert totals == sorted(totals)
    assert totals[0] < totals[-1]


def test_the_largest_microbatch_that_fits_is_taken() -> None:
    plans = {tokens: plan(tokens) for tokens in (512, 1024, 2048)}
    assert fit_microbatch(plans, plans[1024].total) == 1024
    assert fit_microbatch(plans, plans[2048].total + 1) == 2048
    with pytest.raises(ConfigError, match="do not hold even the smallest"):
        fit_microbatch(plans, plans[512].total - 1)


KEPT = """
import re
from pathlib import Path
import torch
from drafttrain.training.devices import Devices

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

Devices()
before = resident()
torch.ones(1 << 26)
print(resident() - before)
"""


def test_memory_that_a_step_gives_back_stays_with_the_process() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 200 << 20  # of 256 MiB
