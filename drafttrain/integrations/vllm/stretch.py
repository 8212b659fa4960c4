"""Steps in a row, taken together, which takes less Python than one by one.

Whatever the tap's thread does under Python's lock, the engine's thread waits for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from drafttrain.integrations.vllm.rows import Part, States
from drafttrain.integrations.vllm.steps import DeviceSampled, HostCopy, Step


class Stretch:
    """Consecutive steps that belong :meth:`together`, as one table of entries.

    An entry is a request in a step.

    Attributes:
        entries: of each request, in order: indices into the lists below.
        sampled: [E] accepted draft tokens and the one after them; empty where the prompt is not
            through yet.
        drafted: [E] draft tokens under verification.
        starts, ends: [E] positions of the first computed token, and behind the last that stands:
            len(sampled) - 1 of the drafts were accepted, a rejected one's row is of no token.
        policy_version, drafted_by, lost: of the steps.
        captured: whether their rows are here.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        first = steps[0]
        self.policy_version, self.drafted_by = first.policy_version, first.drafted_by
        self.lost, self.captured = first.lost, first.rows is not None
        self.entries: defaultdict[str, list[int]] = defaultdict(list)
        self.sampled: list[list[int]] = []
        self.drafted: list[int] = []
        self.starts: list[int] = []
        self._step_of: list[int] = []
        scheduled: list[int] = []
        offsets: list[int] = []
        for number, step in enumerate(steps):
            requests, lists = len(step.req_ids), _lists(step)
            for req_id, ids in zip(step.req_ids, lists, strict=True):
                self.entries[req_id].append(len(self.sampled))
                self.sampled.append(ids)
            self.drafted += step.drafts or [0] * requests
            self.starts += _starts(step)
            self._step_of += [number] * requests
            scheduled += step.scheduled
            offsets += list(accumulate(step.scheduled, initial=0))[:-1]
        computed, drafts = np.array(scheduled), np.array(self.drafted)
        accepted = np.maximum([len(ids) - 1 for ids in self.sampled], 0)
        stand = computed - np.where(drafts > 0, drafts - accepted, 0)
        self.ends: list[int] = (np.array(self.starts) + stand).tolist()
        self._offsets, self._stops = offsets, (np.array(offsets) + stand).tolist()
        self._states = [_states_of(step.rows.wait()) for step in steps if step.rows is not None]

    @staticmethod
    def together(one: Step, next_: Step) -> bool:
        """Whether two steps in a row may be of one stretch."""
        return (
            one.policy_version == next_.policy_version
            and one.drafted_by == next_.drafted_by
            and one.lost == next_.lost
            and (one.rows is None) == (next_.rows is None)
        )

    def rows(self, entries: Iterable[int]) -> list[Part]:
        """Their captured rows, in the memory of the steps."""
        return [
            (
                self.starts[entry],
                self._states[self._step_of[entry]][self._offsets[entry] : self._stops[entry]],
            )
            for entry in entries
        ]


def _lists(step: Step) -> list[list[int]]:
    return step.sampled.lists() if isinstance(step.sampled, DeviceSampled) else step.sampled


def _starts(step: Step) -> list[int]:
    return step.starts.wait().tolist() if isinstance(step.starts, HostCopy) else step.starts


def _states_of(rows: Tensor) -> States:
    """[N, 1 + A] of [N, 1 + A, H]."""
    as_bytes = rows.view(torch.uint8).numpy()
    states: States = as_bytes.view(f"V{as_bytes.shape[-1]}")[..., 0]
    return states
