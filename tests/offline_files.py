"""A tiny policy on disk, rollouts that it sampled, and a drafter to begin with."""

from __future__ import annotations

import json
from pathlib import Path

import making
import torch
from transformers import Qwen3ForCausalLM

PROMPTS = [[3, 4], [5, 6, 7], [8, 9], [10, 11, 12], [13, 14], [15, 16, 17]]


def write_policy(folder: Path, **changes: object) -> Qwen3ForCausalLM:
    """A policy with opinions: its weights are large enough that p is far from uniform."""
    torch.manual_seed(0)
    policy = Qwen3ForCausalLM(making.policy_shape(initializer_range=0.3, **changes).config).eval()
    policy.save_pretrained(folder)
    return policy


def write_rollouts(path: Path, policy: Qwen3ForCausalLM, count: int, seed: int = 0) -> Path:
    """JSONL of rollouts sampled at temperature 1, of several prompts and lengths."""
    torch.manual_seed(seed)
    lines = []
    for number in range(count):
        prompt = PROMPTS[number % len(PROMPTS)] + [number % 19]
        length = 12 + number % 9
        output = policy.generate(
            torch.tensor([prompt]), do_sample=True, max_new_tokens=length, top_k=0, pad_token_id=0
        )[0].tolist()
        row = {
            "prompt_token_ids": prompt,
            "completion_token_ids": output[len(prompt) :],
            "domain": "odd" if number % 2 else "even",
        }
        lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_drafter(folder: Path, policy: Qwen3ForCausalLM) -> Path:
    drafter = making.drafter(making.policy_shape())
    with torch.no_grad():
        drafter.lm_head.weight.copy_(policy.lm_head.weight)
        drafter.norm.weight.copy_(policy.model.norm.weight)
    drafter.export(folder, torch.float32)
    return folder
