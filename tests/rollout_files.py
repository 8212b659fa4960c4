"""Small rollouts and spools for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout, prompt_group
from drafttrain.rollouts.spool import SpoolWriter

HIDDEN = 4
LAYOUT = FeatureLayout((1, 2, 4), HIDDEN, last_hidden_normed=True, dtype="bfloat16")
NO_AUX = FeatureLayout((), HIDDEN, last_hidden_normed=False, dtype="float32")
HALF = replace(LAYOUT, dtype="float16")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}


def make_rollout(
    seed: int = 0,
    *,
    length: int = 6,
    prompt_length: int = 2,
    policy_version: int = 0,
    layout: FeatureLayout = LAYOUT,
) -> Rollout:
    """A rollout of random tokens and features; the prompt depends on `seed` alone."""
    generator = torch.Generator().manual_seed(seed)
    dtype, aux = DTYPES[layout.dtype], len(layout.layer_ids)
    tokens = torch.randint(1000, (length,), generator=generator, dtype=torch.int32)
    return Rollout(
        rollout_id=f"request-{seed}",
        group=prompt_group(tokens[:prompt_length].tolist()),
        tokens=tokens,
        prompt_length=prompt_length,
        captured=torch.arange(length) < length - 1,
        last_hidden=torch.randn(length, HIDDEN, generator=generator).to(dtype),
        aux_hidden=torch.randn(length, aux, HIDDEN, generator=generator).to(dtype) if aux else None,
        policy_version=policy_version,
        drafter_version=None,
        temperature=1.0,
        finish_reason="stop",
    )


def make_head(policy_version: int = 0) -> PolicyHead:
    generator = torch.Generator().manual_seed(policy_version)
    return PolicyHead(
        policy_version,
        embed_tokens=torch.randn(10, HIDDEN, generator=generator),
        lm_head=torch.randn(10, HIDDEN, generator=generator),
        final_norm=torch.randn(HIDDEN, generator=generator),
        norm_eps=1e-6,
    )


def fill(root: Path, policy_versions: list[int], rollouts: int = 4, length: int = 6) -> list[Path]:
    """A spool with one segment for each of `policy_versions`, and their heads."""
    writer = SpoolWriter(root, "engine-0")
    paths = []
    for index, version in enumerate(policy_versions):
        writer.write_head(make_head(version))
        seeds = range(index * rollouts, (index + 1) * rollouts)
        batch = [make_rollout(seed, length=length, policy_version=version) for seed in seeds]
        paths.append(writer.write(batch, LAYOUT))
    return paths
