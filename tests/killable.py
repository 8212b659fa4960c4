"""Real processes that write to a registry or a spool, and are killed at a moment of our choice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

# Importing takes seconds, so it is done once; every worker is a fork of a process that has.
_SERVE = """
import json, os, sys, traceback

alive = set()

def start(*arguments):
    pid = os.fork()
    if pid:
        alive.add(pid)
        return pid
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def wait(pid):
    alive.discard(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def kill(pid):
    os.kill(pid, 9)
    return wait(pid)

for line in sys.stdin:
    name, *arguments = json.loads(line)
    print(json.dumps({"start": start, "wait": wait, "kill": kill}[name](*arguments)), flush=True)
for pid in alive:
    os.kill(pid, 9)
"""


class Workers:
    """Starts, awaits and kills processes that run the function ``work`` of `script`."""

    def __init__(self, script: str) -> None:
        self._server = subprocess.Popen(
            [sys.executable, "-c", script + _SERVE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
                "OMP_NUM_THREADS": "1",
            },
        )

    def start(self, *arguments: str | int) -> int:
        """Begin ``work(*arguments)`` in a process of its own; returns its id."""
        return self._ask("start", *arguments)

    def wait(self, pid: int) -> int:
        """The exit status, once it has ended."""
        return self._ask("wait", pid)

    def kill(self, pid: int) -> int:
        """SIGKILL; returns the exit status when it is gone."""
        return self._ask("kill", pid)

    def _ask(self, *request: Any) -> int:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.communicate()
