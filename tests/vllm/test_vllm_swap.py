"""A swap changes the drafter, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import publish
from engines import generate, greedy, make_engine, prompts, sampled, status, step_through, worker_of
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, VOCAB, bigram_drafter, make_drafter, random_drafter

from drafttrain.checkpoints.registry import Registry


def swap(llm: Any, version: int) -> dict[str, Any]:
    (reply,) = llm.collective_rpc("drafttrain_swap", args=(version,))
    return reply


def drafter_of(llm: Any) -> Any:
    return worker_of(llm).model_runner.get_draft_model()


def policy_weights(llm: Any) -> dict[str, torch.Tensor]:
    model = worker_of(llm).model_runner.get_model()
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def acceptance_of(llm: Any, version: int | None) -> tuple[int, int]:
    counts = {v.drafter_version: v for v in status(llm).acceptance_by_version}
    return (counts[version].rounds, counts[version].accepted) if version in counts else (0, 0)


def drafts(llm: Any, salt: int) -> list[list[int]]:
    """What the drafter proposes next, for the first steps of one request."""
    seen: list[list[int]] = []
    runner = worker_of(llm).model_runner
    step_through(
        llm,
        prompts([23], salt),
        greedy(6),
        lambda step: seen.append(torch.as_tensor(runner._draft_token_ids).tolist()),
    )
    return seen


@pytest.fixture(autouse=True)
def _leave_version_one(engine: Any, registry: Registry) -> Iterator[None]:
    yield
    assert "error" not in swap(engine, 1)


def test_swaps_under_load_keep_outputs_and_lose_no_request(engine: Any, plain_engine: Any) -> None:
    batch = prompts([5, 30, 61, 90, 14, 27], salt=20)
    expected = generate(plain_engine, batch, greedy(40))
    replies = []

    def swap_now_and_then(step: int) -> None:
        if step % 5 == 3:
            replies.append(swap(engine, 1 + len(replies) % 2))

    completions = step_through(engine, batch, greedy(40), swap_now_and_then)
    assert list(dict(sorted(completions.items())).values()) == expected
    assert len(replies) > 4
    assert [reply["version"] for reply in replies] == [1 + i % 2 for i in range(len(replies))]
    assert [reply["previous"] for reply in replies[1:]] == [r["version"] for r in replies[:-1]]


def test_a_better_drafter_is_better_at_once(engine: Any, registry: Registry) -> None:
    batch, lengths = prompts([10, 20, 30, 40, 50, 60, 70, 80], salt=21), {}
    for version in (1, 2):
        reply = swap(engine, version)
        assert reply["sha"] == registry.manifest(version).files["model.safetensors"]
        rounds, accepted = acceptance_of(engine, version)
        generate(engine, batch, greedy(30))
        more_rounds, more_accepted = acceptance_of(engine, version)
        lengths[version] = 1 + (more_accepted - accepted) / (more_rounds - rounds)
        now = status(engine)
        assert (now.drafter_version, now.drafter_sha) == (version, reply["sha"])
    assert lengths[2] > lengths[1] + 0.3


def test_a_swap_keeps_storage_and_leaves_the_policy_alone(engine: Any) -> None:
    before, policy_version = policy_weights(engine), status(engine).policy_version
    pointers = {name: p.data_ptr() for name, p in drafter_of(engine).named_parameters()}
    assert "error" not in swap(engine, 2)
    assert {name: p.data_ptr() for name, p in drafter_of(engine).named_parameters()} == pointers
    after = policy_weights(engine)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    policy = worker_of(engine).model_runner.get_model()
    assert drafter_of(engine).model.embed_tokens is policy.model.embed_tokens
    assert status(engine).policy_version == policy_version


def test_a_swap_takes_nothing_shared_off_its_device(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy's modules, and the rotary embedding that every model in this process uses."""
    drafter, policy = drafter_of(engine), worker_of(engine).model_runner.get_model()
    load, seen = drafter.load_weights, []

    def watched(weights: Any) -> Any:
        tensors = [*policy.parameters(), *policy.buffers()]
        seen.append(sum(tensor.is_meta for tensor in tensors))
        assert drafter.lm_head.weight.is_meta
        return load(weights)

    before = list(drafter.named_modules())
    monkeypatch.setattr(drafter, "load_weights", watched)
    assert "error" not in swap(engine, 2)
    assert seen == [0]
    assert dict(drafter.named_modules()) == dict(before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_swapped_in_drafter_drafts_as_one_loaded_at_the_start(
    policy: Path, registry: Registry, dtype: str
) -> None:
    settings = {"registry": str(registry.root), "engine": dtype}
    llm = make_engine(policy, registry.folder(2), settings, dtype=dtype)
    assert status(llm).drafter_version == 2
    expected = drafts(llm, 22)
    assert swap(llm, 1)["previous"] == 2
    assert drafts(llm, 22) != expected
    assert swap(llm, 2)["previous"] == 1
    assert drafts(llm, 22) == expected


@pytest.mark.parametrize("position", [0, 2, 7, 14])
def test_a_load_that_fails_half_way_restores_the_old_drafter(
    engine: Any, monkeypatch: pytest.MonkeyPatch, position: int
) -> None:
    assert "error" not in swap(engine, 2)
    expected, before = drafts(engine, 23), policy_weights(engine)
    model = drafter_of(engine)
    load = model.load_weights
    with monkeypatch.context() as patch:
        failed = []

        def fail_once(weights: Any) -> Any:
            if failed:
                return load(weights)
            failed.append(True)
            items = list(weights)
            load(items[:position])
            raise RuntimeError("the disk fell out")

        patch.setattr(model, "load_weights", fail_once, raising=False)
        reply = swap(engine, 1)
    assert reply["status"] == 409
    assert "the disk fell out; version 2 is restored" in reply["error"]
    assert status(engine).drafter_version == 2
    assert drafts(engine, 23) == expected
    after = policy_weights(engine)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_drafter_from_start_up_is_restored_too(
    policy: Path, start_drafter: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_engine(policy, start_drafter, {"registry": str(registry.root), "engine": "e2"})
    expected = drafts(llm, 24)
    model = drafter_of(llm)
    load, calls = model.load_weights, []

    def fail_once(weights: Any) -> Any:
        calls.append(True)
        loaded = load(weights)
        if len(calls) == 1:
            raise KeyError("late")
        return loaded

    with monkeypatch.context() as patch:
        patch.setattr(model, "load_weights", fail_once, raising=False)
        assert "is restored" in swap(llm, 2)["error"]
    assert status(llm).drafter_version is None
    assert drafts(llm, 24) == expected
    assert swap(llm, 2)["previous"] is None


def test_refusals_name_the_reason_and_change_nothing(
    engine: Any, policy: Path, registry: Registry, folder: Path, tmp_path: Path
) -> None:
    assert "error" not in swap(engine, 2)
    expected = drafts(engine, 25)
    own = Registry.open(registry.root)

    def published(name: str, tensors: dict[str, torch.Tensor], **config: Any) -> int:
        return publish(own, make_drafter(tmp_path / name, tensors, **config), policy)

    embedding = {"embed_tokens.weight": torch.ones(VOCAB, HIDDEN)}
    wide = random_drafter(3)
    for name in ("gate", "up"):
        wide[f"midlayer.mlp.{name}_proj.weight"] = torch.ones(128, HIDDEN)
    wide["midlayer.mlp.down_proj.weight"] = torch.ones(HIDDEN, 128)
    cases = {
        "shared with the policy": published("embedding", random_drafter(3) | embedding),
        "rope_theta": published("rope", random_drafter(3), rope_theta=123.0),
        "norm_before_residual": published("norm", random_drafter(3), norm_before_residual=True),
        "layer_ids": published(
            "layers", random_drafter(3), eagle_aux_hidden_state_layer_ids=[0, 2, 3],
            eagle_config={"eagle_aux_hidden_state_layer_ids": [0, 2, 3]},
        ),
        "gate_up_proj": published("wide", wide, intermediate_size=128),
        "does not exist": 999,
        "sha256": published("damaged", random_drafter(3)),
    }  # fmt: skip
    damaged = own.folder(cases["sha256"]) / "model.safetensors"
    tensors = load_file(damaged)
    tensors["norm.weight"][0] = 2.0
    save_file(tensors, damaged)
    for reason, version in cases.items():
        reply = swap(engine, version)
        assert reply["status"] == 422, reply
        assert reason in reply["error"]
    assert status(engine).drafter_version == 2
    assert drafts(engine, 25) == expected
    for version in cases.values():
        shutil.rmtree(own.root / own.name / f"v{version:06d}", ignore_errors=True)


def test_a_head_equal_to_the_policys_is_not_shared_with_it(
    policy: Path, reference: Any, registry: Registry, tmp_path: Path
) -> None:
    """vLLM would share it, and the first trained head could never be loaded."""
    tensors = random_drafter(5) | {"lm_head.weight": reference.lm_head.weight.detach().clone()}
    start = make_drafter(tmp_path / "start", tensors)
    llm = make_engine(policy, start, {"registry": str(registry.root), "engine": "e3"})
    before = policy_weights(llm)
    assert "error" not in swap(llm, 1)
    after = policy_weights(llm)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_reduced_draft_vocabulary_is_swapped_with_its_mapping(
    policy: Path, reference: Any, tmp_path: Path
) -> None:
    registry = Registry(tmp_path / "registry")
    bigram = bigram_drafter(reference)
    for name, step in (("even", 2), ("low", 1)):
        ids = torch.arange(64) * step
        tensors = bigram | {
            "lm_head.weight": bigram["lm_head.weight"][ids].clone(),
            "d2t": ids - torch.arange(64),
        }
        publish(registry, make_drafter(tmp_path / name, tensors, draft_vocab_size=64), policy)
    engines = [
        make_engine(policy, registry.folder(v), {"registry": str(registry.root)}) for v in (1, 2)
    ]
    assert drafts(engines[0], 27) != drafts(engines[1], 27)
    assert swap(engines[0], 2)["previous"] == 1
    assert drafts(engines[0], 27) == drafts(engines[1], 27)


def test_engines_that_cannot_swap_say_so(policy: Path, start_drafter: Path, tmp_path: Path) -> None:
    without_registry = make_engine(policy, start_drafter, {"spool": str(tmp_path)})
    assert "registry" in swap(without_registry, 1)["error"]
    assert generate(without_registry, prompts([4]), sampled(1.0, 4))


def test_a_version_is_read_while_the_engine_generates(engine: Any) -> None:
    def prepared() -> bool:
        return bool(engine.collective_rpc("drafttrain_prepare", args=(2,))[0]["ready"])

    ready: list[bool] = []
    step_through(engine, prompts([40], salt=26), greedy(40), lambda _: ready.append(prepared()))
    assert ready[-1]
    assert ready == sorted(ready)
    assert swap(engine, 2)["version"] == 2
    replies = (engine.collective_rpc("drafttrain_prepare", args=(999,))[0] for _ in count())
    refused = next(reply for reply in replies if reply.get("ready") is not False)
    assert refused["status"] == 422


def overwrite_drafter(llm: Any) -> None:
    """What a level-2 sleep leaves of the weights that are not preserved."""
    policys = {id(p) for p in worker_of(llm).model_runner.get_model().parameters()}
    for layer in drafter_of(llm).modules():
        for parameter in layer.parameters(recurse=False):
            if id(parameter) not in policys and parameter.is_floating_point():
                parameter.data.fill_(0.3)


def test_a_sleep_that_empties_the_memory_gets_the_drafter_back(
    engine: Any, policy: Path, tmp_path: Path
) -> None:
    """vLLM's CPU worker takes sleep and wake-up and does nothing: the loss is made by hand."""
    assert "error" not in swap(engine, 2)
    before = drafts(engine, 28)
    engine.collective_rpc("sleep", kwargs={"level": 2})
    overwrite_drafter(engine)
    engine.collective_rpc("reload_weights", kwargs={"weights_path": str(policy)})
    engine.collective_rpc("wake_up", kwargs={"tags": ["kv_cache"]})
    engine.collective_rpc("wake_up", kwargs={"tags": ["weights"]})
    assert drafts(engine, 28) == before
    assert status(engine).drafter_version == 2


def test_a_swap_during_a_sleep_is_loaded_on_waking(engine: Any) -> None:
    assert "error" not in swap(engine, 1)
    one = drafts(engine, 29)
    assert "error" not in swap(engine, 2)
    two = drafts(engine, 29)
    for level in (1, 2):
        engine.collective_rpc("sleep", kwargs={"level": level})
        weights = {name: p.clone() for name, p in drafter_of(engine).named_parameters()}
        assert swap(engine, 1)["version"] == 1
        assert all(torch.equal(weights[n], p) for n, p in drafter_of(engine).named_parameters())
        engine.collective_rpc("wake_up")
        assert drafts(engine, 29) == one
        assert swap(engine, 2)["previous"] == 1
        assert drafts(engine, 29) == two


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyError("a vLLM loader's")])
def test_a_drafter_that_cannot_come_back_is_said_and_not_raised(
    engine: Any, monkeypatch: pytest.MonkeyPatch, plain_engine: Any, error: Exception
) -> None:
    def fail(weights: Any) -> None:
        raise error

    swapper = worker_of(engine)._drafttrain._swapper
    batch = prompts([7, 19], salt=30)
    with monkeypatch.context() as patch:
        patch.setattr(swapper, "_load", fail)
        engine.collective_rpc("sleep", kwargs={"level": 2})
        overwrite_drafter(engine)
        engine.collective_rpc("wake_up")
    assert status(engine).drafter_version is None
    assert generate(engine, batch, greedy(20)) == generate(plain_engine, batch, greedy(20))
    assert swap(engine, 2)["previous"] is None
