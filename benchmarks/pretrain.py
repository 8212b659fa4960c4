"""Offline training against the pipeline of a peer, on the same rollouts and policy.

    python -m benchmarks.pretrain --json                 # a policy is trained first (2 minutes)
    python -m benchmarks.pretrain --peer specforge --steps 375 --json
    python -m benchmarks.pretrain --policy DIR --rollouts 1000 --json

Both start from saved token ids and end with a checkpoint that vLLM loads; wall time and peak disk
are of all that lies between. Acceptance length is counted by a vLLM engine on prompts that neither
has seen, at temperature 1 with probabilistic drafts. ``wall_ratio`` and ``disk_ratio`` are the
peer's over ours: the claim holds when ours accepts at least as much. ``tokens`` and
``peer_tokens`` are what each trained on, repetitions counted. With ``--saturation`` the other
figure is taken: how near a run comes to one of ten times its steps.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafttrain.demo import ENVIRONMENT

os.environ.update(ENVIRONMENT)  # before torch and vLLM are imported

from drafttrain.demo.forward import fast_precision

K = 3
# Prompts that the drafters are measured on.
PROMPTS = 256
# As the demo trains, in many small steps; or with all defaults.
RECIPES = {
    "demo": (
        "--tokens-per-step", "1024", "--learning-rate", "6e-3",
        "--set", f"training.precision={fast_precision()}",
    ),
    "default": (),
}  # fmt: skip


@dataclass
class Cost:
    """What a pipeline took.

    Attributes:
        seconds: of wall time.
        disk_bytes: at most in its folder at any time.
    """

    seconds: float = 0.0
    disk_bytes: int = 0


@contextmanager
def measured(folder: Path) -> Iterator[Cost]:
    """Time the body, and watch the size of the folder it works in."""
    cost, done = Cost(), threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            cost.disk_bytes = max(cost.disk_bytes, _size(folder))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = time.perf_counter() - start
        done.set()
        watcher.join()
        cost.disk_bytes = max(cost.disk_bytes, _size(folder))


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.lstat().st_blocks * 512
        except FileNotFoundError:
            continue
    return total


def drafttrain(*arguments: object) -> str:
    """Run our command; returns what it printed."""
    command = [sys.executable, "-m", "drafttrain", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def ours(
    policy: Path, rollouts: Path, folder: Path, steps: int, recipe: str
) -> tuple[Cost, dict[str, Any]]:
    """Saved rollouts to a registry version."""
    folder.mkdir()
    with measured(folder) as cost:
        drafttrain("init", "--target", policy, "--out", folder / "start")
        printed = drafttrain(
            "pretrain", "--target", policy, "--rollouts", rollouts, "--json",
            "--drafter", folder / "start", "--registry", folder / "registry",
            "--out", folder / "run", "--steps", steps, "--k", K, *RECIPES[recipe],
        )  # fmt: skip
    summary: dict[str, Any] = json.loads(printed)
    return cost, summary


def peer(
    name: str, policy: Path, rollouts: Path, folder: Path, epochs: int, learning_rate: float
) -> tuple[Cost, Path, int]:
    """Saved rollouts to a peer's checkpoint; and how many tokens it trained on."""
    from benchmarks import specforge_pipeline, speculators_pipeline
    from drafttrain.drafters.eagle3_config import default_layer_ids
    from drafttrain.drafters.policy import PolicyShape
    from drafttrain.opening import Inputs, read_inputs

    folder.mkdir()
    layer_ids = default_layer_ids(PolicyShape.from_folder(policy).num_layers)
    with measured(folder) as cost:
        saved = read_inputs(Inputs(policy, [rollouts])).rollouts
        out = folder / "out"
        if name == "specforge":
            best = specforge_pipeline.train(
                policy, saved, layer_ids, out, epochs=epochs, learning_rate=learning_rate
            )
        else:
            data = folder / "data"
            speculators_pipeline.dump_features(policy, saved, layer_ids, data)
            best = speculators_pipeline.train(
                policy, layer_ids, data, out, k=K, epochs=epochs, learning_rate=learning_rate
            )
    return cost, best, epochs * sum(rollout.length for rollout in saved)


