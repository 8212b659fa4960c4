"""Small draft models: a causal language model with the policy's vocabulary.

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
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from drafttrain.checkpoints.causal_format import table_names
from drafttrain.checkpoints.formats import kind_of
from drafttrain.checkpoints.manifest import Kind, TargetFingerprint
from drafttrain.checkpoints.verify import verify
from drafttrain.drafters.batch import Batch
from drafttrain.drafters.contract import Drafter
from drafttrain.drafters.policy import (
    PolicyShape,
    fix_longrope,
    read_config,
    read_tensors,
    weight_files,
)
from drafttrain.errors import CheckpointError

# Exporting and loading happen at every publication: bars would fill the sidecar's log.
disable_progress_bar()

_LAYER = re.compile(r"(?P<before>\D*\blayers\.)(?P<index>\d+)(?P<after>(?:\..*)?)")

# What some families do to their logits besides the head: not what a matrix alone gives.
_SCALES_LOGITS = (
    "final_logit_softcapping",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "logits_soft_cap",
    "output_logit_soft_cap",
    "output_multiplier",
)

# How configurations tell layers apart: by an entry for each, or by the numbers of some.
_FOR_EACH_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers")
_OF_SOME_LAYERS = ("mlp_only_layers", "moe_layers")
# Where a layer stands, which is all that may change when others are left out.
_PLACE = ("layer_id", "layer_idx")


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
        body = self.model.base_model
        config = LoraConfig(
            r=rank,
            lora_alpha=2 * rank,
            target_modules=_linears_within(body),
            target_parameters=_experts_within(body),
        )
        self.model.requires_grad_(False)
        inject_adapter_in_model(config, self.model)

    @classmethod
    def initialise(
        cls, policy: PolicyShape, *, layers: int | Sequence[int] | None = None, **_: Any
    ) -> Self:
        config = _cut(policy, _chosen(policy, layers), "policy")
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=False
        )
        return cls(model)

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

        Raises:
            CheckpointError: it cannot be a draft model, lacks a tensor, or a layer cannot be taken.
        """
        if source is not None:
            return cls(_read_model(source, policy))
        chosen = _chosen(policy, layers)
        config = _cut(policy, chosen, folder / "config.json")
        names = _renumbered(list(weight_files(folder)), chosen)
        tensors = read_tensors(folder, list(names))
        state = {names[name]: tensor for name, tensor in tensors.items()}
        return cls(_loaded(type(_skeleton(config, folder)), None, folder, config, state_dict=state))

    @classmethod
    def load(cls, folder: Path, policy: PolicyShape) -> Self:
        verify(folder, TargetFingerprint.from_config(policy.config.to_dict()))
        return cls(_read_model(folder, policy))

    def export(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        model = _merged(self.model).to("cpu", dtype)
        model.config.architectures = [type(model).__name__]
        # One file, whatever its size: that is what the engine swaps.
        model.save_pretrained(folder, max_shard_size="1TB")


def _read_model(folder: Path, policy: PolicyShape) -> PreTrainedModel:
    """
    Raises:
        CheckpointError: it is no draft model for this policy, or cannot be read.
    """
    where = folder / "config.json"
    _check_kind(read_config(folder), where)
    shape = PolicyShape.from_folder(folder)
    if shape.vocab_size != policy.vocab_size:
        problem = f"{shape.vocab_size}, but the policy has {policy.vocab_size}"
        raise CheckpointError(where, "vocab_size", problem)
    fix_longrope(shape.config)
    model_class = type(_skeleton(shape.config, where))
    return _loaded(model_class, folder, folder, shape.config, use_safetensors=True)


def _check_kind(config: dict[str, Any], where: str | Path) -> None:
    if kind_of(config, where) != "draft_model":
        problem = f"{config['architectures']}: an engine takes this family for an MTP head"
        raise CheckpointError(where, "architectures", problem)


def _skeleton(config: PretrainedConfig, where: str | Path) -> PreTrainedModel:
    """The model without weights: what it is made of.

    Raises:
        CheckpointError: an engine does not take it for a draft model, or it does not train.
    """
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=False
            )
    except (ValueError, KeyError) as error:
        raise CheckpointError(where, "model", f"cannot be built: {error}") from error
    architecture = type(model).__name__
    given = model.config.to_dict()
    _check_kind(given | {"architectures": [architecture]}, where)
    embedding, _ = table_names(architecture)
    if embedding not in model.state_dict():
        raise CheckpointError(where, embedding, f"missing from a {architecture}")
    scaled = next((key for key in _SCALES_LOGITS if given.get(key) not in (None, 1, 1.0)), None)
    if scaled is not None:
        raise CheckpointError(where, scaled, "draft models that scale their logits do not train")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise CheckpointError(where, "lm_head.bias", "a head with a bias does not train")
    return model


