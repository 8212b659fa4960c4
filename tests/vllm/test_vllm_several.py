"""Several engines, moved by the command that people use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import publish
from engines import generate, greedy, make_engine, prompts, status
from tiny_models import bigram_drafter, make_drafter, random_drafter

from drafttrain.checkpoints.registry import Registry
from drafttrain.integrations.vllm.local import EngineServer, serve_engine

TOKEN = "known-to-both"


@pytest.fixture(scope="module")
def own_registry(folder: Path, policy: Path, reference: Any) -> Registry:
    """Two versions, the second made from the first."""
    registry = Registry(folder / "several")
    publish(registry, make_drafter(folder / "several-1", random_drafter(21)), policy)
    better = make_drafter(folder / "several-2", bigram_drafter(reference))
    publish(registry, better, policy, parent=1)
    return registry


@pytest.fixture(scope="module")
def llms(policy: Path, own_registry: Registry, folder: Path) -> list[Any]:
    token = folder / "several-token"
    token.write_text(TOKEN)
    settings = {"registry": str(own_registry.root), "token_file": str(token)}
    return [
        make_engine(policy, own_registry.folder(1), settings | {"engine": name})
        for name in ("left", "right")
    ]


@pytest.fixture
def servers(llms: list[Any]) -> Iterator[list[EngineServer]]:
    with serve_engine(llms[0]) as left, serve_engine(llms[1]) as right:
        yield [left, right]


def drafttrain(command: str, servers: list[EngineServer], *more: object, status: int = 0) -> Any:
    engines = [argument for server in servers for argument in ("--engine", server.url)]
    done = subprocess.run(
        [sys.executable, "-m", "drafttrain", command, *engines, *map(str, more)],
        capture_output=True, text=True, timeout=60, env=os.environ | {"DRAFTTRAIN_TOKEN": TOKEN},
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    assert len(done.stderr.splitlines()) == (status != 0)
    return done


def test_swap_and_roll_back(
    servers: list[EngineServer], llms: list[Any], own_registry: Registry, plain_engine: Any
) -> None:
    registry = ("--registry", own_registry.root)
    batch = prompts([11, 25], salt=75)
    expected = generate(plain_engine, batch, greedy(20))
    done = drafttrain("swap", servers, *registry, "--version", 2, "--canary", "--json")
    swapped = json.loads(done.stdout)
    assert swapped["version"] == 2
    assert [engine["previous"] for engine in swapped["engines"]] == [1, 1]
    assert own_registry.latest() == 2
    assert [generate(llm, batch, greedy(20)) for llm in llms] == [expected] * 2

    drafttrain("rollback", servers, *registry)
    assert [status(llm).drafter_version for llm in llms] == [1, 1]
    assert own_registry.latest() == 1
    assert "parent" in drafttrain("rollback", servers, *registry, status=2).stderr


def test_what_one_engine_missed_is_finished_by_the_same_command(
    servers: list[EngineServer], llms: list[Any], own_registry: Registry
) -> None:
    registry = ("--registry", own_registry.root)
    left, right = servers
    host, port = right._server.server_address[:2]
    right.close()
    failed = drafttrain("swap", servers, *registry, "--version", 2, status=1)
    assert right.url in failed.stderr
    assert [status(llm).drafter_version for llm in llms] == [2, 1]
    assert own_registry.latest() == 2
    with serve_engine(llms[1], str(host), int(port)) as back:
        said = drafttrain("swap", [left, back], *registry).stdout.splitlines()
        assert "as before" in said[0]
        assert "before: 1" in said[1]
        assert [status(llm).drafter_version for llm in llms] == [2, 2]
        drafttrain("rollback", [left, back], *registry)


def test_a_canary_that_refuses_spares_the_others(
    servers: list[EngineServer], llms: list[Any], own_registry: Registry, policy: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    unfit = make_drafter(tmp_path / "unfit", random_drafter(3), rope_theta=7.0)
    version = publish(own_registry, unfit, policy)
    own_registry.set_latest(1)
    registry = ("--registry", own_registry.root)
    refused = drafttrain("swap", servers, *registry, "--version", version, "--canary", status=1)
    assert "rope" in refused.stderr
    assert "left as it is" in refused.stderr
    assert [status(llm).drafter_version for llm in llms] == [1, 1]
    assert own_registry.latest() == 1


def test_status_shows_versions_and_positions(servers: list[EngineServer], llms: list[Any]) -> None:
    generate(llms[0], prompts([11, 25], salt=76), greedy(20))
    status(llms[0])
    both = json.loads(drafttrain("status", servers, "--json").stdout)
    assert [engine["engine"] for engine in both] == ["left", "right"]
    versions = both[0]["acceptance_by_version"]
    assert {version["drafter_version"] for version in versions} >= {1}
    assert all(len(v["accepted_per_position"]) == 3 for v in versions if v["rounds"])
    table = drafttrain("status", servers).stdout
    assert "left" in table
    assert "1 *" in table
