"""The arms of the comparison: real vLLM engines in this process, told apart by how they draft."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams

from drafttrain.integrations.vllm.local import serve_engine

# Room for every request at its longest many times over; asking vLLM to fill the memory it may have
# would cost each engine some seconds and a gigabyte.
KV_BLOCKS = 200


@dataclass(frozen=True)
class RolloutReport:
    """One batch of rollouts.

    Attributes:
        completions: token ids of each rollout, the end token included when it was reached.
        seconds: wall time of the generation.
        tokens: completion tokens generated.
        rounds: verification rounds; 0 without speculation.
        accepted_per_position: drafts accepted at each position, over all rounds.
        finished: rollouts that ended by themselves or at the length limit (not aborted).
    """

    completions: list[list[int]]
    seconds: float
    tokens: int
    rounds: int
    accepted_per_position: list[int]
    finished: int

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def acceptance_length(self) -> float:
        return 1.0 + sum(self.accepted_per_position) / max(self.rounds, 1)

    def summary(self) -> dict[str, Any]:
        """The arm's entry in ``summary.json``."""
        if not self.rounds:
            return {"tokens_per_s": self.tokens_per_s}
        return {
            "tokens_per_s": self.tokens_per_s,
            "acceptance_length": self.acceptance_length,
            "accepted_per_position": [a / self.rounds for a in self.accepted_per_position],
        }


class Arm:
    """A vLLM engine with its own way of drafting, following the policy's weights.

    Attributes:
        server: its control routes, which the sidecar speaks to.
    """

    def __init__(
        self,
        name: str,
        policy: Path,
        *,
        speculation: dict[str, Any] | None,
        batch: int,
        max_model_len: int,
        drafttrain: dict[str, Any] | None = None,
        seed: int = 0,
    ) -> None:
        """Start the engine; `drafttrain` are the plugin's settings."""
        self.name = name
        self.llm = LLM(
            str(policy),
            dtype="float32",
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_prefix_caching=False,
            max_model_len=max_model_len,
            max_num_seqs=batch,
            seed=seed,
            num_gpu_blocks_override=KV_BLOCKS,
            speculative_config=speculation,
            additional_config={"drafttrain": {"engine": name, **(drafttrain or {})}},
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        self.server = serve_engine(self.llm)

    def follow(self, policy: Path, version: int) -> None:
        """Load the policy's new weights, as an RL job does after each of its steps."""
        self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(policy)})
        self.llm.collective_rpc("drafttrain_policy_version", args=(version,))

    def capture(self, enabled: bool) -> None:
        """Switch the tap on or off."""
        self.llm.collective_rpc("drafttrain_capture", args=(enabled,))

    def flush(self) -> None:
        """Have the tap write what it holds."""
        self.llm.collective_rpc("drafttrain_flush")

    def rollout(
        self, prompts: Sequence[list[int]], max_tokens: int, eos: int, temperature: float = 1.0
    ) -> RolloutReport:
        """Generate one completion for each prompt (repeat a prompt for a group)."""
        sampling = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            stop_token_ids=[eos],
            detokenize=False,
        )
        before = self._acceptance()
        start = time.perf_counter()
        outputs = self.llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
        )
        seconds = time.perf_counter() - start
        after = self._acceptance()
        completions = [list(output.outputs[0].token_ids) for output in outputs]
        finished = sum(output.outputs[0].finish_reason in {"stop", "length"} for output in outputs)
        return RolloutReport(
            completions=completions,
            seconds=seconds,
            tokens=sum(map(len, completions)),
            rounds=after[0] - before[0],
            accepted_per_position=[a - b for a, b in zip_longest(after[1], before[1], fillvalue=0)],
            finished=finished,
        )

    def _acceptance(self) -> tuple[int, list[int]]:
        acceptance = self.server.status().acceptance
        return acceptance.rounds, acceptance.accepted_per_position
