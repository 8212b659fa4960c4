"""Real engines on CPU: one policy, one registry, a few engines for the whole session."""

from __future__ import annotations

import os

# Before vLLM is imported, which reads them then. Threads must not fight over two cores.
os.environ.update(
    OMP_NUM_THREADS="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_LOGGING_LEVEL="ERROR",
)

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import make_engine
from tiny_models import bigram_drafter, load_policy, make_drafter, make_policy, random_drafter

from drafttrain.checkpoints.manifest import Lineage, TargetFingerprint
from drafttrain.checkpoints.registry import Registry


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def policy(folder: Path) -> Path:
    return make_policy(folder / "policy")


@pytest.fixture(scope="session")
def reference(policy: Path) -> Any:
    """The policy in transformers."""
    return load_policy(policy)


@pytest.fixture(scope="session")
def start_drafter(folder: Path) -> Path:
    return make_drafter(folder / "start", random_drafter(0))


@pytest.fixture(scope="session")
def registry(folder: Path, policy: Path, reference: Any) -> Registry:
    """Version 1 drafts at random, version 2 drafts better."""
    registry = Registry(folder / "registry")
    drafters = {"random": random_drafter(1), "better": bigram_drafter(reference)}
    for name, tensors in drafters.items():
        publish(registry, make_drafter(folder / name, tensors), policy)
    return registry


def publish(registry: Registry, drafter: Path, policy: Path, parent: int | None = None) -> int:
    lineage = Lineage(policy_versions=[0], rollouts=0, tokens=0, optimizer_steps=0)
    manifest = registry.publish(
        drafter,
        kind="eagle3",
        target=TargetFingerprint.from_folder(policy),
        parent=parent,
        lineage=lineage,
        acceptance=None,
    )
    return manifest.version


@pytest.fixture(scope="session")
def spool(folder: Path) -> Path:
    return folder / "spool"


@pytest.fixture(scope="session")
def engine(policy: Path, start_drafter: Path, registry: Registry, spool: Path) -> Any:
    """Speculates with eagle3, k = 3, and has everything switched on."""
    settings = {"spool": str(spool), "registry": str(registry.root), "engine": "e0"}
    return make_engine(policy, start_drafter, settings)


@pytest.fixture(scope="session")
def plain_engine(policy: Path) -> Any:
    """Without speculation, and drafttrain not switched on."""
    return make_engine(policy, None, None)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield
