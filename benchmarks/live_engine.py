"""What the engine benchmarks share: a policy, a registry of drafters for it, an engine without."""

from __future__ import annotations

import os

# Before vLLM is imported, which reads them then. Threads must not fight over few cores.
os.environ.update(
    OMP_NUM_THREADS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drafttrain.checkpoints.manifest import TargetFingerprint
from drafttrain.checkpoints.registry import Registry
from drafttrain.publishing import UNTRAINED
from tests.vllm.tiny_models import (
    TINY,
    Size,
    bigram_drafter,
    load_policy,
    make_drafter,
    make_policy,
    random_drafter,
)

K = 3
# At RL temperatures this accepts far more than vLLM's default.
PROBABILISTIC = {
    "method": "eagle3",
    "num_speculative_tokens": K,
    "draft_sample_method": "probabilistic",
}


@dataclass(frozen=True)
class Bench:
    """A policy on disk, and a registry whose odd versions draft at random and even ones well."""

    folder: Path
    policy: Path
    registry: Registry

    def speculative(self, version: int = 1) -> dict[str, Any]:
        """vLLM's configuration to draft with a version from the start."""
        return PROBABILISTIC | {"model": str(self.registry.folder(version))}

    def settings(self, **more: Any) -> dict[str, Any]:
        """The plugin's, with everything switched on."""
        folders = {"spool": str(self.folder / "spool"), "registry": str(self.registry.root)}
        return folders | {"engine": "bench"} | more


@contextmanager
def bench(size: Size = TINY, versions: int = 4) -> Iterator[Bench]:
    """A new one in a temporary folder, deleted at the end, also when that is a SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="drafttrain-bench-") as name:
        folder = Path(name)
        policy = make_policy(folder / "policy", size=size)
        registry = Registry(folder / "registry")
        with torch.no_grad():
            good = bigram_drafter(load_policy(policy))
        for version in range(1, versions + 1):
            tensors = random_drafter(version, size)
            if version % 2 == 0:  # alike in what they accept, different in every byte
                tensors = good | {"norm.weight": good["norm.weight"] * (1 + version / 100)}
            drafter = make_drafter(folder / f"drafter-{version}", tensors, size)
            registry.publish(
                drafter,
                kind="eagle3",
                target=TargetFingerprint.from_folder(policy),
                parent=version - 1 or None,
                lineage=UNTRAINED,
                acceptance=None,
            )
        yield Bench(folder, policy, registry)


def parser(description: str | None) -> argparse.ArgumentParser:
    """With ``--json``, which every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", action="store_true", help="print the result as one JSON object")
    return made


def print_result(result: dict[str, Any], as_json: bool) -> None:
    """To standard output; progress goes to standard error."""
    if as_json:
        print(json.dumps(result))
        return
    width = max(map(len, result))
    for key, value in result.items():
        print(f"{key:<{width}}  {value}")


def say(progress: str) -> None:
    print(progress, file=sys.stderr, flush=True)
