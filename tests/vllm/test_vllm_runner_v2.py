"""The V2 model runner needs a GPU: here a stand-in that keeps to its source, on a CPU.

The stand-in has the methods of ``vllm/v1/worker/gpu/model_runner.py`` that the tap hooks, calls
them in the same order, and hands over the same types (``ExecuteModelState``, ``InputBatch``,
``SchedulerOutput``); the policy behind it is a transformers model, decoded greedily.
"""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engines import Rollouts, greedy, prompts
from test_vllm_tap import assert_rows_are_the_policys
from tiny_models import HIDDEN, LAYER_IDS, VOCAB

from drafttrain.integrations.vllm.assembler import Assembler
from drafttrain.integrations.vllm.head import PolicyParts
from drafttrain.integrations.vllm.runners import RunnerV2, why_not
from drafttrain.integrations.vllm.settings import EngineSettings
from drafttrain.integrations.vllm.tap import Tap
from drafttrain.integrations.vllm.versions import Versions
from drafttrain.rollouts.spool import SpoolWriter

K = 3
GARBAGE = 77.0


class StandIn:
    """A V2 runner over a transformers policy, as far as the tap can see it."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.model = SimpleNamespace(compute_logits=lambda hidden: policy.lm_head(hidden))
        self.execute_model_state: Any = None
        self.tokens: dict[str, list[int]] = {}
        self.computed: dict[str, int] = {}
        self._drafts: dict[str, list[int]] = {}

    def finish_requests(self, scheduler_output: Any) -> None:
        gone = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        for req_id in sorted(gone):
            del self.tokens[req_id], self.computed[req_id]

    def add_requests(self, scheduler_output: Any) -> None:
        for new in scheduler_output.scheduled_new_reqs:
            self.tokens[new.req_id] = list(new.prefill_token_ids)
            self.computed[new.req_id] = new.num_computed_tokens

    def execute_model(self, scheduler_output: Any) -> None:
        from vllm.v1.worker.gpu.model_runner import ExecuteModelState

        self.finish_requests(scheduler_output)
        self.add_requests(scheduler_output)
        if scheduler_output.total_num_scheduled_tokens == 0:
            return
        # vLLM sorts the batch; here it is only another order than the scheduler's.
        req_ids = sorted(scheduler_output.num_scheduled_tokens, reverse=True)
        counts = [scheduler_output.num_scheduled_tokens[req_id] for req_id in req_ids]
        self._drafts = scheduler_output.scheduled_spec_decode_tokens
        states = [self._states(req_id, n) for req_id, n in zip(req_ids, counts, strict=True)]
        padding = torch.full((5, 1 + len(LAYER_IDS), HIDDEN), GARBAGE)
        rows = torch.cat([*states, padding])
        self.execute_model_state = ExecuteModelState(
            input_batch=self._input_batch(req_ids, counts),
            attn_metadata=None, slot_mappings_by_layer=None,
            hidden_states=rows[:, 0], aux_hidden_states=list(rows[:, 1:].unbind(1)),
            dp_sync_state=None, finished_req_ids=scheduler_output.finished_req_ids,
            ec_connector_output=None, cudagraph_stats=None, num_spec_tokens_to_schedule=K,
        )  # fmt: skip

    def sample_tokens(self, grammar_output: Any) -> Any:
        state, self.execute_model_state = self.execute_model_state, None
        batch = state.input_batch
        ids = np.full((batch.num_reqs, K + 1), 99)  # whatever lies behind the sampled ones
        numbers = np.zeros(batch.num_reqs, dtype=np.int32)
        ends = np.cumsum(batch.num_scheduled_tokens)
        for index, (req_id, end) in enumerate(zip(batch.req_ids, ends, strict=True)):
            sampled = self._verified(req_id, int(batch.num_scheduled_tokens[index]), state, end)
            ids[index, : len(sampled)], numbers[index] = sampled, len(sampled)
        state.hidden_states.fill_(GARBAGE)  # the buffers are the next step's
        return SimpleNamespace(
            sampled_token_ids=ids,
            num_sampled_tokens_np=numbers,
            copy_event=SimpleNamespace(synchronize=lambda: None),
        )

    def _states(self, req_id: str, count: int) -> torch.Tensor:
        """[count, 1 + A, H]"""
        tokens = torch.tensor(self.tokens[req_id] + self._drafts.get(req_id, []))[None]
        states = self.policy(tokens, output_hidden_states=True).hidden_states
        rows = slice(self.computed[req_id], self.computed[req_id] + count)
        return torch.stack([states[i][0, rows] for i in (-1, *LAYER_IDS)], dim=1)

    def _verified(self, req_id: str, count: int, state: Any, end: int) -> list[int]:
        drafts, tokens = self._drafts.get(req_id, []), self.tokens[req_id]
        self.computed[req_id] += count - len(drafts)
        if self.computed[req_id] < len(tokens):
            return []  # the prompt is not through
        first = end - len(drafts) - 1
        best = self.policy.lm_head(state.hidden_states[first:end]).argmax(-1).tolist()
        accepted = 0
        while accepted < len(drafts) and drafts[accepted] == best[accepted]:
            accepted += 1
        tokens += best[: accepted + 1]
        self.computed[req_id] += accepted
        return best[: accepted + 1]

    def _input_batch(self, req_ids: list[str], counts: list[int]) -> Any:
        from vllm.v1.worker.gpu.input_batch import InputBatch

        total = sum(counts)
        starts = [self.computed[req_id] for req_id in req_ids]
        drafts = [len(self._drafts.get(req_id, [])) for req_id in req_ids]
        positions = [torch.arange(s, s + n) for s, n in zip(starts, counts, strict=True)]
        known = {
            "req_ids": req_ids,
            "num_reqs": len(req_ids),
            "num_scheduled_tokens": np.array(counts, dtype=np.int32),
            "num_tokens": total,
            "num_tokens_after_padding": total + 5,
            "num_draft_tokens": sum(drafts),
            "num_draft_tokens_per_req": np.array(drafts, dtype=np.int32) if any(drafts) else None,
            "query_start_loc": torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
            "positions": torch.cat([*positions, torch.zeros(5, dtype=torch.int64)]),
            # An upper bound: the host does not know of the last rejections yet.
            "num_computed_tokens_np": np.array(starts) + 2,
        }
        rest = {field.name: None for field in dataclasses.fields(InputBatch)}
        return InputBatch(**(rest | known))


class Driver:
    """Scheduler and tap around the stand-in."""

    def __init__(self, policy: Any, spool: Path) -> None:
        self.runner = StandIn(policy)
        self.versions = Versions()
        settings = EngineSettings(spool=spool, engine="v2")
        self.assembler = Assembler(settings, "v2", 256, SpoolWriter(spool, "v2"))
        norm = policy.model.norm
        norm.variance_epsilon = policy.config.rms_norm_eps
        parts = PolicyParts(
            policy.model.embed_tokens, policy.lm_head, norm, tuple(LAYER_IDS), HIDDEN, VOCAB
        )
        runner = RunnerV2(self.runner)
        self.tap = Tap(runner, parts, self.versions, self.assembler, capturing=True)

    def step(
        self,
        schedule: dict[str, int],
        *,
        new: tuple[Any, ...] = (),
        drafts: dict[str, list[int]] | None = None,
        finished: set[str] | None = None,
        preempted: set[str] | None = None,
    ) -> None:
        from vllm.v1.core.sched.output import SchedulerOutput

        scheduled = dataclasses.replace(
            SchedulerOutput.make_empty(),
            scheduled_new_reqs=list(new),
            num_scheduled_tokens=schedule,
            total_num_scheduled_tokens=sum(schedule.values()),
            scheduled_spec_decode_tokens=drafts or {},
            finished_req_ids=finished or set(),
            preempted_req_ids=preempted,
        )
        self.runner.execute_model(scheduled)
        if self.runner.execute_model_state is not None:
            self.runner.sample_tokens(None)


def request(req_id: str, prompt: list[int], prefill: list[int] | None = None) -> Any:
    from vllm.v1.core.sched.output import NewRequestData

    return NewRequestData(
        req_id=req_id, prompt_token_ids=prompt, mm_features=[], sampling_params=greedy(12),
        pooling_params=None, block_ids=([],), num_computed_tokens=0, lora_request=None,
        prefill_token_ids=prefill or prompt,
    )  # fmt: skip


@pytest.fixture
def driver(engine: Any, reference: Any, tmp_path: Path) -> Driver:
    """The engine is there for its process groups."""
    return Driver(reference, tmp_path)


def continuation(reference: Any, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(reference(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_rows_of_a_v2_runner_are_the_policys(
    driver: Driver, reference: Any, tmp_path: Path
) -> None:
    new = Rollouts(tmp_path)
    first, second = prompts([10, 21], salt=80)
    truth = {"a": continuation(reference, first, 12), "b": continuation(reference, second, 12)}
    # b's prompt comes in two pieces; a is speculated for meanwhile, right and wrong.
    driver.step({"a": 10, "b": 8}, new=(request("a", first), request("b", second)))
    wrong = (truth["a"][2] + 1) % VOCAB
    driver.step({"a": 4, "b": 13}, drafts={"a": [truth["a"][1], wrong, 5]})
    tokens = driver.runner.tokens
    assert tokens["a"] == first + truth["a"][:3]
    # b is preempted, and comes again as a new request, computed from the start.
    driver.step({"a": 1}, preempted={"b"})
    resumed = request("b", second, prefill=second + truth["b"][:1])
    driver.step({"a": 4, "b": 22}, new=(resumed,), drafts={"a": truth["a"][4:7]})
    assert tokens["a"] == first + truth["a"][:8]
    driver.step({"b": 4}, drafts={"b": truth["b"][2:5]}, finished={"a"})
    driver.step({}, finished={"b"})
    rollouts = {rollout.rollout_id: rollout for rollout in new.wait_for(2)}
    a, b = rollouts["v2:a"], rollouts["v2:b"]
    assert a.tokens.tolist() == first + truth["a"][:8]
    assert b.tokens.tolist() == second + truth["b"][:6]
    assert (a.rounds, a.drafted, a.accepted) == (2, 6, 4)
    assert (b.rounds, b.drafted, b.accepted) == (1, 3, 3)
    assert {rollout.finish_reason for rollout in rollouts.values()} == {"abort"}
    assert all(rollout.captured[:-1].all() for rollout in rollouts.values())
    assert_rows_are_the_policys([a, b], reference)
    assert driver.assembler.counters.damaged == 0


def test_the_heads_layout_is_read_off_the_first_row(
    driver: Driver, reference: Any, tmp_path: Path
) -> None:
    new = Rollouts(tmp_path)
    (prompt,) = prompts([9], salt=81)
    driver.step({"c": 9}, new=(request("c", prompt),))
    driver.step({}, finished={"c"})
    new.wait_for(1)
    (path,) = new.reader.segment_paths()
    layout = new.reader.read(path).layout
    assert layout.last_hidden_normed
    assert layout.layer_ids == tuple(LAYER_IDS)
    torch.testing.assert_close(new.reader.read_head(0).lm_head, reference.lm_head.weight)


def test_nothing_is_taken_where_logits_are_more_than_the_head_gives(
    driver: Driver, reference: Any, tmp_path: Path
) -> None:
    bias = torch.arange(VOCAB) / 4
    driver.runner.model.compute_logits = lambda hidden: reference.lm_head(hidden) + bias
    (prompt,) = prompts([9], salt=82)
    driver.step({"d": 9}, new=(request("d", prompt),))
    driver.step({}, finished={"d"})
    assert driver.assembler.flush()
    assert not driver.tap.capturing
    assert "expected at most 2%" in str(driver.tap.unavailable)
    assert driver.assembler.counters.uncaptured == 1
    assert not Rollouts(tmp_path).seen


def test_the_stand_in_has_the_methods_of_the_real_one() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    for name in ("finish_requests", "add_requests", "sample_tokens"):
        real = list(inspect.signature(getattr(GPUModelRunner, name)).parameters)
        assert real == list(inspect.signature(getattr(StandIn, name)).parameters)
    real = list(inspect.signature(GPUModelRunner.execute_model).parameters)
    assert real[:2] == ["self", "scheduler_output"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"adaptive_verification": object()}, "adaptive"),
        ({"pcp_manager": object()}, "context parallelism"),
        ({"is_pooling_model": True}, "pooling"),
        ({}, None),
    ],
)
def test_what_a_v2_runner_hides_is_not_guessed(change: dict[str, Any], reason: str | None) -> None:
    runner = {"adaptive_verification": None, "pcp_manager": None, "is_pooling_model": False}
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(use_v2_model_runner=True),
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
        model_runner=SimpleNamespace(**(runner | change)),
    )
    found = why_not(worker)
    assert found is None if reason is None else reason in str(found)


def test_a_v2_drafter_keeps_its_own_head() -> None:
    from vllm.v1.worker.gpu.spec_decode.eagle import utils

    from drafttrain.integrations.vllm.heads import keep_own_head_v2

    upstream = utils._should_share
    try:
        keep_own_head_v2()
        keep_own_head_v2()
        head = SimpleNamespace(weight=torch.ones(2, 2))
        own = SimpleNamespace(has_own_lm_head=True, has_own_embed_tokens=True)
        assert upstream(own, "has_own_lm_head", head, head)
        assert not utils._should_share(own, "has_own_lm_head", head, head)
        assert utils._should_share(own, "has_own_embed_tokens", head, head)
        assert utils._should_share(SimpleNamespace(), "has_own_lm_head", head, head)
    finally:
        utils._should_share = upstream
