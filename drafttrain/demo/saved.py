"""Rollouts of the demo's policy, saved as an RL job would leave them: JSONL of token ids."""

from __future__ import annotations

import json
import random
from pathlib import Path

from drafttrain.demo.arms import Arm
from drafttrain.demo.task import Task

GROUP = 4
MAX_TOKENS = 160
_AT_ONCE = 128


def save_rollouts(policy: Path, path: Path, count: int, seed: int = 0) -> None:
    """Sample `count` rollouts at temperature 1, `GROUP` of each prompt, without speculation."""
    task, rng = Task(), random.Random(seed)
    prompts = [task.sample_problem(rng).prompt_ids for _ in range(-(-count // GROUP))]
    prompts = [prompt for prompt in prompts for _ in range(GROUP)][:count]
    arm = Arm("saving", policy, speculation=None, batch=32, max_model_len=256)
    with path.open("w") as file:
        for start in range(0, count, _AT_ONCE):
            asked = prompts[start : start + _AT_ONCE]
            completions = arm.rollout(asked, MAX_TOKENS, task.eos_id).completions
            for prompt, completion in zip(asked, completions, strict=True):
                row = {"prompt_token_ids": prompt, "completion_token_ids": completion}
                file.write(json.dumps(row | {"temperature": 1.0}) + "\n")