def acceptance_length(policy: Path, drafter: Path) -> float:
    """As a vLLM engine counts it, on unseen prompts."""
    from drafttrain.demo.arms import Arm
    from drafttrain.demo.saved import MAX_TOKENS
    from drafttrain.demo.task import Task

    task, rng = Task(), random.Random("unseen")
    prompts = [task.sample_problem(rng).prompt_ids for _ in range(PROMPTS)]
    speculation = {
        "method": "eagle3",
        "model": str(drafter.resolve()),
        "num_speculative_tokens": K,
        "draft_sample_method": "probabilistic",
    }
    arm = Arm("measure", policy, speculation=speculation, batch=16, max_model_len=256)
    return arm.rollout(prompts, MAX_TOKENS, task.eos_id).acceptance_length


def against_peer(policy: Path, rollouts: Path, work: Path, options: Any) -> dict[str, Any]:
    peer_cost, peer_drafter, peer_tokens = peer(
        options.peer,
        policy,
        rollouts,
        work / "peer",
        options.peer_epochs,
        options.peer_learning_rate,
    )
    cost, summary = ours(policy, rollouts, work / "ours", options.steps, options.recipe)
    drafter = work / "ours/registry/drafter/latest"
    manifest = json.loads((drafter / "manifest.json").read_text())
    return {
        "wall_ratio": peer_cost.seconds / cost.seconds,
        "disk_ratio": peer_cost.disk_bytes / cost.disk_bytes,
        "acceptance_length": acceptance_length(policy, drafter),
        "peer_acceptance_length": acceptance_length(policy, peer_drafter),
        "estimate": summary["acceptance_length"],
        "waited": summary["waited"],
        "seconds": cost.seconds,
        "peer_seconds": peer_cost.seconds,
        "tokens": manifest["lineage"]["tokens"],
        "peer_tokens": peer_tokens,
        "disk_bytes": cost.disk_bytes,
        "peer_disk_bytes": peer_cost.disk_bytes,
    }


def saturation(policy: Path, rollouts: Path, work: Path, options: Any) -> dict[str, Any]:
    cost, summary = ours(policy, rollouts, work / "short", options.steps, options.recipe)
    ours(policy, rollouts, work / "long", 10 * options.steps, options.recipe)
    short, long = (
        acceptance_length(policy, work / name / "registry/drafter/latest")
        for name in ("short", "long")
    )
    return {
        "acceptance_length": short,
        "long_acceptance_length": long,
        "share": short / long,
        "seconds": cost.seconds,
        "waited": summary["waited"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--policy", type=Path, help="a policy of the demo; trained when absent")
    parser.add_argument("--rollouts", type=int, default=2000, help="saved rollouts")
    parser.add_argument("--steps", type=int, default=120, help="our optimizer steps")
    parser.add_argument("--peer", choices=("speculators", "specforge"), default="speculators")
    parser.add_argument("--recipe", choices=RECIPES, default="demo", help="ours")
    parser.add_argument("--peer-epochs", type=int, default=3)
    parser.add_argument("--peer-learning-rate", type=float, default=1e-3)
    parser.add_argument("--saturation", action="store_true", help="against ten times the steps")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="drafttrain-"))
    try:
        from benchmarks.subjects import demo_policy
        from drafttrain.demo.saved import save_rollouts

        policy = options.policy or demo_policy(work)
        save_rollouts(policy, work / "rollouts.jsonl", options.rollouts)
        run = saturation if options.saturation else against_peer
        result = run(policy, work / "rollouts.jsonl", work, options)
    finally:
        shutil.rmtree(work)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:24} {value:.3f}")


if __name__ == "__main__":
    main()
