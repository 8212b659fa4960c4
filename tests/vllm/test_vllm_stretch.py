"""Steps taken together give the rollouts and counts that they give one by one."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.integrations.vllm import assembler as module
from drafttrain.integrations.vllm.assembler import Assembler
from drafttrain.integrations.vllm.settings import EngineSettings
from drafttrain.integrations.vllm.steps import Ended, HeadTaken, HostCopy, Step
from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout
from drafttrain.rollouts.spool import SpoolReader, SpoolWriter

HIDDEN, VOCAB, MAX_LENGTH, K = 4, 50, 64, 3
LAYOUT = FeatureLayout((1, 2), HIDDEN, last_hidden_normed=True, dtype="float32")


class Engine:
    """Random steps as an engine takes them: chunked prompts, drafts, stops, aborts, updates."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.policy_version = self.drafter_version = 1
        self.tokens: dict[str, list[int]] = {}
        self.prompts: dict[str, int] = {}
        self.limits: dict[str, int] = {}
        self.computed: dict[str, int] = {}
        self.started = self.rows = 0

    def items(self, steps: int) -> Iterator[Step | Ended]:
        for _ in range(steps):
            new = [self._request() for _ in range(self.rng.choice([0, 0, 1, 2]))]
            if self.rng.random() < 0.05:
                self.policy_version += 1
            drafted_by = self.drafter_version
            if self.rng.random() < 0.05:
                self.drafter_version += 1
            if self.tokens:
                yield self._step(new, drafted_by)
            for req_id in list(self.tokens):
                full = len(self.tokens[req_id]) - self.prompts[req_id] >= self.limits[req_id]
                if full or self.rng.random() < 0.02:
                    del self.tokens[req_id]
                    yield Ended(req_id)

    def _request(self) -> Any:
        from vllm import SamplingParams
        from vllm.v1.core.sched.output import NewRequestData

        # An id may be used again once its request is gone, and now and then before.
        self.started += 1
        req_id = f"r{self.started % 7}"
        prompt = [self.rng.randrange(VOCAB) for _ in range(self.rng.randint(1, 12))]
        self.tokens[req_id], self.prompts[req_id] = list(prompt), len(prompt)
        self.limits[req_id], self.computed[req_id] = self.rng.randint(1, 16), 0
        params = SamplingParams(temperature=1.0, max_tokens=self.limits[req_id])
        return NewRequestData(req_id, prompt, [], params, None, ([],), 0, None)

    def _step(self, new: list[Any], drafted_by: int) -> Step:
        step = Step(
            new_requests=new, req_ids=[], scheduled=[], drafts=[], starts=[], rows=None,
            lost=self.rng.random() < 0.03, policy_version=self.policy_version,
            drafted_by=drafted_by, drafter_version=self.drafter_version, sampled=[],
        )  # fmt: skip
        for req_id in sorted(self.tokens, key=lambda _: self.rng.random()):
            self._schedule(step, req_id)
        count = sum(step.scheduled)
        values = torch.arange(self.rows, self.rows + count, dtype=torch.float32)
        self.rows += count
        if not step.lost:
            step.rows = HostCopy(values[:, None, None].repeat(1, 3, HIDDEN))
        return step

    def _schedule(self, step: Step, req_id: str) -> None:
        tokens, start = self.tokens[req_id], self.computed[req_id]
        waiting = len(tokens) - start
        chunk = self.rng.randint(1, waiting)
        drafts = self.rng.randint(0, K) if waiting == 1 else 0
        accepted = self.rng.randint(0, drafts)
        ids = [self.rng.randrange(VOCAB) for _ in range(accepted + 1)] if chunk == waiting else []
        step.req_ids.append(req_id)
        step.scheduled.append(chunk + drafts)
        step.drafts.append(drafts)  # type: ignore[union-attr]
        step.starts.append(start)  # type: ignore[union-attr]
        step.sampled.append(ids)  # type: ignore[union-attr]
        self.computed[req_id] += chunk + accepted
        tokens += ids


def taken(
    items: list[Step | Ended], *, together: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Counters, and all rollouts in the order of their ids."""
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_GATHER_SECONDS", 0.05 if together else 0.0)
        spool = Path(name)
        writer = SpoolWriter(spool, "e")
        assembler = Assembler(EngineSettings(spool=spool), "e", MAX_LENGTH, writer)
        head = PolicyHead(1, torch.ones(VOCAB, HIDDEN), torch.ones(VOCAB, HIDDEN), None, 0.0)
        assembler.put(HeadTaken.of(head, LAYOUT))
        for item in items:
            assembler.put(item)
            assert together or assembler.flush()
        assert assembler.flush(last=True)
        reader = SpoolReader(spool)
        rollouts = [r for path in reader.segment_paths() for r in reader.read(path).rollouts]
        found = sorted((_facts(rollout) for rollout in rollouts), key=repr)
        fields = dataclasses.fields(assembler.counters)
        counters = {f.name: getattr(assembler.counters, f.name) for f in fields}
        del counters["segments"]
        return counters, found


def _facts(rollout: Rollout) -> dict[str, Any]:
    facts = {field.name: getattr(rollout, field.name) for field in dataclasses.fields(rollout)}
    tensors = {name: f.tolist() for name, f in facts.items() if isinstance(f, torch.Tensor)}
    return facts | tensors


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000))
def test_together_as_one_by_one(seed: int) -> None:
    items = list(Engine(seed).items(30))
    counters, rollouts = taken(items, together=False)
    assert taken(items, together=True) == (counters, rollouts)
    assert counters["damaged"] == 0
    assert counters["written"] == len(rollouts) > 0
