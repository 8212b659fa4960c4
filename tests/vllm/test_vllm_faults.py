"""What goes wrong around an engine costs it nothing but what was lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from engines import Rollouts, generate, greedy, make_engine, prompts, status, step_through
from test_vllm_swap import drafts, swap

from drafttrain.checkpoints.registry import Registry
from drafttrain.integrations.vllm import swap as swap_module
from drafttrain.integrations.vllm.client import EngineClient
from drafttrain.integrations.vllm.local import EngineServer, serve_engine

# All 200 are for a quiet evening.
KILLS = int(os.environ.get("DRAFTTRAIN_KILLS", "3"))


@pytest.fixture
def server(engine: Any) -> Iterator[EngineServer]:
    with serve_engine(engine) as server:
        yield server


def test_a_registry_on_a_slow_disk_keeps_no_step_waiting(
    engine: Any, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = swap_module.verify

    def slowly(*given: Any) -> Any:
        time.sleep(1.5)
        return read(*given)

    assert "error" not in swap(engine, 1)
    monkeypatch.setattr(swap_module, "verify", slowly)
    took: list[float] = []
    ready: list[bool] = []

    def ask(step: int) -> None:
        started = time.perf_counter()
        ready.append(engine.collective_rpc("drafttrain_prepare", args=(2,))[0]["ready"])
        took.append(time.perf_counter() - started)

    step_through(engine, prompts([30], salt=110), greedy(60), ask)
    assert not ready[0]
    assert max(took) < 0.5
    assert status(engine).drafter_version == 1
    assert swap(engine, 2)["version"] == 2  # without asking again: waits until it is read
    assert "error" not in swap(engine, 1)


def test_requests_cut_off_on_the_way(server: EngineServer, engine: Any) -> None:
    client = EngineClient(server.url)
    client.swap(1)
    before = drafts(engine, 111)
    address = urlsplit(server.url)
    body = json.dumps({"version": 2}).encode()
    head = f"POST /drafttrain/drafter HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    whole = head.encode() + body
    for length in (1, 20, len(head), len(head) + 5):
        with socket.create_connection((address.hostname, address.port)) as connection:
            connection.sendall(whole[:length])
    time.sleep(0.2)
    assert client.drafter_version() == 1
    assert drafts(engine, 111) == before
    # Nobody waits for the answer: the swap is made all the same, or not at all.
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(whole)
    deadline = time.monotonic() + 10
    while client.drafter_version() != 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    client.swap(1)
    assert drafts(engine, 111) == before


def test_a_full_disk_costs_rollouts_and_no_request(
    policy: Path, start_drafter: Path, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a file system here")
    try:
        spool = disk / "spool"
        llm = make_engine(policy, start_drafter, {"spool": str(spool), "engine": "full"})
        new, batch = Rollouts(spool), prompts([60, 61, 62], salt=112)
        expected = generate(llm, batch, greedy(40))
        for _ in range(4):
            assert generate(llm, batch, greedy(40)) == expected
            counters = status(llm).tap
        assert counters.written + counters.dropped == 15
        assert counters.dropped > 0
        assert len(new.read()) == counters.written
        for path in new.reader.segment_paths():
            path.unlink()  # room again
        generate(llm, prompts([20], salt=113), greedy(8))
        assert status(llm).tap.written == counters.written + 1
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def benchmark(name: str, *arguments: object) -> dict[str, Any]:
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=3600)
    print(done.stderr[-10_000:])  # shown where a test fails
    assert done.returncode == 0
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.timeout(3600)
def test_kills_at_random_moments() -> None:
    result = benchmark("faults", "--kills", KILLS)
    assert result["kills"] == KILLS
    assert result["broken_versions"] == result["broken_segments"] == 0
    assert result["changed_outputs"] == result["lost_steps"] == 0
    assert result["converged"]


def test_damage_is_refused() -> None:
    result = benchmark("damage", "--cases", 64, "--seed", 1)
    assert (result["cases"], result["refused"]) == (64, 64)
    assert result["crashed"] == result["accepted_by_mistake"] == 0
    assert result["memory_grown_mib"] < 1000
