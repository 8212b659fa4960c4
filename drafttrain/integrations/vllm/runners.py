"""vLLM's two model runners as the tap sees them: what a step computed, and what it then sampled.

Both are hooked on the instance, because vLLM shows hidden states during generation to nobody; the
hooks can go when it offers plugins the hidden states of accepted tokens. vLLM 0.32:

V1 (``vllm/v1/worker/gpu_model_runner.py``)
    ``sample_tokens``: before it, ``execute_model_state`` holds the states of the rows just
    computed; after it the accepted tokens are known. ``_on_request_state_removed`` is upstream's
    own hook, called for every request the engine drops.
V2 (``vllm/v1/worker/gpu/model_runner.py``)
    ``sample_tokens`` as in V1, with another state. ``add_requests`` and ``finish_requests`` see
    what the scheduler says of requests; a preempted one is dropped and comes again as a new one.
    Needs a GPU: what is here was written against its source, and tested on a CPU with a stand-in
    made from it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from drafttrain.integrations.vllm.steps import HostCopy, Sampled, sampled_v1, sampled_v2, to_host

SampleTokens = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Computed:
    """What the policy computed in a step, before anything is sampled from it.

    Attributes:
        new_requests: vLLM's ``NewRequestData`` of requests scheduled for the first time.
        req_ids: [R] in batch order.
        scheduled: [R] rows of each; they lie end to end.
        drafts: [R] of them draft tokens under verification; None when no request had any.
        starts: [R] position of each request's first row.
        states: [N, H] each: the last hidden state, then the aux states.
        logits_of: gives a hidden state [H] and the logits [V] computed from it, unconstrained.
    """

    new_requests: list[Any]
    req_ids: list[str]
    scheduled: list[int]
    drafts: list[int] | None
    starts: HostCopy | list[int]
    states: list[Tensor]
    logits_of: Callable[[], tuple[Tensor, Tensor]]


class Runner(Protocol):
    """One of the two."""

    def attach(self, sample: Callable[[Any], Any], ended: Callable[[str], None]) -> SampleTokens:
        """Puts ``sample`` in the place of ``sample_tokens``, and has ``ended`` told the id of every
        request the engine drops; returns the original ``sample_tokens``."""

    def computed(self) -> Computed | None:
        """The step that is about to be sampled; None when there is none."""

    def sampled(self, output: Any) -> Sampled:
        """The sampled ids in what ``sample_tokens`` returned, per request of the batch."""


class RunnerV1:
    """See the module."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner

    def attach(self, sample: Callable[[Any], Any], ended: Callable[[str], None]) -> SampleTokens:
        runner = self._runner
        original: SampleTokens = runner.sample_tokens
        removed = runner._on_request_state_removed

        def tell(req_id: str, req_state: Any) -> None:
            removed(req_id, req_state)
            ended(req_id)

        runner.sample_tokens, runner._on_request_state_removed = sample, tell
        return original

    def computed(self) -> Computed | None:
        state, batch = self._runner.execute_model_state, self._runner.input_batch
        if state is None:
            return None
        scheduled, verification = state.scheduler_output, state.spec_decode_metadata
        count, req_ids = scheduled.total_num_scheduled_tokens, list(batch.req_ids)
        states = [state.hidden_states, *(state.aux_hidden_states or ())]
        return Computed(
            new_requests=scheduled.scheduled_new_reqs,
            req_ids=req_ids,
            scheduled=[scheduled.num_scheduled_tokens[req_id] for req_id in req_ids],
            drafts=None if verification is None else verification.num_draft_tokens,
            starts=self._starts(len(req_ids)),
            states=[tensor[:count] for tensor in states],
            logits_of=lambda: (state.sample_hidden_states[0], state.logits[0]),
        )

    def sampled(self, output: Any) -> Sampled:
        return sampled_v1(output)

    def _starts(self, count: int) -> HostCopy | list[int]:
        runner = self._runner
        if runner.use_async_scheduling:  # the host's take all drafts for accepted
            return to_host(runner.num_computed_tokens[:count].clone())
        starts: list[int] = runner.input_batch.num_computed_tokens_cpu[:count].tolist()
        return starts


class RunnerV2:
    """See the module."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._new: list[Any] = []
        self._preempted: set[str] = set()

    def attach(self, sample: Callable[[Any], Any], ended: Callable[[str], None]) -> SampleTokens:
        runner = self._runner
        original: SampleTokens = runner.sample_tokens
        add, finish = runner.add_requests, runner.finish_requests

        def note_new(scheduled: Any) -> None:
            add(scheduled)
            for request in scheduled.scheduled_new_reqs:
                if request.req_id in self._preempted:
                    self._preempted.discard(request.req_id)
                else:
                    self._new.append(request)

        def note_finished(scheduled: Any) -> None:
            finish(scheduled)
            self._preempted |= set(scheduled.preempted_req_ids or ())
            for req_id in scheduled.finished_req_ids:
                self._preempted.discard(req_id)
                ended(req_id)

        runner.sample_tokens = sample
        runner.add_requests, runner.finish_requests = note_new, note_finished
        return original

    def computed(self) -> Computed | None:
        state = self._runner.execute_model_state
        if state is None:
            return None
        batch, new, self._new = state.input_batch, self._new, []
        drafts = batch.num_draft_tokens_per_req
        count = batch.num_reqs
        states = [state.hidden_states, *(state.aux_hidden_states or ())]
        # The host only has an upper bound of the positions: earlier rejections are still on the
        # device.
        starts = batch.positions[batch.query_start_loc[:count].long()]
        return Computed(
            new_requests=new,
            req_ids=list(batch.req_ids),
            scheduled=batch.num_scheduled_tokens[:count].tolist(),
            drafts=None if drafts is None else drafts[:count].tolist(),
            starts=to_host(starts),
            states=[tensor[: batch.num_tokens] for tensor in states],
            logits_of=lambda: self._first_logits(state.hidden_states),
        )

    def sampled(self, output: Any) -> Sampled:
        return sampled_v2(output)

    def _first_logits(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        return hidden[0], self._runner.model.compute_logits(hidden[:1])[0]


def why_not(worker: Any) -> str | None:
    """Why the tap cannot tell this worker's rows apart; None when it can."""
    if worker.parallel_config.pipeline_parallel_size > 1:
        return "pipeline parallelism splits the policy's embedding from its output head"
    runner = worker.model_runner
    if runner.is_pooling_model:
        return "a pooling model generates nothing"
    if not worker.vllm_config.use_v2_model_runner:
        return None
    if runner.adaptive_verification is not None:
        return "adaptive verification decides on the device which drafts are verified"
    if runner.pcp_manager is not None:
        return "prefill context parallelism spreads a request's rows over ranks"
    return None


def runner_of(worker: Any) -> Runner:
    """The one this worker has."""
    runner = worker.model_runner
    return RunnerV2(runner) if worker.vllm_config.use_v2_model_runner else RunnerV1(runner)
