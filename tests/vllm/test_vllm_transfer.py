"""vLLM's own weight updates, with a drafter version named in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engines import generate, greedy, make_engine, prompts, status, worker_of
from test_vllm_swap import drafts, swap

from drafttrain.checkpoints.registry import Registry


@pytest.fixture(scope="module")
def updated(policy: Path, start_drafter: Path, registry: Registry) -> Any:
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.weight_transfer.base import WeightTransferEngine
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    class Behind(WeightTransferEngine[Any, Any]):
        """A job's own backend; notes what it is asked."""

        asked: list[Any] = []  # noqa: RUF012

        def init_transfer_engine(self, init_info: Any) -> None: ...
        def start_weight_update(self) -> None:
            self.asked.append(("start", self.model is self._default_model))

        def update_weights(self, update_info: dict[str, Any]) -> None:
            self.asked.append(update_info)

        def receive_weights(self, update_info: Any) -> None: ...
        def finish_weight_update(self) -> None:
            self.asked.append("finish")

        def shutdown(self) -> None: ...

    if "jobs-own" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("jobs-own", Behind)
    from drafttrain.integrations.vllm import transfer

    transfer.register()
    llm = make_engine(
        policy,
        start_drafter,
        {"registry": str(registry.root), "engine": "updated"},
        weight_transfer_config=WeightTransferConfig(backend="drafttrain+jobs-own"),
    )
    llm.behind = Behind.asked
    return llm


def draft_update(llm: Any, info: dict[str, Any]) -> None:
    llm.collective_rpc("start_draft_weight_update")
    llm.collective_rpc("update_weights", args=(info,))
    llm.collective_rpc("finish_weight_update")


def test_a_draft_update_may_name_a_version(updated: Any, plain_engine: Any) -> None:
    batch = prompts([9, 30], salt=90)
    expected = generate(plain_engine, batch, greedy(30))
    seen = []
    for version in (1, 2):
        draft_update(updated, {"drafter_version": version})
        assert status(updated).drafter_version == version
        seen.append(drafts(updated, 91))
        assert generate(updated, batch, greedy(30)) == expected
    assert seen[0] != seen[1]
    assert updated.behind == []
    swap(updated, 1)
    assert drafts(updated, 91) == seen[0]


def test_other_updates_reach_the_jobs_own_backend(updated: Any) -> None:
    updated.behind.clear()
    swap(updated, 2)
    before = status(updated).policy_version
    updated.collective_rpc("start_weight_update")
    updated.collective_rpc("update_weights", args=({"names": ["x"]},))
    updated.collective_rpc("finish_weight_update")
    assert updated.behind == [("start", True), {"names": ["x"]}, "finish"]
    assert status(updated).policy_version == before + 1
    assert status(updated).drafter_version == 2

    updated.behind.clear()
    draft_update(updated, {"names": ["y"]})
    assert updated.behind == [("start", False), {"names": ["y"]}, "finish"]
    assert status(updated).drafter_version is None  # it is no registry version any more
    assert status(updated).policy_version == before + 1


@pytest.mark.parametrize(
    ("info", "reason"),
    [
        ({"drafter_version": 999}, "does not exist"),
        ({"drafter_version": "1"}, "expected"),
        ({"drafter_version": 1, "names": []}, "expected"),
    ],
)
def test_a_version_that_is_refused_changes_nothing(
    updated: Any, info: dict[str, Any], reason: str
) -> None:
    swap(updated, 1)
    with pytest.raises(Exception, match=reason):
        draft_update(updated, info)
    assert status(updated).drafter_version == 1
    draft_update(updated, {"drafter_version": 2})  # the session that failed is over


def test_without_a_backend_behind_only_versions_are_taken(updated: Any) -> None:
    from drafttrain.errors import EngineError

    transfer = worker_of(updated).weight_transfer_engine
    behind, transfer._behind = transfer._behind, None
    try:
        draft_update(updated, {"drafter_version": 1})
        with pytest.raises(EngineError, match="name a backend"):
            updated.collective_rpc("start_weight_update")
    finally:
        transfer._behind = behind
