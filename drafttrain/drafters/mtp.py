"""MTP heads: one decoder layer of the policy's own kind, run again for every draft token.

    x       = project(cat(norm(embed of the next token), norm(state)))    order as the family has it
    h       = layer(x)
    logits  = the policy's lm_head(out_norm(h))
    state   = out_norm(h), or h                                           for the next draft token

The first state is the policy's last, as the engine hands it over (vLLM 0.32,
``model_executor/models/*_mtp.py``). Which family names what, and how it runs, is listed in
``checkpoints/mtp_format.py``; the layer itself is transformers'.
"""

from __future__ import annotations

import copy
import importlib
import math
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from drafttrain.checkpoints.manifest import Kind, TargetFingerprint
from drafttrain.checkpoints.mtp_format import (
    FAMILIES,
    MTPFamily,
    family_of,
    head_prefix,
    tells_layers,
)
from drafttrain.checkpoints.verify import verify
from drafttrain.drafters.batch import Batch
from drafttrain.drafters.contract import Drafter, write_drafter
from drafttrain.drafters.experts import fuse_experts, split_experts
from drafttrain.drafters.kernels import compute_dtype, embed
from drafttrain.drafters.mtp_config import (
    mimo_config,
    one_layer,
    with_one_head,
    without_sections,
)
from drafttrain.drafters.policy import PolicyShape, read_tensors, trunk_prefix, weight_files
from drafttrain.drafters.rounds import RoundsAttention
from drafttrain.drafters.stitch import stitch_tensors
from drafttrain.errors import CheckpointError, RolloutError
from drafttrain.rollouts.record import FeatureLayout

# transformers' module, decoder layer and rotary embedding of each family.
_MODELING = {
    "mimo": ("qwen2", "Qwen2DecoderLayer", "Qwen2RotaryEmbedding"),
    "qwen3_next": ("qwen3_next", "Qwen3NextDecoderLayer", "Qwen3NextRotaryEmbedding"),
    "qwen3_5": ("qwen3_5", "Qwen3_5DecoderLayer", "Qwen3_5TextRotaryEmbedding"),
    "qwen3_5_moe": ("qwen3_5_moe", "Qwen3_5MoeDecoderLayer", "Qwen3_5MoeTextRotaryEmbedding"),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3DecoderLayer", "DeepseekV3RotaryEmbedding"),
    "glm4_moe": ("glm4_moe", "Glm4MoeDecoderLayer", "Glm4MoeRotaryEmbedding"),
}

# Checkpoints of some families repeat the policy's embedding and head beside the MTP head.
_POLICYS_OWN = ("embed_tokens.weight", "shared_head.head.weight")

# What the trunk's names start with in a policy that is only a language model.
_TRUNK = "model."

_STACKED = "experts.gate_up_proj"


