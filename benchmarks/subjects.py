"""Small policies, and a drafter of every kind for each, that the benchmarks put into engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from drafttrain.checkpoints.manifest import Kind
from drafttrain.demo.policy import Recipe, train_policy
from drafttrain.drafters import KINDS, Drafter, Eagle3Drafter, PolicyShape

VOCAB = 128
MAX_LENGTH = 256


def _make_opt(folder: Path) -> Path:
    """A random model of another family than any policy here."""
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
    )
    OPTForCausalLM(config).save_pretrained(folder / "opt")
    return folder / "opt"


@dataclass(frozen=True)
class Subject:
    """A drafter and the policy it drafts for.

    Attributes:
        name: for reports.
        kind: of drafter.
        family: of policy, see :func:`make_policy`; the last state of "mimo" reaches the drafter
            unnormed.
        options: of :meth:`Drafter.from_policy`.
        overrides: keys of the policy's configuration that its engine needs to be told; it looks for
            some beside `text_config` that are in it.
        source: writes the causal LM that a draft model starts from, next to the policy.
        config: keys of the drafter's configuration that no option chooses.
    """

    name: str
    kind: Kind
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    source: Callable[[Path], Path] | None = None
    config: dict[str, Any] = field(default_factory=dict)

    def drafter(self, policy: Path) -> Drafter:
        """A new one, the same every time."""
        torch.manual_seed(0)
        shape = PolicyShape.from_folder(policy)
        source = {} if self.source is None else {"source": self.source(policy.parent)}
        drafter = KINDS[self.kind].from_policy(policy, shape, **self.options, **source)
        return _configured(drafter, self.config) if self.config else drafter


def _configured(drafter: Drafter, changes: dict[str, Any]) -> Drafter:
    """The same weights under another configuration."""
    assert isinstance(drafter, Eagle3Drafter)
    drafter.config.update(changes)
    configured = Eagle3Drafter(drafter.config)
    configured.load_state_dict(drafter.state_dict())
    return configured


# Of their layers those with linear attention need bfloat16 on a CPU; a head's is the other kind.
_FULL_ATTENTION: dict[str, Any] = {"layer_types": ["full_attention"] * 4}

SUBJECTS = [
    Subject("eagle3", "eagle3", "qwen3", {"layer_ids": (1, 2, 3)}),
    Subject(
        "eagle3, two Qwen3 layers",
        "eagle3",
        "qwen3",
        {"layer_ids": (1, 2, 3), "layer": "qwen3", "num_hidden_layers": 2, "norm_output": True},
    ),
    Subject(
        "eagle3, draft vocabulary",
        "eagle3",
        "qwen3",
        {
            "layer_ids": (0, 2, 4),
            "draft_ids": torch.arange(0, 128, 2),
            "fc_norm": True,
            "norm_before_residual": True,
        },
    ),
    Subject(
        "eagle3, norm before fc",
        "eagle3",
        "qwen3",
        {"layer_ids": (1, 4), "norm_before_fc": True, "attention_bias": True},
    ),
    Subject(
        "eagle3, sliding window",
        "eagle3",
        "qwen3",
        {"layer_ids": (1, 2, 3)},
        config={"layer_types": ["sliding_attention"], "sliding_window": 8},
    ),
    Subject("mtp of MiMo", "mtp", "mimo"),
    Subject("mtp for Qwen3", "mtp", "qwen3", overrides={"num_nextn_predict_layers": 1}),
    Subject("mtp of GLM-4 MoE", "mtp", "glm4_moe"),
    Subject("mtp of Qwen3-Next", "mtp", "qwen3_next"),
    Subject("mtp of Qwen3.5", "mtp", "qwen3_5"),
    Subject("mtp of Qwen3.5-MoE", "mtp", "qwen3_5_moe"),
    Subject(
        "mtp of Qwen3.5 with a vision tower", "mtp", "qwen3_5_vision", overrides=_FULL_ATTENTION
    ),
    Subject(
        "mtp of Qwen3.5-MoE with a vision tower",
        "mtp",
        "qwen3_5_moe_vision",
        overrides=_FULL_ATTENTION,
    ),
    Subject("mtp of DeepSeek-V3", "mtp", "deepseek_v3"),
    Subject("draft model of Qwen3", "draft_model", "qwen3", {"layers": [0]}),
    Subject("draft model of Qwen3-MoE", "draft_model", "qwen3_moe", {"layers": [0]}),
    Subject("draft model of MiMo", "draft_model", "mimo", {"layers": [0, 3]}),
    Subject("draft model, an OPT", "draft_model", "qwen3", source=_make_opt),
]


def subject_named(name: str) -> Subject:
    return next(subject for subject in SUBJECTS if subject.name == name)


_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": MAX_LENGTH,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_EXPERTS: dict[str, Any] = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_GROUPED_EXPERTS: dict[str, Any] = _EXPERTS | {
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
# Of the latent sizes, vLLM's kernel for CPUs takes the released model's alone.
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 512,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 64,
    "head_dim": 64,  # as transformers calls the same
    "v_head_dim": 32,
}
_QWEN_EXPERTS: dict[str, Any] = _EXPERTS | {
    "num_experts": 4,
    "shared_expert_intermediate_size": 32,
}
_QWEN3_NEXT: dict[str, Any] = _QWEN_EXPERTS | _FULL_ATTENTION
_QWEN3_5: dict[str, Any] = _FULL_ATTENTION | {
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
_QWEN3_5_MOE: dict[str, Any] = _QWEN3_5 | _QWEN_EXPERTS
# A tower, and tokens for what it sees, which no prompt here has.
_VISION: dict[str, Any] = {
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": _SIZES["hidden_size"],
        "num_position_embeddings": 16,
    },
    "image_token_id": VOCAB - 4,
    "video_token_id": VOCAB - 3,
    "vision_start_token_id": VOCAB - 2,
    "vision_end_token_id": VOCAB - 1,
}
_FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SIZES)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**_SIZES | _EXPERTS, num_experts=4, norm_topk_prob=True)
    ),
    "mimo": lambda: Qwen2ForCausalLM(Qwen2Config(**_SIZES)),
    "glm4_moe": lambda: Glm4MoeForCausalLM(
        Glm4MoeConfig(**_SIZES | _GROUPED_EXPERTS, use_qk_norm=True, attention_bias=True)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**_SIZES | _GROUPED_EXPERTS | _LATENT)
    ),
    "qwen3_next": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**_SIZES | _QWEN3_NEXT)),
    "qwen3_5": lambda: Qwen3_5ForCausalLM(Qwen3_5TextConfig(**_SIZES | _QWEN3_5)),
    "qwen3_5_moe": lambda: Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**_SIZES | _QWEN3_5_MOE)),
    "qwen3_5_vision": lambda: Qwen3_5ForConditionalGeneration(
        Qwen3_5Config(text_config=_SIZES | _QWEN3_5, **_VISION)
    ),
    "qwen3_5_moe_vision": lambda: Qwen3_5MoeForConditionalGeneration(
        Qwen3_5MoeConfig(text_config=_SIZES | _QWEN3_5_MOE, **_VISION)
    ),
}
# What transformers' classes do not say of the policies that ship an MTP head.
_ONE_HEAD = {"num_nextn_predict_layers": 1}
_AS_SHIPPED: dict[str, dict[str, Any]] = {
    "mimo": _ONE_HEAD | {"architectures": ["MiMoForCausalLM"]},
    "glm4_moe": _ONE_HEAD,
    "qwen3_next": _ONE_HEAD,
    "qwen3_5": {"mtp_num_hidden_layers": 1},
    "qwen3_5_moe": {"mtp_num_hidden_layers": 1},
    "qwen3_5_vision": {"mtp_num_hidden_layers": 1},
    "qwen3_5_moe_vision": {"mtp_num_hidden_layers": 1},
    "deepseek_v3": _ONE_HEAD | {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
}


def make_policy(folder: Path, family: str, seed: int = 0) -> Path:
    """A random policy with enough spread in its logits that sampling means something."""
    torch.manual_seed(seed)
    _settle(_FAMILIES[family]()).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config).update(_AS_SHIPPED.get(family, {}))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def demo_policy(folder: Path) -> Path:
    """The policy that the demo starts from, trained below `folder`: some minutes."""
    return train_policy(folder / "policies", Recipe(), lambda done, loss: None).folder


@torch.no_grad()
def _settle(model: PreTrainedModel) -> PreTrainedModel:
    """The last token mostly decides the next: what a small drafter can guess."""
    trunk = getattr(model.model, "language_model", model.model)
    trunk.norm.weight.uniform_(0.5, 1.5)  # a forgotten norm would show
    trunk.embed_tokens.weight *= 10
    for name, parameter in trunk.layers.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
            parameter *= 0.06
        elif name.endswith("_proj.bias"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()
