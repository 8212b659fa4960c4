"""Two tensor-parallel ranks, each a process: they swap together, or neither does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import Rollouts, generate, greedy, make_engine, prompts
from test_vllm_tap import assert_rows_are_the_policys

from drafttrain.checkpoints.registry import Registry


@pytest.fixture(scope="module")
def ranks(policy: Path, registry: Registry, folder: Path) -> Any:
    return make_engine(
        policy,
        registry.folder(1),
        {"registry": str(registry.root), "spool": str(folder / "tp-spool"), "engine": "tp"},
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
        enable_prefix_caching=False,
    )


def swap(llm: Any, version: int) -> list[dict[str, Any]]:
    replies: list[dict[str, Any]] = llm.collective_rpc("drafttrain_swap", args=(version,))
    return replies


def versions(llm: Any) -> list[int]:
    return [reply["drafter_version"] for reply in llm.collective_rpc("drafttrain_status")]


def accepted(llm: Any) -> tuple[int, int]:
    """Of a greedy batch: rounds, and drafts accepted in them; always the same for one drafter."""

    def counts() -> tuple[int, int]:
        assert all(llm.collective_rpc("drafttrain_flush"))
        acceptance = llm.collective_rpc("drafttrain_status")[0]["acceptance"]
        return acceptance["rounds"], sum(acceptance["accepted_per_position"])

    before = counts()
    generate(llm, prompts(range(5, 41, 3), salt=95), greedy(30))
    after = counts()
    return after[0] - before[0], after[1] - before[1]


def break_rank_one(worker: Any, where: str) -> None:
    """Runs in every rank: the next swap fails in the second, while it is checked or loaded."""
    from drafttrain.errors import CheckpointError

    if worker.rank != 1:
        return
    swapper = worker._drafttrain._swapper
    original = getattr(swapper, where)

    def fail_once(*given: Any) -> Any:
        setattr(swapper, where, original)
        raise CheckpointError("here", "norm.weight", "only rank one sees this")

    setattr(swapper, where, fail_once)


def test_ranks_swap_together(ranks: Any, engine: Any, plain_engine: Any) -> None:
    batch = prompts([5, 33, 60], salt=96)
    expected = generate(plain_engine, batch, greedy(40))
    counts = {}
    for version in (1, 2, 1, 2):
        replies = swap(ranks, version)
        assert [reply["version"] for reply in replies] == [version] * 2
        assert replies[0]["sha"] == replies[1]["sha"]
        assert generate(ranks, batch, greedy(40)) == expected
        swap(engine, version)
        counts[version] = accepted(ranks)
        assert counts[version] == accepted(engine)  # one process accepts exactly the same
    assert counts[2][1] / counts[2][0] > counts[1][1] / counts[1][0] + 0.3


@pytest.mark.parametrize(
    ("where", "reason"), [("_read_by_now", "another"), ("_load", "is restored")]
)
def test_one_rank_that_cannot_keeps_the_other_from_it(ranks: Any, where: str, reason: str) -> None:
    swap(ranks, 2)
    before = accepted(ranks)
    ranks.collective_rpc(break_rank_one, args=(where,))
    first, second = swap(ranks, 1)
    assert reason in first["error"]
    assert "only rank one sees this" in second["error"]
    assert versions(ranks) == [2, 2]
    assert accepted(ranks) == before
    assert [reply["version"] for reply in swap(ranks, 1)] == [1, 1]


def test_the_first_rank_alone_captures(ranks: Any, reference: Any, folder: Path) -> None:
    spool = folder / "tp-spool"
    new = Rollouts(spool)
    generate(ranks, prompts([20, 70], salt=97), greedy(12))
    rollouts = new.wait_for(2)
    assert_rows_are_the_policys(rollouts, reference)
    head = new.reader.read_head(0)
    assert head.lm_head.shape == reference.lm_head.weight.shape