class MTPDrafter(Drafter):
    """See the module.

    Args:
        config: the policy's, or one of the ``mimo`` family with the policy's sizes.
        family: name in :data:`FAMILIES`.
        reads_normed: whether the policy's engine hands over its state after the final norm.
    """

    kind: ClassVar[Kind] = "mtp"
    layer_ids = ()

    def __init__(self, config: PretrainedConfig, family: str, *, reads_normed: bool) -> None:
        super().__init__()
        self.config = config
        self.family: MTPFamily = FAMILIES[family]
        self.reads_normed = reads_normed
        module, layer, rotary = _MODELING[family]
        modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        layer_config = one_layer(config)
        self.layer = getattr(modeling, layer)(layer_config, layer_idx=0)
        norm = type(self.layer.input_layernorm)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        self.embed_norm, self.hidden_norm, self.out_norm = (norm(hidden, eps=eps) for _ in range(3))
        self.project = nn.Linear(2 * hidden, hidden, bias=False)
        self.rotary = getattr(modeling, rotary)(layer_config)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    def unroll(self, batch: Batch, embed_tokens: Tensor, depths: int) -> Tensor:
        dtype = compute_dtype(self.project.weight)
        embeds = embed(batch.tokens, embed_tokens).to(dtype)
        state = batch.engine_hidden[batch.slots].to(dtype)
        attention = RoundsAttention.of(batch, dtype)
        slots, outputs = batch.slots, []
        for depth in range(depths):
            # Past a rollout's end there is nothing to embed, and nothing there is trained on.
            embedded = embeds[(slots + 1 + depth).clamp_max(len(embeds) - 1)]
            hidden = self._draft(embedded, state, batch.positions[slots] + depth, attention)
            if depth == 0:
                # Prompts have keys at every slot; rounds start only at some of them.
                hidden, slots = hidden[attention.starts], batch.rounds
            outputs.append(self.out_norm(hidden))
            state = outputs[-1] if self.family.feeds_normed else hidden
        return torch.stack(outputs)

    def _draft(
        self, embeds: Tensor, state: Tensor, positions: Tensor, attention: RoundsAttention
    ) -> Tensor:
        """One depth: [N, H] of the next tokens' embeddings and the states before them."""
        if self.family.zero_first:
            embeds = embeds.masked_fill(positions[:, None] == 0, 0.0)
        parts = [self.embed_norm(embeds), self.hidden_norm(state)]
        x = self.project(torch.cat(parts if self.family.embed_first else parts[::-1], dim=-1))
        out: Tensor = self.layer(
            x[None],
            attention_mask=None,
            position_ids=positions[None],
            position_embeddings=self.rotary(x, positions[None]),
            rounds=attention,
        )
        return out[0]

    def head_weight(self, policy_head: Tensor) -> Tensor:
        return policy_head

    def check_layout(self, layout: FeatureLayout) -> None:
        if layout.last_hidden_normed != self.reads_normed:
            read, found = ("after", "before") if self.reads_normed else ("before", "after")
            problem = f"captured {found} the final norm, this MTP head reads it {read}"
            raise RolloutError("rollouts", "last_hidden", problem)

    @classmethod
    def initialise(cls, policy: PolicyShape, **_: Any) -> Self:
        """At random: of the policy's own family, or a ``mimo`` head, which fits any policy."""
        own = family_of(policy.config.to_dict())
        config = with_one_head(policy.config, own) if own else mimo_config(policy)
        drafter = cls(config, own or "mimo", reads_normed=_reads_normed(policy))
        for name, parameter in drafter.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=1.0 / math.sqrt(parameter.shape[-1]))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        # Small writes to the residual: the first drafts come from the projection alone.
        for name, parameter in drafter.layer.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight")):
                nn.init.zeros_(parameter)
        return drafter

    @classmethod
    def from_policy(cls, folder: Path, policy: PolicyShape, **_: Any) -> Self:
        """The policy's own head where its checkpoint has one, otherwise a new one."""
        policy = without_sections(folder, policy)
        name = family_of(policy.config.to_dict())
        names = _place(folder, FAMILIES[name], policy)[1] if name else {}
        if name is None or not names:
            return cls.initialise(policy)
        reads_normed = FAMILIES[name].reads_normed
        drafter = cls(with_one_head(policy.config, name), name, reads_normed=reads_normed)
        tensors = read_tensors(folder, list(names.values()))
        drafter._load({ours: tensors[theirs] for ours, theirs in names.items()}, folder)
        return drafter

    @classmethod
    def load(cls, folder: Path, policy: PolicyShape) -> Self:
        verified = verify(folder, TargetFingerprint.from_config(policy.config.to_dict()))
        shape = PolicyShape.from_folder(folder)
        name = family_of(verified.config)
        assert name is not None, "verified to be one"
        drafter = cls(shape.config, name, reads_normed=_reads_normed(policy))
        prefix = head_prefix(drafter.family, verified.config)
        tensors = {name.removeprefix(prefix): t for name, t in verified.tensors.items()}
        drafter._load(tensors, folder)
        return drafter

    def export(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        config = copy.deepcopy(self.config)
        config.architectures = [self.family.architecture]
        write_drafter(folder, config.to_diff_dict(), self.head_tensors(), dtype)

    def stitch(self, policy: Path, out: Path) -> None:
        """Copy a policy's folder with this head in place of its own.

        Raises:
            CheckpointError: the policy is of another family or size, its own head has tensors that
                this one has not, it cannot be read, or `out` exists or cannot be written.
        """
        shape = PolicyShape.from_folder(policy)
        self._check_fits(shape, policy)
        start, shipped = _place(policy, self.family, shape)
        stacked = any(name.endswith(_STACKED) for name in shipped)
        head = {start + name: tensor for name, tensor in self._named(stacked=stacked).items()}
        if others := shipped.values() - head.keys():
            problem = "is of the policy's own head, and this one has nothing to put in its place"
            raise CheckpointError(policy, min(others), problem)
        settings: dict[str, Any] = {self.family.count_key: 1}
        if (plain := without_sections(policy, shape)) is not shape:
            settings["rope_parameters"] = plain.config.rope_parameters
        stitch_tensors(policy, head, settings, out)

    def head_tensors(self) -> dict[str, Tensor]:
        """The head as its family's checkpoints name it."""
        prefix = head_prefix(self.family, self.config.to_dict())
        return {prefix + name: tensor for name, tensor in self._named(stacked=False).items()}

    def _named(self, *, stacked: bool) -> dict[str, Tensor]:
        """The head's tensors named as in a checkpoint, without the head's prefix.

        Args:
            stacked: its experts in one tensor, not in one each.
        """
        names = _module_names(self.family)
        tensors = self.state_dict() if stacked else split_experts(self.state_dict())
        named = {}
        for name, tensor in tensors.items():
            module, _, rest = name.partition(".")
            named[names[module] + rest] = tensor
        return named

    def _check_fits(self, shape: PolicyShape, policy: Path) -> None:
        where = policy / "config.json"
        found = family_of(shape.config.to_dict())
        if found is None or FAMILIES[found] is not self.family:
            problem = f"is not one of {self.family.architecture}, whose engine would run this head"
            raise CheckpointError(where, "architectures", problem)
        told = ("num_hidden_layers",) if tells_layers(shape.config.to_dict()) else ()
        for field in ("hidden_size", *told):
            ours, theirs = getattr(self.config, field), getattr(shape.config, field)
            if ours != theirs:
                raise CheckpointError(where, field, f"{theirs}, but the head's policy has {ours}")

    def _load(self, tensors: dict[str, Tensor], where: Path) -> None:
        """Take tensors named as in a checkpoint, without the head's prefix."""
        ours = {}
        for name, tensor in tensors.items():
            for module, theirs in sorted(_module_names(self.family).items(), key=_longest_first):
                if name.startswith(theirs):
                    ours[f"{module}.{name.removeprefix(theirs)}"] = tensor.float()
                    break
        try:
            self.load_state_dict(fuse_experts(ours))
        except (RuntimeError, KeyError) as error:
            raise CheckpointError(where, "MTP head", f"does not fit its config: {error}") from error


def _longest_first(item: tuple[str, str]) -> int:
    return -len(item[1])


def _module_names(family: MTPFamily) -> dict[str, str]:
    """Our module name to the prefix of its tensors within the head."""
    return {
        "embed_norm": f"{family.embed_norm}.",
        "hidden_norm": f"{family.hidden_norm}.",
        "project": f"{family.project}.",
        "out_norm": f"{family.out_norm}.",
        "layer": family.layer,
    }


def _reads_normed(policy: PolicyShape) -> bool:
    family = family_of(policy.config.to_dict())
    return family is None or FAMILIES[family].reads_normed


def _place(folder: Path, family: MTPFamily, policy: PolicyShape) -> tuple[str, dict[str, str]]:
    """Where a policy's checkpoint has its head, or would have one.

    A multimodal checkpoint keeps its language model under a further prefix.

    Returns:
        What the names of the head's tensors start with; and, of those that are there, names within
        the head to names in the checkpoint.
    """
    names = weight_files(folder)
    prefix = head_prefix(family, policy.config.to_dict())
    within = prefix.removeprefix(_TRUNK)
    project = f"{family.project}.weight"
    landmark = next((n for n in names if f".{n}".endswith(f".{within}{project}")), None)
    if landmark is None:
        return (trunk_prefix(folder) if prefix.startswith(_TRUNK) else "") + within, {}
    start = landmark.removesuffix(project)
    found = {name.removeprefix(start): name for name in names if name.startswith(start)}
    return start, {ours: theirs for ours, theirs in found.items() if ours not in _POLICYS_OWN}
