"""The tap: takes what the engine computed and sampled in a step, and hands it to a thread.

Runs in the engine's thread. Per step it makes one copy of the rows of all requests and puts one
record on a queue; which rows were accepted, whose they are and when a rollout ends is worked out in
``assembler``. It never waits: when the queue is full a step goes without its rows, and the
assembler drops the rollouts it belongs to.

A stop is judged from the tokens as soon as they are sampled. What only the front end decides (a
stop string, an abort) reaches a worker with the next step: an engine process takes an empty one at
once, an in-process ``LLM`` when it is served by ``local``, and otherwise at the next ``generate``.

How a step is read off vLLM's model runners is in ``runners``. Everything is tested on CPU only: the
copy path for CUDA (side stream, pinned memory, an event that the thread waits for) and the
asynchronous scheduling that goes with it have not been run.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from drafttrain.errors import EngineError
from drafttrain.integrations.vllm.assembler import Assembler
from drafttrain.integrations.vllm.head import (
    PolicyParts,
    clone_head,
    feature_layout,
    policy_parts,
)
from drafttrain.integrations.vllm.runners import Computed, Runner, why_not
from drafttrain.integrations.vllm.steps import (
    Ended,
    HeadTaken,
    HostCopy,
    RowBuffers,
    Step,
    to_host,
)
from drafttrain.integrations.vllm.versions import Versions
from drafttrain.rollouts.record import FeatureLayout

logger = logging.getLogger(__name__)


def find_parts(worker: Any) -> tuple[PolicyParts | None, str | None]:
    """The policy's parts, or why hidden states cannot be taken from this worker."""
    problem = why_not(worker)
    if problem is not None:
        return None, problem
    runner = worker.model_runner
    try:
        return policy_parts(runner.get_model(), runner.model_config), None
    except EngineError as error:
        return None, str(error)


class Tap:
    """Attached to one model runner.

    Args:
        runner: the worker's.
        parts: of its policy.
        versions: read at every step.
        assembler: where steps go; None on tensor-parallel ranks other than the first, which only
            take part in gathering the policy's head.
        capturing: whether to take rows from the start.

    Attributes:
        capturing: whether rows are taken.
        unavailable: why none can be; acceptance is counted all the same.
    """

    def __init__(
        self,
        runner: Runner,
        parts: PolicyParts,
        versions: Versions,
        assembler: Assembler | None,
        *,
        capturing: bool,
    ) -> None:
        self.capturing = capturing
        self.unavailable: str | None = None
        self._runner = runner
        self._parts = parts
        self._versions = versions
        self._assembler = assembler
        self._drafted_by = versions.drafter.number
        self._layout: FeatureLayout | None = None
        self._head_version: int | None = None
        self._buffers = RowBuffers()
        self._sample_tokens = runner.attach(self.sample_tokens, self.request_ended)
        if parts.changes_logits is not None:
            self._give_up(f"the policy's logits processor has {parts.changes_logits}")

    def sample_tokens(self, grammar_output: Any) -> Any:
        """In place of the runner's method, with its arguments and result."""
        computed = self._runner.computed()
        if computed is None:
            return self._sample_tokens(grammar_output)
        if self.capturing:
            self._take_head_if_new(computed)
        if self._assembler is None or not self._assembler.alive:
            return self._sample_tokens(grammar_output)
        step = self._step(computed, self._assembler)
        output = self._sample_tokens(grammar_output)
        step.sampled = self._runner.sampled(output)
        self._drafted_by = self._versions.drafter.number
        self._assembler.put(step)
        return output

    def request_ended(self, req_id: str) -> None:
        """The engine drops a request."""
        if self._assembler is not None:
            self._assembler.put(Ended(req_id))

    def _step(self, computed: Computed, assembler: Assembler) -> Step:
        room = assembler.has_room
        return Step(
            new_requests=computed.new_requests,
            req_ids=computed.req_ids,
            scheduled=computed.scheduled,
            drafts=computed.drafts,
            starts=computed.starts,
            rows=self._rows(computed.states) if self.capturing and room else None,
            lost=self.capturing and not room,
            policy_version=self._versions.policy.number,
            drafted_by=self._drafted_by,
            drafter_version=self._versions.drafter.number,
            sampled=[],
        )

    def _rows(self, states: list[Tensor]) -> HostCopy:
        """[N, 1 + A, H]; a copy, because the engine reuses its buffers."""
        if states[0].is_cpu:
            return self._buffers.stack(states)
        return to_host(torch.stack(states, dim=1))

    def _take_head_if_new(self, computed: Computed) -> None:
        version = self._versions.policy.number
        if version == self._head_version:
            return
        # Collectives: every tensor-parallel rank comes here at the same step.
        head = clone_head(self._parts, version)
        try:
            self._layout = self._layout or self._read_layout(computed)
        except EngineError as error:
            self._give_up(str(error))
            return
        self._head_version = version
        if self._assembler is not None:
            self._assembler.put(HeadTaken.of(head, self._layout))

    def _read_layout(self, computed: Computed) -> FeatureLayout:
        layer_ids = self._parts.layer_ids if len(computed.states) > 1 else ()
        return feature_layout(self._parts, *computed.logits_of(), layer_ids)

    def _give_up(self, reason: str) -> None:
        logger.error("drafttrain captures nothing: %s", reason)
        self.capturing, self.unavailable = False, reason
