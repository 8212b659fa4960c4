"""The processes that :mod:`benchmarks.faults` kills."""

from __future__ import annotations

import ast
import logging
import time
from collections.abc import Callable
from pathlib import Path

import vllm  # noqa: F401

import benchmarks.live_engine  # noqa: F401  sets vLLM's environment before it is imported
import drafttrain.sidecar  # noqa: F401  imported once, before the forks
from drafttrain.checkpoints.registry import Registry
from drafttrain.config import load_config
from drafttrain.integrations.vllm.client import EngineClient
from drafttrain.integrations.vllm.local import serve_engine
from drafttrain.publishing import UNTRAINED
from drafttrain.sidecar import Sidecar, run_until_signal
from tests.vllm.engines import generate, greedy, make_engine, prompts, sampled


def work(part: str, *given: str | int) -> None:
    parts: dict[str, Callable[..., None]] = {
        "engine": _engine, "sidecar": _sidecar, "publisher": _publisher,
    }  # fmt: skip
    parts[part](*given)


def _engine(policy: str, registry: str, spool: str, port: int, outputs: str, expected: str) -> None:
    """Generates until it is killed: rollouts, and outputs that are held against the right ones."""
    llm = make_engine(
        Path(policy),
        Path(registry) / "drafter" / "latest",
        {"spool": spool, "registry": registry, "engine": "faults"},
        speculative_config={"draft_sample_method": "probabilistic"},
    )
    wanted, checked = ast.literal_eval(expected), prompts([7, 15], salt=300)
    with serve_engine(llm, port=port), Path(outputs).open("a") as file:
        for salt in range(10**9):
            same = generate(llm, checked, greedy(24)) == wanted
            file.write("same\n" if same else "changed\n")
            file.flush()
            generate(llm, prompts([8 + i for i in range(8)], salt % 50), sampled(1.0, 32))


def _sidecar(config: str) -> None:
    logging.getLogger("drafttrain").setLevel(logging.ERROR)
    loaded = load_config(Path(config))
    engines = [EngineClient(url, timeout=20) for url in loaded.engines]
    run_until_signal(Sidecar(loaded, engines))


def _publisher(root: str) -> None:
    """Publishes the newest version again and again, as somebody would by hand."""
    registry = Registry.open(root)
    while True:
        newest = registry.versions()[-1]
        manifest = registry.manifest(newest)
        registry.publish(
            registry.folder(newest), kind=manifest.kind, target=manifest.target, parent=newest,
            lineage=UNTRAINED, acceptance=None,
        )  # fmt: skip
        registry.prune(60)
        time.sleep(0.3)
