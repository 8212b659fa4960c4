"""What every kind of drafter is to the rest of drafttrain.

A drafter is asked for one thing: given what the policy computed on some rollouts, the hidden
states from which it would have drafted, in every round that could start and at every draft depth
(:meth:`Drafter.unroll`). Losses, acceptance estimates and the trainer need nothing else.

Position arithmetic, shared by all kinds (``tokens`` indexed from 0):

- *slot* ``s`` holds the policy's features after ``tokens[s]`` and the embedding of ``tokens[s+1]``;
- a *round* that starts at slot ``s`` drafts ``tokens[s+2]`` at depth 0, ``tokens[s+3]`` at 1, …;
- the policy's distribution for ``tokens[r+1]`` comes from row ``r`` of ``last_hidden``; so depth
  ``j`` of the round at slot ``s`` is compared with row ``s + 1 + j``.
"""

from __future__ import annotations

import functools
import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from drafttrain.checkpoints.manifest import Kind
from drafttrain.drafters.batch import Batch
from drafttrain.drafters.policy import PolicyShape
from drafttrain.errors import ConfigError, RolloutError
from drafttrain.rollouts.record import FeatureLayout

# Written in float32 whatever the rest is in: engines keep a router's bias so.
_EXACT = ("e_score_correction_bias",)


class Drafter(nn.Module, ABC):
    """One drafter: its weights, its training-time forward, its checkpoint format.

    Attributes:
        kind: the registry's name for this architecture.
        layer_ids: aux layers of the policy it reads, sorted; () when none.
        reads_normed: whether the last hidden state it reads is the one after the policy's final
            norm; where it reads none, either will do.
        same_at_every_depth: whether its draft for a token is the same at whatever depth it is
            drafted, so that one depth is all there is to train.
    """

    kind: ClassVar[Kind]
    layer_ids: tuple[int, ...]
    reads_normed: bool = True
    same_at_every_depth: ClassVar[bool] = False

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    @abstractmethod
    def unroll(self, batch: Batch, embed_tokens: Tensor, depths: int) -> Tensor:
        """Draft in every round as the engine would, to `depths` tokens (training-time test).

        Args:
            batch: rollouts with features.
            embed_tokens: the policy's embedding [V, H], frozen; may lie on another device.
            depths: number of draft tokens, k.

        Returns:
            float [depths, R, H_drafter], for the R entries of ``batch.rounds``; entry [j, i] times
            :meth:`head_weight` gives the logits for ``tokens[rounds[i] + 2 + j]``. Entries that run
            past a rollout's end are meaningless.
        """

    @property
    @abstractmethod
    def hidden_size(self) -> int:
        """H_drafter, width of its hidden states."""

    @property
    def draft_ids(self) -> Tensor | None:
        """Target ids of the head's rows, int64 [Vd], ascending; None when they are all of V."""
        return None

    @abstractmethod
    def head_weight(self, policy_head: Tensor) -> Tensor:
        """What draft logits come from: the drafter's own head, or the policy's.

        Args:
            policy_head: the policy's ``lm_head`` [V, H].

        Returns:
            [V, H_drafter], or [Vd, H_drafter] over a draft vocabulary (:attr:`draft_ids`).
        """

    @classmethod
    @abstractmethod
    def from_policy(cls, folder: Path, policy: PolicyShape, **options: Any) -> Self:
        """A drafter to start from: whatever the policy's folder has to give, the rest at random.

        Raises:
            CheckpointError: the folder lacks a tensor that is needed, or an option does not fit.
        """

    @classmethod
    @abstractmethod
    def initialise(cls, policy: PolicyShape, **options: Any) -> Self:
        """A new drafter shaped for `policy`, at random."""

    @classmethod
    @abstractmethod
    def load(cls, folder: Path, policy: PolicyShape) -> Self:
        """Read a drafter folder.

        Raises:
            CheckpointError: the folder is damaged or does not fit the policy.
        """

    @abstractmethod
    def export(self, folder: Path, dtype: torch.dtype) -> None:
        """Write ``config.json`` and ``model.safetensors`` as the engine loads them."""

    def add_lora(self, rank: int) -> None:
        """Freeze the weights and train low-rank additions to them (arXiv 2106.09685) instead.

        They are merged when the drafter is exported.

        Raises:
            ConfigError: not a kind that is large enough to need it.
        """
        raise ConfigError("training", "lora_rank", f"is for draft models, this is {self.kind}")

    def check_layout(self, layout: FeatureLayout) -> None:
        """Refuse rollouts whose aux layers are not those this drafter reads.

        Raises:
            RolloutError: names both.
        """
        if self.layer_ids and layout.layer_ids != self.layer_ids:
            problem = f"captured {list(layout.layer_ids)}, the drafter reads {list(self.layer_ids)}"
            raise RolloutError("rollouts", "layer_ids", problem)


def write_drafter(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Write a drafter folder: ``config.json``, and weights in `dtype` (:func:`as_written`)."""
    folder.mkdir(parents=True, exist_ok=True)
    document = config | {"torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
    save_file(as_written(tensors, dtype), folder / "model.safetensors", metadata={"format": "pt"})


def as_written(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors as they go into a file: floating-point ones in `dtype`, but for those of
    :data:`_EXACT`.
    """

    def written(name: str, tensor: Tensor) -> Tensor:
        kept = name.endswith(_EXACT) or not tensor.is_floating_point()
        # Cloned: safetensors writes no two tensors that share storage.
        return tensor.detach().to("cpu", tensor.dtype if kept else dtype).contiguous().clone()

    return {name: written(name, tensor) for name, tensor in tensors.items()}


def exact_dtype(tensors: dict[str, Tensor]) -> torch.dtype:
    """In which :func:`as_written` keeps every bit of them."""
    dtypes = {
        tensor.dtype
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and not name.endswith(_EXACT)
    }
    return functools.reduce(torch.promote_types, dtypes)
