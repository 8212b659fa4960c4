"""Small draft models: any causal language model with the policy's vocabulary.

A draft model reads token ids alone. Its state at a recorded token is the same whether that token
was drafted or accepted, so one forward over the rollouts gives what every round drafts at every
depth: depth ``j`` of the round at slot ``s`` is the state at token ``s + 1 + j``.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from drafttrain.checkpoints.formats import kind_of
from drafttrain.checkpoints.manifest import Kind, TargetFingerprint
from drafttrain.checkpoints.verify import verify
from drafttrain.drafters.batch import Batch
from drafttrain.drafters.contract import Drafter
from drafttrain.drafters.policy import PolicyShape, read_config, read_tensors, weight_files
from drafttrain.errors import CheckpointError

# Exporting and loading happen at every publication: bars would fill the sidecar's log.
disable_progress_bar()

_LAYER = re.compile(r"(?P<before>.*\blayers\.)(?P<index>\d+)(?P<after>\..*)")

# What some families do to their logits besides the head: not what a matrix alone gives.
_SCALES_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


class DraftModel(Drafter):
    """See the module. All weights are trained, or low-rank additions (:meth:`add_lora`)."""

    kind: ClassVar[Kind] = "draft_model"
    layer_ids = ()
    same_at_every_depth: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    @property
    def hidden_size(self) -> int:
        return int(self.model.config.get_text_config().hidden_size)

    def unroll(self, batch: Batch, embed_tokens: Tensor, depths: int) -> Tensor:
        rollouts = batch.tokens.split(batch.lengths.tolist())
        # Padding comes last and attention is causal: nothing that counts sees it.
        padded = pad_sequence(list(rollouts), batch_first=True)
        states = self.model.base_model(input_ids=padded, use_cache=False).last_hidden_state
        of_token = states[batch.rollout_of, batch.positions]
        depth = torch.arange(depths, device=padded.device)[:, None]
        drafted_after = (batch.rounds + 1 + depth).clamp_max(len(batch.tokens) - 1)
        unrolled: Tensor = of_token[drafted_after]
        return unrolled

    def head_weight(self, policy_head: Tensor) -> Tensor:
        weight: Tensor = self.model.get_output_embeddings().weight
        return weight

    def add_lora(self, rank: int) -> None:
        config = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=_linears_within(self.model.base_model)
        )
        self.model.requires_grad_(False)
        inject_adapter_in_model(config, self.model)

    @classmethod
    def initialise(
        cls, policy: PolicyShape, *, layers: int | Sequence[int] | None = None, **_: Any
    ) -> Self:
        config = _with_layers(policy, _chosen(policy, layers))
        return cls(AutoModelForCausalLM.from_config(config, dtype=torch.float32))

    @classmethod
    def from_policy(
        cls,
        folder: Path,
        policy: PolicyShape,
        *,
        source: Path | None = None,
        layers: int | Sequence[int] | None = None,
        **_: Any,
    ) -> Self:
        """From the checkpoint `source`, or from some of the policy's own layers.

        Args:
            folder: the policy's.
            policy: its shape.
            source: folder of a causal LM with the same vocabulary.
            layers: of the policy: which, or how many, evenly spread; one in eight when absent.
        """
        if source is not None:
            return cls(_read_model(source, policy))
        chosen = _chosen(policy, layers)
        names = _renumbered(list(weight_files(folder)), chosen)
        tensors = read_tensors(folder, list(names))
        state = {names[name]: tensor for name, tensor in tensors.items()}
        config = _with_layers(policy, chosen)
        model_class = type(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16))
        model = model_class.from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32
        )
        return cls(model)

    @classmethod
    def load(cls, folder: Path, policy: PolicyShape) -> Self:
        verify(folder, TargetFingerprint.from_config(policy.config.to_dict()))
        return cls(_read_model(folder, policy))

    def export(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        model = _merged(self.model).to(dtype)
        model.config.architectures = [type(model).__name__]
        # One file, whatever its size: that is what the engine swaps.
        model.save_pretrained(folder, max_shard_size="1TB")


def _read_model(folder: Path, policy: PolicyShape) -> PreTrainedModel:
    """
    Raises:
        CheckpointError: it is no draft model for this policy, or cannot be read.
    """
    config = read_config(folder)
    where = folder / "config.json"
    if kind_of(config, where) != "draft_model":
        problem = f"{config['architectures']}: an engine takes this family for an MTP head"
        raise CheckpointError(where, "architectures", problem)
    if config.get("vocab_size") != policy.vocab_size:
        problem = f"{config.get('vocab_size')}, but the policy has {policy.vocab_size}"
        raise CheckpointError(where, "vocab_size", problem)
    scaled = next((key for key in _SCALES_LOGITS if config.get(key) not in (None, 1, 1.0)), None)
    if scaled is not None:
        raise CheckpointError(where, scaled, "draft models that scale their logits do not train")
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(folder, "model", f"cannot be read: {error}") from error
    return model


def _chosen(policy: PolicyShape, layers: int | Sequence[int] | None) -> list[int]:
    """Which of the policy's layers: ascending, each of them there."""
    total = policy.num_layers
    if layers is None:
        layers = max(1, total // 8)
    if isinstance(layers, int):
        spread = torch.linspace(0, total - 1, min(layers, total)).round().long()
        return [int(index) for index in spread]
    if not layers or list(layers) != sorted({*layers} & {*range(total)}):
        problem = f"{list(layers)}, expected some of 0..{total - 1}, ascending"
        raise CheckpointError("policy", "layers", problem)
    return list(layers)


def _with_layers(policy: PolicyShape, layers: list[int]) -> PretrainedConfig:
    config = copy.deepcopy(policy.config)
    config.num_hidden_layers = len(layers)
    types = config.to_dict().get("layer_types")
    if types:
        config.layer_types = [types[index] for index in layers]
    return config


def _renumbered(names: list[str], layers: list[int]) -> dict[str, str]:
    """Names in the policy's checkpoint to names in one that has only these layers, no MTP head."""
    kept = {}
    for name in names:
        if "mtp" in name:
            continue
        match = _LAYER.fullmatch(name)
        if match is None:
            kept[name] = name
        elif int(match["index"]) in layers:
            index = layers.index(int(match["index"]))
            kept[name] = f"{match['before']}{index}{match['after']}"
    return kept


def _linears_within(body: nn.Module) -> list[str]:
    """Last parts of the names of all linear layers."""
    names = (name for name, module in body.named_modules() if isinstance(module, nn.Linear))
    return sorted({name.rpartition(".")[2] for name in names})


def _merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without low-rank additions: they are added to the weights."""
    merged = copy.deepcopy(model)
    additions = [(n, m) for n, m in merged.named_modules() if isinstance(m, LoraLayer)]
    for name, module in additions:
        module.merge()
        merged.set_submodule(name, module.get_base_layer())
    return merged
