"""Acceptance counted by a real vLLM engine, to hold an estimate against.

Starts an engine of its own in this process, so it must run where no other engine holds the device.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from vllm import LLM, SamplingParams

from drafttrain.checkpoints.manifest import read_json
from drafttrain.integrations.vllm.messages import EngineStatus

# On a CPU vLLM would fill all memory it may have; this is room for small experiments.
_CPU_KV_BLOCKS = 400


class Request(Protocol):
    """A prompt to generate from: token ids, the longest completion, the sampling's temperature."""

    @property
    def prompt(self) -> list[int]: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def temperature(self) -> float: ...


class Drafting(Protocol):
    """A drafter: its folder, and its kind, which vLLM calls its method."""

    @property
    def drafter(self) -> Path: ...

    @property
    def kind(self) -> str: ...


@dataclass(frozen=True)
class Measured:
    """What the engine counted.

    Attributes:
        rounds: verification rounds.
        accepted_per_position: drafts accepted at each position, over all rounds.
        tokens: generated.
        seconds: that took.
    """

    rounds: int
    accepted_per_position: list[int]
    tokens: int
    seconds: float

    @property
    def acceptance_length(self) -> float:
        return 1.0 + sum(self.accepted_per_position) / max(self.rounds, 1)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class MeasuringEngine:
    """An engine that generates and counts."""

    def __init__(
        self, target: Path, speculation: dict[str, Any] | None, max_length: int, batch: int = 16
    ) -> None:
        """Start it.

        Args:
            speculation: vLLM's ``speculative_config``; None for no speculation.
            max_length: longest prompt and completion together, in tokens.
            batch: requests at once.
        """
        on_cpu = not torch.cuda.is_available()
        options: dict[str, Any] = {"num_gpu_blocks_override": _CPU_KV_BLOCKS} if on_cpu else {}
        self._llm = LLM(
            str(target),
            dtype="float32" if on_cpu else "auto",
            skip_tokenizer_init=True,
            enforce_eager=on_cpu,
            enable_prefix_caching=False,
            max_model_len=max_length,
            max_num_seqs=batch,
            speculative_config=speculation,
            additional_config={"drafttrain": {"engine": "measure", "capture": False}},
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **options,
        )

    def measure(self, requests: Sequence[Request], eos: Sequence[int]) -> Measured:
        """Generate for all requests, and count."""
        before = self._status().acceptance
        start = time.perf_counter()
        outputs = self._llm.generate(
            [{"prompt_token_ids": request.prompt} for request in requests],
            [
                SamplingParams(
                    temperature=request.temperature,
                    max_tokens=request.max_tokens,
                    stop_token_ids=list(eos),
                    detokenize=False,
                )
                for request in requests
            ],
            use_tqdm=False,
        )
        seconds = time.perf_counter() - start
        after = self._status().acceptance
        earlier = before.accepted_per_position or [0] * len(after.accepted_per_position)
        pairs = zip(after.accepted_per_position, earlier, strict=True)
        return Measured(
            rounds=after.rounds - before.rounds,
            accepted_per_position=[late - early for late, early in pairs],
            tokens=sum(len(output.outputs[0].token_ids) for output in outputs),
            seconds=seconds,
        )

    def close(self) -> None:
        """Stop the engine and give its memory back."""
        self._llm.llm_engine.engine_core.shutdown()
        del self._llm

    def _status(self) -> EngineStatus:
        replies = self._llm.collective_rpc("drafttrain_status")
        return EngineStatus.model_validate(replies[0])


def measure_drafters(
    target: Path, requests: Sequence[Request], drafters: Sequence[Drafting], k: int, sampling: str
) -> list[Measured]:
    """Generate for the same requests with each drafter in turn.

    Raises:
        CheckpointError: the policy's configuration cannot be read.
    """
    stop = _stop_tokens(target)
    longest = max(len(request.prompt) + request.max_tokens for request in requests)
    results = []
    for drafting in drafters:
        speculation = {
            "method": drafting.kind,
            "model": str(drafting.drafter.resolve()),
            "num_speculative_tokens": k,
            "draft_sample_method": sampling,
        }
        engine = MeasuringEngine(target, speculation, longest + k + 1)
        results.append(engine.measure(requests, stop))
        engine.close()
    return results


def _stop_tokens(target: Path) -> list[int]:
    config = read_json(target / "config.json")
    found = config.get("eos_token_id")
    return [found] if isinstance(found, int) else list(found or [])
