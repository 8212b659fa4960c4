"""A vLLM engine as the teacher: saved rollouts are its prompts, and the tap takes their rows.

For policies that transformers runs slowly or not at all, or that only fit spread over several
devices by tensor parallelism. The engine extracts instead of drafting (vLLM's
``extract_hidden_states``), which gives the aux states without any drafter.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from vllm import LLM, SamplingParams

from drafttrain.checkpoints.manifest import read_json
from drafttrain.errors import CheckpointError, RolloutError
from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout
from drafttrain.rollouts.sources.samples import SavedRollout
from drafttrain.rollouts.spool import SpoolReader

# On a CPU vLLM would fill all memory it may have.
_CPU_KV_TOKENS = 1 << 16
_BLOCK = 32
# Tokens the engine must have room for: those of the first look and one more.
_SHORTEST = 3


class EngineTeacher:
    """A policy in an engine, frozen; the other teacher is :class:`~drafttrain.training.teacher`'s.

    Attributes:
        layout: of the features it gives.
        head: the policy's.
        bytes_per_token: of the features of one token.
        weight_bytes: of the policy in this process, which holds none of it.
    """

    weight_bytes = 0

    def __init__(
        self,
        folder: Path,
        layer_ids: Sequence[int],
        *,
        longest: int,
        dtype: str = "auto",
        options: dict[str, Any] | None = None,
    ) -> None:
        """Start the engine.

        Args:
            folder: the policy.
            layer_ids: aux layers to give; id k is the state after k layers.
            longest: rollout that will come, in tokens.
            dtype: as vLLM takes it; "auto" is the checkpoint's own.
            options: more of vLLM's engine arguments.

        Raises:
            CheckpointError: nothing can be captured from this policy.
        """
        self._spool = Path(tempfile.mkdtemp(prefix="drafttrain-teacher-"))
        weakref.finalize(self, shutil.rmtree, self._spool, ignore_errors=True)
        on_cpu = not torch.cuda.is_available()
        cpu = {"num_gpu_blocks_override": _CPU_KV_TOKENS // _BLOCK, "block_size": _BLOCK}
        self._llm = LLM(
            str(folder),
            dtype=_own_dtype(folder) if dtype == "auto" else dtype,
            skip_tokenizer_init=True,
            enforce_eager=True,  # prefills of any length: nothing for a graph to repeat
            enable_prefix_caching=False,  # what is found there is not computed
            max_model_len=max(longest, _SHORTEST),
            speculative_config=_extraction(layer_ids) if layer_ids else None,
            additional_config={"drafttrain": {"engine": "teacher", "spool": str(self._spool)}},
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **((cpu if on_cpu else {}) | (options or {})),
        )
        self._shutdown = weakref.finalize(self, self._llm.llm_engine.engine_core.shutdown)
        self._reader = SpoolReader(self._spool)
        self.layout, self.head = self._look(folder)
        states = len(self.layout.layer_ids) + 1
        self.bytes_per_token = states * self.layout.hidden_size * self.head.lm_head.element_size()

    def features(self, saved: Sequence[SavedRollout]) -> list[Rollout]:
        """Run the policy over some rollouts.

        Raises:
            RolloutError: the engine did not compute all of one.
        """
        captured = self._capture([_prompt(rollout).tolist() for rollout in saved])
        return [_rollout(rollout, captured) for rollout in saved]

    def close(self) -> None:
        """Stop the engine; it stops by itself when nothing refers to this any more."""
        self._shutdown()

    def _look(self, folder: Path) -> tuple[FeatureLayout, PolicyHead]:
        """Layout and head, from a first prompt."""
        self._generate([[0, 1]])
        status = self._llm.collective_rpc("drafttrain_status")[0]
        if problem := status.get("error") or status["tap"]["unavailable"]:
            raise CheckpointError(folder, "engine", f"nothing can be captured: {problem}")
        (path,) = self._reader.segment_paths()
        layout = self._reader.read(path).layout
        path.unlink()
        return layout, self._reader.read_head(self._reader.heads()[-1])

    def _capture(self, prompts: list[list[int]]) -> dict[bytes, Rollout]:
        """What the tap wrote of some prompts, by their tokens."""
        self._generate(prompts)
        found = {}
        for path in self._reader.segment_paths():
            for rollout in self._reader.read(path).rollouts:
                found[_key(rollout.tokens[: rollout.prompt_length])] = rollout
            path.unlink()  # the map outlives it
        return found

    def _generate(self, prompts: list[list[int]]) -> None:
        self._llm.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts],
            SamplingParams(temperature=0.0, max_tokens=1, detokenize=False),
            use_tqdm=False,
        )
        self._llm.collective_rpc("drafttrain_flush")


def _extraction(layer_ids: Sequence[int]) -> dict[str, Any]:
    ids = {"eagle_aux_hidden_state_layer_ids": sorted(layer_ids)}
    return {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": ids},
    }


def _own_dtype(folder: Path) -> str:
    """Of the checkpoint: what vLLM calls "auto" turns float32 into bfloat16."""
    config = read_json(folder / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "auto")


def _prompt(saved: SavedRollout) -> Tensor:
    """All tokens but the last, whose states are nobody's; the engine wants one at least."""
    return saved.tokens[: max(saved.length - 1, 1)]


def _key(tokens: Tensor) -> bytes:
    return tokens.to(torch.int32).numpy().tobytes()


def _rollout(saved: SavedRollout, captured: dict[bytes, Rollout]) -> Rollout:
    found = captured.get(_key(_prompt(saved)))
    if found is None or not bool(found.captured[: saved.length - 1].all()):
        name = saved.facts.rollout_id or "of unknown name"
        raise RolloutError("engine", f"rollout {name}", "the engine did not compute all of it")
    # After the prompt's rows comes an empty one, of the token that the engine added.
    rows = slice(saved.length)
    aux = None if found.aux_hidden is None else found.aux_hidden[rows]
    return saved.with_features(found.last_hidden[rows], aux)
