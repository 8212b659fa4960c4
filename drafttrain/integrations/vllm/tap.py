"""The tap: takes what the engine computed and sampled in a step, and hands it to a thread.

Runs in the engine's thread. Per step it makes one copy of the rows of all requests and puts one
record on a queue; which rows were accepted, whose they are and when a rollout ends is worked out in
``assembler``. It never waits: when the queue is full a step goes without its rows, and the
assembler drops the rollouts it belongs to.

Hooks two methods of a vLLM 0.32 V1 model runner (``vllm/v1/worker/gpu_model_runner.py``), on the
instance, because vLLM shows hidden states during generation to nobody:

- ``sample_tokens``: before it, ``execute_model_state`` holds the states of the rows just computed;
  after it the accepted tokens are known.
- ``_on_request_state_removed``: upstream's own hook, called for every request the engine drops.

They can go when vLLM offers plugins the hidden states of accepted tokens.

A stop is judged from the tokens as soon as they are sampled. What only the front end decides (a
stop string, an abort) reaches a worker with the next step: an engine process takes an empty one at
once, an in-process ``LLM`` when it is served by ``local``, and otherwise at the next ``generate``.

Everything is tested on CPU only: the copy path for CUDA (side stream, pinned memory, an event that
the thread waits for) and the asynchronous scheduling that goes with it have not been run.
"""

from __future__ import annotations

from typing import Any

import torch

from drafttrain.errors import EngineError
from drafttrain.integrations.vllm.assembler import Assembler
from drafttrain.integrations.vllm.head import (
    PolicyParts,
    clone_head,
    feature_layout,
    policy_parts,
)
from drafttrain.integrations.vllm.steps import (
    Ended,
    HeadTaken,
    HostCopy,
    RowBuffers,
    Step,
    sampled_of,
    to_host,
)
from drafttrain.integrations.vllm.versions import Versions
from drafttrain.rollouts.record import FeatureLayout


def find_parts(worker: Any) -> tuple[PolicyParts | None, str | None]:
    """The policy's parts, or why hidden states cannot be taken from this worker."""
    if worker.vllm_config.use_v2_model_runner:
        return None, "the V2 model runner is in use; VLLM_USE_V2_MODEL_RUNNER=0 selects V1"
    if worker.parallel_config.pipeline_parallel_size > 1:
        return None, "pipeline parallelism splits the policy's embedding from its output head"
    runner = worker.model_runner
    if runner.is_pooling_model:
        return None, "a pooling model generates nothing"
    try:
        return policy_parts(runner.get_model(), runner.model_config), None
    except EngineError as error:
        return None, str(error)


class Tap:
    """Attached to one model runner.

    Args:
        runner: the V1 model runner.
        parts: of its policy.
        versions: read at every step.
        assembler: where steps go; None on tensor-parallel ranks other than the first, which only
            take part in gathering the policy's head.
        capturing: whether to take rows from the start.
    """

    def __init__(
        self,
        runner: Any,
        parts: PolicyParts,
        versions: Versions,
        assembler: Assembler | None,
        *,
        capturing: bool,
    ) -> None:
        self.capturing = capturing
        self._runner = runner
        self._parts = parts
        self._versions = versions
        self._assembler = assembler
        self._drafted_by = versions.drafter.number
        self._layout: FeatureLayout | None = None
        self._head_version: int | None = None
        self._buffers = RowBuffers()
        self._sample_tokens = runner.sample_tokens
        self._state_removed = runner._on_request_state_removed
        runner.sample_tokens = self.sample_tokens
        runner._on_request_state_removed = self.request_removed

    def sample_tokens(self, grammar_output: Any) -> Any:
        """In place of the runner's method, with its arguments and result."""
        state = self._runner.execute_model_state
        if state is None:
            return self._sample_tokens(grammar_output)
        if self.capturing:
            self._take_head_if_new(state)
        if self._assembler is None or not self._assembler.alive:
            return self._sample_tokens(grammar_output)
        step = self._step(state, self._assembler)
        output = self._sample_tokens(grammar_output)
        step.sampled = sampled_of(output)
        self._drafted_by = self._versions.drafter.number
        self._assembler.put(step)
        return output

    def request_removed(self, req_id: str, req_state: Any) -> None:
        """In place of the runner's hook."""
        self._state_removed(req_id, req_state)
        if self._assembler is not None:
            self._assembler.put(Ended(req_id))

    def _step(self, state: Any, assembler: Assembler) -> Step:
        batch, scheduled = self._runner.input_batch, state.scheduler_output
        req_ids = list(batch.req_ids)
        room = assembler.has_room
        verification = state.spec_decode_metadata
        return Step(
            new_requests=scheduled.scheduled_new_reqs,
            req_ids=req_ids,
            scheduled=[scheduled.num_scheduled_tokens[req_id] for req_id in req_ids],
            drafts=None if verification is None else verification.num_draft_tokens,
            starts=batch.num_computed_tokens_cpu[: len(req_ids)].copy(),
            rows=self._rows(state) if self.capturing and room else None,
            lost=self.capturing and not room,
            policy_version=self._versions.policy.number,
            drafted_by=self._drafted_by,
            drafter_version=self._versions.drafter.number,
            sampled=[],
        )

    def _rows(self, state: Any) -> HostCopy:
        """[N, 1 + A, H]; a copy, because the engine reuses its buffers."""
        count = state.scheduler_output.total_num_scheduled_tokens
        states = [state.hidden_states, *(state.aux_hidden_states or ())]
        states = [tensor[:count] for tensor in states]
        if states[0].device.type == "cpu":
            return self._buffers.stack(states)
        return to_host(torch.stack(states, dim=1))

    def _take_head_if_new(self, state: Any) -> None:
        version = self._versions.policy.number
        if version == self._head_version:
            return
        # Collectives: every tensor-parallel rank comes here at the same step.
        head = clone_head(self._parts, version)
        if self._layout is None:
            self._layout = feature_layout(
                self._parts,
                state.sample_hidden_states[0],
                state.logits[0],
                self._parts.layer_ids if state.aux_hidden_states else (),
            )
        self._head_version = version
        if self._assembler is not None:
            self._assembler.put(HeadTaken.of(head, self._layout))
