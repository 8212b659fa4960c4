"""Small vLLM engines on a CPU, in this process, for the benchmarks."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

# Before vLLM is imported, which reads them then.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

from drafttrain.integrations.vllm.messages import Acceptance, EngineStatus
from drafttrain.rollouts.record import Rollout
from drafttrain.rollouts.spool import SpoolReader

# For latent attention in float32 on a CPU: the kernel vLLM prefers on some has no float32, and the
# one for rotations turns only the first head of a query [N, heads, d].
_LATENT_ATTENTION: dict[str, Any] = {
    "attention_backend": "CPU_MLA",  # in blocks of 16
    "num_gpu_blocks_override": 800,
    "compilation_config": {"custom_ops": ["all", "-rotary_embedding"]},
}
_ATTENTION: dict[str, Any] = {"block_size": 32, "num_gpu_blocks_override": 400}
# An engine that goes takes the process groups of all others in this process with it.
_kept: list[Any] = []


class Engine:
    """A policy with a drafter, and a spool of its own.

    Args:
        policy: its folder.
        drafter: its folder.
        method: as vLLM calls it.
        k: draft tokens.
        spool: a new folder.
        draft_sample_method: "greedy" or "probabilistic".
        overrides: keys of the policy's configuration to set.
        registry: to swap from.
    """

    def __init__(
        self,
        policy: Path,
        drafter: Path,
        *,
        method: str,
        k: int,
        spool: Path,
        draft_sample_method: str = "greedy",
        overrides: dict[str, Any] | None = None,
        registry: Path | None = None,
    ) -> None:
        from vllm import LLM

        _do_without_torchvision()
        self.spool = spool
        settings = {"spool": str(spool), "engine": "bench"}
        settings |= {"registry": str(registry)} if registry else {}
        config = json.loads((policy / "config.json").read_text())
        attention = _LATENT_ATTENTION if "kv_lora_rank" in config else _ATTENTION
        self.llm = LLM(
            str(policy),
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=32,
            seed=0,
            distributed_executor_backend="uni",
            disable_log_stats=False,
            skip_tokenizer_init=True,
            language_model_only="vision_config" in config,
            hf_overrides=overrides or {},
            speculative_config={
                "method": method,
                "model": str(drafter),
                "num_speculative_tokens": k,
                "draft_sample_method": draft_sample_method,
                "attention_backend": attention.get("attention_backend"),
            },
            additional_config={"drafttrain": settings},
            **attention,
        )
        _kept.append(self.llm)

    @property
    def runner(self) -> Any:
        """The V1 model runner."""
        core = self.llm.llm_engine.engine_core.engine_core
        return core.model_executor.driver_worker.worker.model_runner

    def generate(
        self,
        prompts: Sequence[list[int]],
        temperature: float,
        max_tokens: int,
        stop: int | None = None,
    ) -> list[Rollout]:
        """The rollouts that came of it, from the spool; they end at the token `stop`, if any."""
        from vllm import SamplingParams

        reader = SpoolReader(self.spool)
        seen = set(reader.segment_paths())
        params = SamplingParams(
            temperature=temperature,
            max_tokens=max_tokens,
            detokenize=False,
            ignore_eos=True,
            stop_token_ids=None if stop is None else [stop],
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        self.llm.generate(inputs, params, use_tqdm=False)
        assert all(self.llm.collective_rpc("drafttrain_flush"))
        new = [path for path in reader.segment_paths() if path not in seen]
        return [rollout for path in new for rollout in reader.read(path).rollouts]

    def acceptance(self) -> Acceptance:
        """The counters so far."""
        answer = self.llm.collective_rpc("drafttrain_status")[0]
        return EngineStatus.model_validate(answer).acceptance


def _do_without_torchvision() -> None:
    """Qwen3.5's module in vLLM imports a part of it, for pictures, which no prompt here has."""
    if find_spec("torchvision") is not None:
        return
    from vllm.model_executor.models import registry

    part = ModuleType("torchvision.transforms.v2")
    vars(part)["functional"] = None
    sys.modules[part.__name__] = part
    # vLLM would look at a model in a process of its own, which has not got that.
    registry._run_in_subprocess = lambda function: function()


def prompts(count: int, salt: int = 0, vocab: int = 128) -> list[list[int]]:
    """Token ids, 6 to 17 of them, all different."""
    return [
        [(31 * i + 7 * j * j + 13 * j + 101 * salt + i * j) % (vocab - 2) + 2 for j in range(n)]
        for i, n in ((i, 6 + i % 12) for i in range(count))
    ]
