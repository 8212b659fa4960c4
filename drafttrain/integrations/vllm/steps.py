"""What the engine thread hands to the assembler, in the order it happened."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from drafttrain.rollouts.record import FeatureLayout, PolicyHead


class RowBuffers:
    """Memory for the rows of steps, used again: on a CPU fresh memory costs more than the copy."""

    def __init__(self) -> None:
        self._free: deque[Tensor] = deque(maxlen=48)

    def stack(self, states: list[Tensor]) -> HostCopy:
        """[N, S, H] from S tensors [N, H] on the CPU, in a buffer that comes back when read."""
        count, hidden = states[0].shape
        buffer = self._free.popleft() if self._free else states[0].new_empty(0, 0)
        if len(buffer) < count:
            buffer = states[0].new_empty(2 * count, len(states) * hidden)
        rows = torch.cat(states, dim=1, out=buffer[:count])
        return HostCopy(rows.view(count, -1, hidden), release=lambda: self._free.append(buffer))


@dataclass(frozen=True, slots=True)
class HostCopy:
    """A tensor on its way to host memory.

    :meth:`wait` belongs to the assembler's thread, which calls ``release`` when it is done with it.
    """

    tensor: Tensor
    event: Any = None
    release: Callable[[], object] = lambda: None

    def wait(self) -> Tensor:
        if self.event is not None:
            self.event.synchronize()
        return self.tensor


def to_host(source: Tensor) -> HostCopy:
    """Starts a copy to pinned memory without waiting for it; a CPU tensor is taken as it is."""
    if source.is_cpu:
        return HostCopy(source)
    stream = _copy_stream(source.device)
    stream.wait_stream(torch.cuda.current_stream(source.device))
    with torch.cuda.stream(stream):
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        host.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
    source.record_stream(stream)
    return HostCopy(host, event)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@dataclass(frozen=True, slots=True)
class DeviceSampled:
    """Token ids that asynchronous scheduling left on the device, on their way to the host.

    Attributes:
        event: until which they are.
        read: gives them per request, once the event has happened.
    """

    event: Any
    read: Callable[[], list[list[int]]]

    def lists(self) -> list[list[int]]:
        self.event.synchronize()
        return self.read()


Sampled = list[list[int]] | DeviceSampled


def sampled_v1(output: Any) -> Sampled:
    """Of the V1 runner: ``ModelRunnerOutput``, or ``AsyncGPUModelRunnerOutput``."""
    if hasattr(output, "async_copy_ready_event"):
        return DeviceSampled(output.async_copy_ready_event, lambda: _read_v1(output))
    # Copied: the scheduler trims these very lists at a stop token.
    return [list(ids) for ids in output.sampled_token_ids]


def sampled_v2(output: Any) -> Sampled:
    """Of the V2 runner's ``AsyncOutput``."""
    ids, counts = output.sampled_token_ids, output.num_sampled_tokens_np
    return DeviceSampled(
        output.copy_event,
        lambda: [row[:n] for row, n in zip(ids.tolist(), counts.tolist(), strict=True)],
    )


def _read_v1(output: Any) -> list[list[int]]:
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    ids, invalid = output.sampled_token_ids_cpu, output._invalid_req_indices
    if ids.shape[-1] > 1:
        parsed: list[list[int]] = RejectionSampler.parse_output(ids, output.vocab_size, invalid)[0]
        return parsed
    lists: list[list[int]] = ids.tolist()
    for index in invalid:
        lists[index].clear()
    return lists


@dataclass(slots=True)
class Step:
    """One engine step over R requests and N tokens.

    Attributes:
        new_requests: vLLM's ``NewRequestData`` of requests scheduled for the first time.
        req_ids: [R] in batch order.
        scheduled: [R] tokens computed for each; they lie end to end in ``rows``.
        drafts: [R] of them draft tokens under verification; None when no request had any.
        starts: [R] position of each request's first computed token.
        rows: [N, 1 + A, H] last hidden state and aux states of the computed tokens, or None.
        lost: there should have been rows, but there was no room for them.
        policy_version: of the weights that computed them.
        drafted_by: drafter version that proposed the drafts.
        drafter_version: drafter version that serves requests which start now.
        sampled: [R] accepted draft tokens and the one after them; empty where the prompt is not
            through yet.
    """

    new_requests: list[Any]
    req_ids: list[str]
    scheduled: list[int]
    drafts: list[int] | None
    starts: HostCopy | list[int]
    rows: HostCopy | None
    lost: bool
    policy_version: int
    drafted_by: int | None
    drafter_version: int | None
    sampled: Sampled


@dataclass(frozen=True, slots=True)
class Ended:
    """The engine has forgotten a request: finished, stopped by the front end, or aborted."""

    req_id: str


@dataclass(frozen=True, slots=True)
class HeadTaken:
    """The policy's head, in force from here on."""

    layout: FeatureLayout
    policy_version: int
    embed_tokens: HostCopy
    lm_head: HostCopy
    final_norm: HostCopy | None
    norm_eps: float

    @classmethod
    def of(cls, head: PolicyHead, layout: FeatureLayout) -> HeadTaken:
        return cls(
            layout=layout,
            policy_version=head.policy_version,
            embed_tokens=to_host(head.embed_tokens),
            lm_head=to_host(head.lm_head),
            final_norm=None if head.final_norm is None else to_host(head.final_norm),
            norm_eps=head.norm_eps,
        )

    def wait(self) -> PolicyHead:
        return PolicyHead(
            policy_version=self.policy_version,
            embed_tokens=self.embed_tokens.wait(),
            lm_head=self.lm_head.wait(),
            final_norm=None if self.final_norm is None else self.final_norm.wait(),
            norm_eps=self.norm_eps,
        )
