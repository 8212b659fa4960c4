"""Every captured row is what the policy computes on that prefix, whatever the engine does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines import (
    Rollouts,
    generate,
    greedy,
    make_engine,
    prompts,
    sampled,
    status,
    step_through,
    worker_of,
)
from tiny_models import LAYER_IDS, load_policy, make_granite, make_policy

from drafttrain.errors import EngineError
from drafttrain.rollouts.record import Rollout, prompt_group
from drafttrain.rollouts.spool import SpoolReader


def assert_rows_are_the_policys(rollouts: list[Rollout], reference: Any) -> None:
    assert rollouts
    for rollout in rollouts:
        tokens = rollout.tokens.long()
        states = reference(tokens[None], output_hidden_states=True).hidden_states
        rows = rollout.captured
        assert rows.any()
        assert_close(rollout.last_hidden[rows], states[-1][0][rows])
        assert rollout.aux_hidden is not None
        for index, layer in enumerate(LAYER_IDS):
            assert_close(rollout.aux_hidden[rows][:, index], states[layer][0][rows])


def assert_mostly_captured(rollout: Rollout) -> None:
    """Only the prefix cache (whole blocks of 32) and the last token leave rows out."""
    completion = rollout.captured[rollout.prompt_length : -1]
    assert completion.all()


def assert_rejections_explain_the_rounds(rollout: Rollout, k: int) -> None:
    """A round ends at a rejected draft, or after k accepted ones and one token more."""
    assert rollout.rejected is not None
    assert not rollout.rejected[: rollout.prompt_length + 1].any()
    rounds = since = 0
    for rejected in rollout.rejected[rollout.prompt_length + 1 :].tolist():
        since += 1
        if rejected or since == k + 1:
            rounds, since = rounds + 1, 0
    assert rollout.rounds == rounds + (since > 0)  # the last one may be cut off by the length


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def tokens_of(rollouts: list[Rollout]) -> list[list[int]]:
    return sorted(rollout.tokens.tolist() for rollout in rollouts)


def test_rows_tokens_and_counts_match_under_speculation(
    engine: Any, reference: Any, spool: Path
) -> None:
    batch = prompts([3, 17, 40, 90, 150, 33, 64, 128, 245], salt=1)  # the last meets the limit
    now = status(engine)
    drafter_version, before = now.drafter_version, now.acceptance
    new = Rollouts(spool)
    completions = generate(engine, batch, sampled(0.8, 30, n=2))
    rollouts = new.wait_for(18)  # nobody asked for them: the engine just went idle

    pairs = [(p, c) for p, c in zip([p for p in batch for _ in range(2)], completions, strict=True)]
    assert tokens_of(rollouts) == sorted(p + c for p, c in pairs)
    assert_rows_are_the_policys(rollouts, reference)
    assert {r.group for r in rollouts} == {prompt_group(prompt) for prompt in batch}
    for rollout in rollouts:
        assert rollout.prompt_length in map(len, batch)
        assert rollout.finish_reason == "length"
        assert rollout.temperature == pytest.approx(0.8)
        assert rollout.drafter_version == drafter_version
        assert rollout.rounds <= rollout.drafted <= 3 * rollout.rounds
        assert_mostly_captured(rollout)
        if rollout.length < 256:  # close to the limit there are no drafts
            # A round yields its accepted drafts and one token; the prefill yielded the first.
            assert rollout.completion_length - 1 <= rollout.rounds + rollout.accepted
            assert_rejections_explain_the_rounds(rollout, k=3)
    assert any(bool(rollout.rejected.any()) for rollout in rollouts)

    after = status(engine)
    assert after.tap.damaged == after.tap.dropped == after.tap.running == 0
    assert after.acceptance.rounds - before.rounds == sum(r.rounds for r in rollouts)
    assert after.acceptance.accepted - before.accepted == sum(r.accepted for r in rollouts)


def test_prefix_cache_hits_stay_missing(engine: Any, reference: Any, spool: Path) -> None:
    shared = prompts([100], salt=2)[0]
    generate(engine, [shared], greedy(2))
    assert all(engine.collective_rpc("drafttrain_flush"))
    new = Rollouts(spool)
    generate(engine, [[*shared, 5, 6, 7]], greedy(8))
    (rollout,) = new.wait_for(1)
    hits = 64  # three whole blocks; eagle has the last one computed again
    assert not rollout.captured[:hits].any()
    assert rollout.captured[hits:-1].all()
    assert_rows_are_the_policys([rollout], reference)


def test_a_stop_token_ends_the_rollout_where_the_output_ends(
    engine: Any, reference: Any, spool: Path
) -> None:
    batch = prompts([12, 20, 41], salt=3)
    full = generate(engine, batch, greedy(20, ignore_eos=True))
    assert all(engine.collective_rpc("drafttrain_flush"))
    new = Rollouts(spool)
    stops = [completion[7] for completion in full]
    completions = generate(engine, batch, greedy(20, stop_token_ids=stops, min_tokens=2))
    rollouts = new.wait_for(3)
    assert tokens_of(rollouts) == sorted(p + c for p, c in zip(batch, completions, strict=True))
    assert {rollout.finish_reason for rollout in rollouts} <= {"stop", "length"}
    assert "stop" in {rollout.finish_reason for rollout in rollouts}
    assert_rows_are_the_policys(rollouts, reference)


def test_preempted_and_aborted_requests(engine: Any, reference: Any, spool: Path) -> None:
    batch, new = prompts([20, 50, 70, 33], salt=4), Rollouts(spool)
    core = engine.llm_engine

    def disturb(step: int) -> None:
        if step in (4, 9):  # all running requests start over, from their tokens so far
            assert core.reset_prefix_cache(reset_running_requests=True)
        if step == 6:
            unfinished = list(core.output_processor.request_states)
            core.abort_request(unfinished[:1], internal=True)

    completions = step_through(engine, batch, greedy(30), disturb)
    assert len(completions) == 3
    generate(engine, [[9, 9, 9]], greedy(2))
    rollouts = new.wait_for(5)
    by_reason: dict[str | None, list[Rollout]] = {}
    for rollout in rollouts:
        by_reason.setdefault(rollout.finish_reason, []).append(rollout)
    assert len(by_reason["abort"]) == 1
    completed = {tuple(r.tokens.tolist()[r.prompt_length :]) for r in rollouts}
    assert {tuple(completion) for completion in completions.values()} <= completed
    assert_rows_are_the_policys(rollouts, reference)
    assert status(engine).tap.damaged == 0


def test_capture_can_be_switched_off_and_on(engine: Any, spool: Path) -> None:
    new, before = Rollouts(spool), status(engine)
    engine.collective_rpc("drafttrain_capture", args=(False,))
    generate(engine, prompts([10, 11], salt=5), greedy(8))
    off = status(engine)
    assert not off.tap.capturing
    assert off.tap.uncaptured == before.tap.uncaptured + 2
    assert off.acceptance.rounds > before.acceptance.rounds
    engine.collective_rpc("drafttrain_capture", args=(True,))
    assert new.read() == []
    generate(engine, prompts([10, 11], salt=6), greedy(8))
    new.wait_for(2)


def test_full_buffers_and_a_full_spool_cost_whole_rollouts(engine: Any, spool: Path) -> None:
    side = worker_of(engine)._drafttrain
    assembler = side._assembler
    new, before = Rollouts(spool), status(engine).tap
    for room in (0, 4000):  # none in the queue; some in the queue, too little for the rollouts
        limit, assembler._max_bytes = assembler._max_bytes, room
        try:
            generate(engine, prompts([40, 41], salt=7 + room), greedy(8))
            status(engine)
        finally:
            assembler._max_bytes = limit
    writer = assembler._segments._writer
    limit, writer.max_bytes = writer.max_bytes, 0
    try:
        generate(engine, prompts([40, 41], salt=9), greedy(8))
        status(engine)
    finally:
        writer.max_bytes = limit
    after = status(engine).tap
    assert new.read() == []
    assert after.dropped == before.dropped + 6
    assert assembler._live_bytes == 0
    generate(engine, prompts([40], salt=10), greedy(8))
    new.wait_for(1)


def test_a_policy_update_raises_the_version_once(
    engine: Any, reference: Any, policy: Path, spool: Path, tmp_path: Path
) -> None:
    changed = make_policy(tmp_path / "changed", seed=1)
    before = status(engine).policy_version
    new = Rollouts(spool)
    reload = engine.collective_rpc

    def update(step: int) -> None:
        if step == 5:
            reload("reload_weights", kwargs={"weights_path": str(changed)})

    try:
        step_through(engine, prompts([30, 45], salt=11), greedy(25, ignore_eos=True), update)
        across = new.wait_for(2)
        new = Rollouts(spool)
        generate(engine, prompts([30, 45], salt=12), greedy(10))
        fresh = new.wait_for(2)
    finally:
        reload("reload_weights", kwargs={"weights_path": str(policy)})
        assert engine.llm_engine.reset_prefix_cache()
    assert {rollout.policy_version for rollout in across + fresh} == {before + 1}
    # Only rows the new weights computed are left; what came before the update is missing.
    assert all(not r.captured[: r.prompt_length].any() and r.captured.any() for r in across)

    assert_rows_are_the_policys(fresh, load_policy(changed))
    head = SpoolReader(spool).read_head(before + 1)
    expected = load_policy(changed)
    torch.testing.assert_close(head.embed_tokens, expected.model.embed_tokens.weight)
    torch.testing.assert_close(head.lm_head, expected.lm_head.weight)
    torch.testing.assert_close(head.final_norm, expected.model.norm.weight)
    assert head.norm_eps == pytest.approx(expected.config.rms_norm_eps)

    assert status(engine).policy_version == before + 2  # the old weights, back again
    assert engine.collective_rpc("drafttrain_policy_version", args=(before + 7,)) == [before + 7]
    assert status(engine).policy_version == before + 7


def test_nothing_is_hooked_when_not_switched_on(plain_engine: Any) -> None:
    worker = worker_of(plain_engine)
    assert "sample_tokens" not in vars(worker.model_runner)
    assert "load_weights" not in vars(worker.model_runner.get_model())
    (reply,) = plain_engine.collective_rpc("drafttrain_status")
    assert reply["status"] == 404
    assert "additional_config" in reply["error"]


def test_registering_again_changes_nothing(engine: Any) -> None:
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    from drafttrain.integrations.vllm.plugin import register

    before = dict(vars(WorkerWrapperBase)), dict(vars(WorkerBase))
    register()
    assert (dict(vars(WorkerWrapperBase)), dict(vars(WorkerBase))) == before


def test_an_engine_without_speculation_gives_last_states(
    policy: Path, reference: Any, tmp_path: Path
) -> None:
    llm = make_engine(
        policy,
        None,
        {"spool": str(tmp_path), "engine": "plain", "idle_seconds": 9, "busy_seconds": 9},
    )
    generate(llm, prompts([10, 100], salt=13), greedy(8))
    worker_of(llm)._drafttrain._assembler.close()  # an engine that goes writes what it has
    reader = SpoolReader(tmp_path)
    (path,) = reader.segment_paths()
    segment = reader.read(path)
    assert segment.layout.layer_ids == ()
    assert len(segment.rollouts) == 2
    for rollout in segment.rollouts:
        assert rollout.aux_hidden is None
        states = reference(rollout.tokens.long()[None], output_hidden_states=True).hidden_states
        assert_close(rollout.last_hidden[:-1], states[-1][0, :-1])


def test_nothing_is_taken_where_logits_are_scaled(tmp_path: Path) -> None:
    llm = make_engine(make_granite(tmp_path / "policy"), None, {"spool": str(tmp_path / "spool")})
    generate(llm, prompts([10, 20]), greedy(4))
    tap = status(llm).tap
    assert tap.unavailable is not None
    assert "scale 0.125, expected 1.0" in tap.unavailable
    assert not tap.capturing
    assert (tap.written, tap.uncaptured) == (0, 2)
    with pytest.raises(EngineError, match="scale"):
        worker_of(llm)._drafttrain.capture(True)


def test_half_precision_rows(
    policy: Path, start_drafter: Path, reference: Any, tmp_path: Path
) -> None:
    settings = {"spool": str(tmp_path), "engine": "half"}
    llm = make_engine(policy, start_drafter, settings, dtype="bfloat16")
    new = Rollouts(tmp_path)
    generate(llm, prompts([20], salt=15), sampled(1.0, 8))
    (rollout,) = new.wait_for(1)
    assert rollout.last_hidden.dtype == torch.bfloat16
    states = reference(rollout.tokens.long()[None], output_hidden_states=True).hidden_states
    for found, layer in zip(rollout.aux_hidden.unbind(1), LAYER_IDS, strict=True):
        expected = states[layer][0, :-1]
        assert (found[:-1] - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_dead_thread_costs_rollouts_and_not_the_engine(
    policy: Path, start_drafter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = make_engine(policy, start_drafter, {"spool": str(tmp_path), "engine": "dying"})
    batch = prompts([10, 20], salt=14)
    expected = generate(llm, batch, greedy(20))
    assembler = worker_of(llm)._drafttrain._assembler

    def fail() -> None:
        raise RuntimeError("a fault of ours")

    printed: list[object] = []
    monkeypatch.setattr("threading.excepthook", printed.append)
    monkeypatch.setattr(assembler, "_take_steps", fail)
    assert generate(llm, batch, greedy(20)) == expected
    assembler._thread.join(5)
    assert generate(llm, batch, greedy(20)) == expected
    assert llm.collective_rpc("drafttrain_flush") == [False]
    (reply,) = llm.collective_rpc("drafttrain_status")
    assert not reply["tap"]["capturing"]
    assert "thread has ended" in reply["tap"]["unavailable"]
    assert len(printed) == 1


def test_a_window_keeps_its_rows_and_no_others(
    policy: Path, start_drafter: Path, reference: Any, tmp_path: Path
) -> None:
    settings = {"spool": str(tmp_path), "engine": "window", "window_tokens": 20}
    llm = make_engine(policy, start_drafter, settings)
    new, batch = Rollouts(tmp_path), prompts([30, 31, 32, 33, 34, 35], salt=16)
    completions = generate(llm, batch, sampled(1.0, 60))
    status(llm)
    rollouts = new.read()
    for rollout in rollouts:
        rows = rollout.captured.nonzero()[:, 0]
        assert 0 < len(rows) <= 20
        assert int(rows[-1] - rows[0]) == len(rows) - 1
        assert len(rows) == 20 or rows[-1] == rollout.length - 2
    assert len({int(r.captured.nonzero()[0]) for r in rollouts}) > 2
    assert len(rollouts) + status(llm).tap.uncaptured == len(batch)
    whole = [prompt + completion for prompt, completion in zip(batch, completions, strict=True)]
    assert all(tokens in whole for tokens in tokens_of(rollouts))
    assert_rows_are_the_policys(rollouts, reference)


def test_a_budget_passes_requests_over_and_never_waits(
    policy: Path, start_drafter: Path, tmp_path: Path
) -> None:
    settings = {"spool": str(tmp_path), "engine": "budget", "max_bytes_per_second": 1000}
    llm = make_engine(policy, start_drafter, settings)
    batch = prompts([30] * 12, salt=17)
    generate(llm, batch, greedy(8))
    generate(llm, batch, greedy(8))
    tap = status(llm).tap
    assert tap.passed_over > 0
    assert tap.written > 0
    assert tap.written + tap.passed_over == 24
    assert tap.dropped == 0
