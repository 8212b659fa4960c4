"""What the tests do with an in-process engine."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from drafttrain.integrations.vllm.messages import EngineStatus
from drafttrain.rollouts.record import Rollout
from drafttrain.rollouts.spool import SpoolReader

Prompt = list[int]
_ids = itertools.count()

# An engine that goes takes the process groups of all others in this process with it.
_kept: list[Any] = []


def make_engine(
    policy: Path, drafter: Path | None, settings: dict[str, Any] | None, **more: Any
) -> Any:
    from vllm import LLM

    if drafter is not None:
        more["speculative_config"] = {
            "method": "eagle3",
            "model": str(drafter),
            "num_speculative_tokens": 3,
            **more.get("speculative_config", {}),
        }
    if settings is not None:
        more["additional_config"] = {"drafttrain": settings}
    defaults = {
        "dtype": "float32",
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,  # long prompts come in chunks
        "distributed_executor_backend": "uni",
        "skip_tokenizer_init": True,
    }
    llm = LLM(
        str(policy),
        enforce_eager=True,
        max_model_len=256,
        block_size=32,
        seed=0,
        disable_log_stats=False,
        num_gpu_blocks_override=200,
        **(defaults | more),
    )
    _kept.append(llm)
    return llm


def greedy(max_tokens: int = 24, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=max_tokens, detokenize=False, **more)


def sampled(temperature: float, max_tokens: int, **more: Any) -> Any:
    from vllm import SamplingParams

    return SamplingParams(
        temperature=temperature, max_tokens=max_tokens, detokenize=False, ignore_eos=True, **more
    )


def prompts(lengths: Sequence[int], salt: int = 0) -> list[Prompt]:
    return [
        [(31 * i + 7 * j * j + 13 * j + salt) % 126 + 2 for j in range(n)]
        for i, n in enumerate(lengths)
    ]


def generate(llm: Any, batch: Sequence[Prompt], params: Any) -> list[list[int]]:
    """Completions, in the order of the prompts (those of one prompt side by side)."""
    inputs = [{"prompt_token_ids": prompt} for prompt in batch]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    return [list(completion.token_ids) for output in outputs for completion in output.outputs]


def step_through(
    llm: Any, batch: Sequence[Prompt], params: Any, between: Callable[[int], None]
) -> dict[str, list[int]]:
    """Completions by request id, with `between(step)` called after every step."""
    engine = llm.llm_engine
    names = [f"stepped-{next(_ids)}" for _ in batch]
    for name, prompt in zip(names, batch, strict=True):
        engine.add_request(name, {"prompt_token_ids": prompt}, params)
    finished: dict[str, list[int]] = {}
    for step in itertools.count():
        if not engine.has_unfinished_requests():
            return finished
        for output in engine.step():
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        between(step)
    raise AssertionError


def status(llm: Any) -> EngineStatus:
    assert all(llm.collective_rpc("drafttrain_flush"))
    return EngineStatus.model_validate(llm.collective_rpc("drafttrain_status")[0])


def worker_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker


class Rollouts:
    """What has come into the spool since this was made."""

    def __init__(self, spool: Path) -> None:
        self.reader = SpoolReader(spool)
        self.seen = set(self.reader.segment_paths())

    def read(self) -> list[Rollout]:
        paths = [path for path in self.reader.segment_paths() if path not in self.seen]
        return [rollout for path in paths for rollout in self.reader.read(path).rollouts]

    def wait_for(self, count: int, seconds: float = 10.0) -> list[Rollout]:
        """Without asking the engine for anything."""
        deadline = time.monotonic() + seconds
        while len(rollouts := self.read()) < count:
            assert time.monotonic() < deadline, f"{len(rollouts)} of {count} rollouts came"
            time.sleep(0.05)
        assert len(rollouts) == count
        return rollouts