def _loaded(
    model_class: type[PreTrainedModel],
    source: Path | None,
    where: Path,
    config: PretrainedConfig,
    **options: Any,
) -> PreTrainedModel:
    """The model with its weights in float32; those of `source` unless a state is given.

    Raises:
        CheckpointError: they cannot be read, or some are missing.
    """
    try:
        model, found = model_class.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(where, "model", f"cannot be read: {error}") from error
    if missing := sorted(found["missing_keys"]):
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(where, missing[0], f"missing{more}")
    loaded: PreTrainedModel = model
    return loaded


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


def _cut(policy: PolicyShape, layers: list[int], where: str | Path) -> PretrainedConfig:
    """The policy's configuration with these layers only.

    Raises:
        CheckpointError: it makes no draft model, or one of the layers would become another kind.
    """
    config = _with_layers(policy, layers)
    whole, cut = (_decoder_layers(_skeleton(each, where)) for each in (policy.config, config))
    for index, layer in enumerate(layers):
        if _made_of(cut[index]) != _made_of(whole[layer]):
            problem = f"{layers}: layer {layer} would be of another kind as number {index}"
            raise CheckpointError(where, "layers", problem)
    return config


def _with_layers(policy: PolicyShape, layers: list[int]) -> PretrainedConfig:
    config = copy.deepcopy(policy.config)
    given = config.to_dict()
    fix_longrope(config)
    config.num_hidden_layers = len(layers)
    for key in _FOR_EACH_LAYER:
        if given.get(key):
            setattr(config, key, [given[key][layer] for layer in layers])
    for key in _OF_SOME_LAYERS:
        if given.get(key):
            kept = [index for index, layer in enumerate(layers) if layer in given[key]]
            setattr(config, key, kept)
    if dense := given.get("first_k_dense_replace"):
        config.first_k_dense_replace = sum(layer < dense for layer in layers)
    if given.get("num_nextn_predict_layers"):
        config.num_nextn_predict_layers = 0
    return config


def _decoder_layers(model: PreTrainedModel) -> dict[int, nn.Module]:
    matches = ((_LAYER.fullmatch(name), module) for name, module in model.named_modules())
    return {int(match["index"]): each for match, each in matches if match and not match["after"]}


def _made_of(layer: nn.Module) -> list[Any]:
    """Its modules with their settings, and the shapes of its weights."""
    settings = [
        (type(module), name, value)
        for module in layer.modules()
        for name, value in sorted(vars(module).items())
        if name not in _PLACE and isinstance(value, bool | int | float | str)
    ]
    return [*settings, *((name, weight.shape) for name, weight in layer.named_parameters())]


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


def _experts_within(body: nn.Module) -> list[str]:
    """Last parts of the names of all stacked experts' weights, [E, .., ..] each."""
    found = set()
    for name, module in body.named_modules():
        if name.endswith("experts"):
            experts = name.rpartition(".")[2]
            weights = module.named_parameters(recurse=False)
            found |= {f"{experts}.{name}" for name, weight in weights if weight.dim() == 3}
    return sorted(found)


def _merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy without low-rank additions: they are added to the weights."""
    merged = copy.deepcopy(model)
    additions = [(n, m) for n, m in merged.named_modules() if isinstance(m, LoraLayer)]
    # The inner ones first: additions to experts wrap each other.
    for name, module in reversed(additions):
        module.merge()
        merged.set_submodule(name, module.get_base_layer())
    return merged
