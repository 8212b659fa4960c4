"""Who runs where: engines and RL job on one half of the cores, the sidecar on the other."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from torch import set_num_threads

from drafttrain.errors import DrafttrainError

CORES = sorted(os.sched_getaffinity(0))
ENGINE_CORES = CORES[: (len(CORES) + 1) // 2]
SIDECAR_CORES = CORES[len(ENGINE_CORES) :] or CORES


def use_cores(cores: list[int]) -> None:
    """Keep this process, torch's threads included, on `cores`."""
    os.sched_setaffinity(0, cores)
    # The function as torch has it: vLLM's CPU worker puts one that does nothing in its place, and
    # two threads on one core wait for each other at every operation.
    set_num_threads(len(cores))


@contextmanager
def sidecar_process(path: Path, config: dict[str, Any]) -> Iterator[None]:
    """The sidecar as a user runs it, on its own cores; stopped with SIGTERM at the end.

    Raises:
        DrafttrainError: it ended before.
    """
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "drafttrain", "sidecar", str(path)]
    with path.with_suffix(".log").open("w") as log:
        process = subprocess.Popen(command, stderr=log)
    os.sched_setaffinity(process.pid, SIDECAR_CORES)
    try:
        yield
        if process.poll() is not None:
            raise DrafttrainError(f"the sidecar ended early; see {path.with_suffix('.log')}")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()
