"""kill -9 at random moments: of the engine, the sidecar, and somebody who publishes by hand.

The whole loop runs on one spool and one registry, each part a process: a vLLM engine that starts
with ``latest``, writes rollouts and is swapped while it generates; a sidecar that trains on them
and publishes; a publisher. Again and again one of them is killed, at a random moment after its
start, and started again. After every kill the registry and the spool are read whole.

broken_versions, broken_segments
    versions that do not verify, or a pointer to none; segments and heads that cannot be read.
changed_outputs
    greedy outputs of the engine, checked all the time, that are not those of one that was left in
    peace and had no drafter.
lost_steps
    starts of the sidecar with fewer optimizer steps behind it than an earlier one.
converged
    whether in the end the engine came to serve the registry's latest version.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from benchmarks.live_engine import Bench, bench, parser, print_result, say
from drafttrain.checkpoints.verify import verify
from drafttrain.errors import CheckpointError, EngineError, RolloutError
from drafttrain.integrations.vllm.client import EngineClient
from drafttrain.rollouts.spool import SpoolReader
from drafttrain.telemetry import EventLog
from tests.killable import Workers
from tests.vllm.engines import generate, greedy, make_engine, prompts
from tests.vllm.servers import free_port

# What each process does, in a fork of one that has imported everything.
_WORK = """
from benchmarks.faults_parts import work
"""

# How long after its start a part may be killed: loading included, and some seconds of work.
LIFE_SECONDS = {"engine": 14.0, "sidecar": 6.0, "publisher": 1.5}
CHECKED = prompts([7, 15], salt=300)


class Loop:
    """The three parts, and what is checked of them."""

    def __init__(self, of: Bench, workers: Workers, expected: list[list[int]]) -> None:
        self.of, self.workers = of, workers
        self.port = free_port()
        self.outputs = of.folder / "outputs.jsonl"
        self.running: dict[str, int] = {}
        self.seen: set[int] = set()
        self.found: Counter[str] = Counter()
        config = self._sidecar_config()
        self.given: dict[str, list[str | int]] = {
            "engine": [str(of.policy), str(of.registry.root), str(of.folder / "spool"),
                       self.port, str(self.outputs), str(expected)],
            "sidecar": [str(config)],
            "publisher": [str(of.registry.root)],
        }  # fmt: skip
        self.events = EventLog(of.folder / "state" / "events.jsonl")

    def start(self, part: str) -> None:
        self.running[part] = self.workers.start(part, *self.given[part])

    def kill(self, part: str) -> None:
        self.workers.kill(self.running.pop(part))

    def check_files(self) -> None:
        """Every version and every segment there is, whole."""
        registry = self.of.registry
        latest, versions = registry.latest(), registry.versions()  # in this order: it only grows
        try:
            for version in set(versions) - self.seen:
                verify(registry.folder(version))
                self.seen.add(version)
            if latest not in versions:
                raise CheckpointError(registry.root, "latest", "points to no version")
        except CheckpointError as error:
            if registry.versions()[:1] == versions[:1]:  # not pruned meanwhile
                self._note("broken_versions", error)
        reader = SpoolReader(self.of.folder / "spool")
        for path in reader.segment_paths():
            try:
                reader.read(path)
            except RolloutError as error:
                if path.exists():  # the sidecar forgets old ones
                    self._note("broken_segments", error)
        for version_of_policy in reader.heads():
            reader.read_head(version_of_policy)

    def _note(self, what: str, error: Exception) -> None:
        say(f"{what}: {error}")
        self.found[what] += 1

    def converges(self, seconds: float = 90.0) -> bool:
        """With the publisher still, the engine comes to serve what the registry says."""
        client, deadline = EngineClient(f"http://127.0.0.1:{self.port}"), time.monotonic() + seconds
        while time.monotonic() < deadline:
            latest, served = self.of.registry.latest(), _served(client)
            if served == latest:
                return True
            time.sleep(0.5)
        say(f"not converged: latest is {latest}, the engine {served}")
        say(f"the sidecar's last events: {list(self.events.read())[-5:]}")
        return False

    def _sidecar_config(self) -> Path:
        folder = self.of.folder
        config = {
            "target": str(self.of.policy),
            "spool": str(folder / "spool"),
            "registry": str(self.of.registry.root),
            "state": str(folder / "state"),
            "engines": [f"http://127.0.0.1:{self.port}"],
            "threads": 1,
            "training": {"draft_tokens": 3, "tokens_per_step": 512},
            "replay": {"min_rollouts": 8, "max_bytes": 64 << 20},
            "gate": {"steps_between": 5, "margin": 0.0},
            "keep_versions": 60,
        }
        path = folder / "sidecar.yaml"
        path.write_text(yaml.safe_dump(config))
        return path


def _served(client: EngineClient) -> int | str | None:
    try:
        return client.drafter_version()
    except EngineError as error:
        return str(error)


def run(kills: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    with bench(versions=2) as of:
        plain = make_engine(of.policy, None, None)
        expected = generate(plain, CHECKED, greedy(24))
        with Workers(_WORK) as workers:
            loop = Loop(of, workers, expected)
            for part in LIFE_SECONDS:
                loop.start(part)
            victims: Counter[str] = Counter()
            for index in range(kills):
                part = list(LIFE_SECONDS)[index % len(LIFE_SECONDS)]
                time.sleep(rng.uniform(0, LIFE_SECONDS[part]))
                loop.kill(part)
                loop.check_files()
                loop.start(part)
                victims[part] += 1
                if (index + 1) % 20 == 0:
                    say(f"{index + 1} kills")
            loop.kill("publisher")
            converged = loop.converges()
            for part in list(loop.running):
                loop.kill(part)
            loop.check_files()
        return _result(loop, victims, converged)


def _result(loop: Loop, victims: Counter[str], converged: bool) -> dict[str, Any]:
    checked = loop.outputs.read_text().split() if loop.outputs.exists() else []
    events = list(loop.events.read())
    steps = [event["step"] for event in events if event["event"] == "started"]
    lost = sum(later < earlier for earlier, later in itertools.pairwise(steps))
    kinds = Counter(str(event["event"]) for event in events)
    return {
        "kills": victims.total(),
        "broken_versions": loop.found["broken_versions"],
        "broken_segments": loop.found["broken_segments"],
        "changed_outputs": checked.count("changed"),
        "lost_steps": lost,
        "converged": converged,
        "victims": dict(victims),
        "outputs_checked": len(checked),
        "optimizer_steps": max(steps, default=0),
        "published_by_sidecar": kinds["published"],
        "swaps": kinds["swapped"],
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--kills", type=int, default=200)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    print_result(run(options.kills, options.seed), options.json)


if __name__ == "__main__":
    main()
