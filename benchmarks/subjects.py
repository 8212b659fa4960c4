"""Small policies, and a drafter of every kind for each, that the benchmarks put into engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from drafttrain.checkpoints.manifest import Kind
from drafttrain.demo.policy import Recipe, train_policy
from drafttrain.drafters import KINDS, Drafter, PolicyShape

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
        family: of policy: "qwen3", or "mimo", whose last state reaches the drafter unnormed.
        options: of :meth:`Drafter.from_policy`.
        overrides: keys of the policy's configuration that its engine needs to be told.
        source: writes the causal LM that a draft model starts from, next to the policy.
    """

    name: str
    kind: Kind
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    source: Callable[[Path], Path] | None = None

    def drafter(self, policy: Path) -> Drafter:
        """A new one, the same every time."""
        torch.manual_seed(0)
        shape = PolicyShape.from_folder(policy)
        source = {} if self.source is None else {"source": self.source(policy.parent)}
        return KINDS[self.kind].from_policy(policy, shape, **self.options, **source)


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
    Subject("mtp of MiMo", "mtp", "mimo"),
    Subject("mtp for Qwen3", "mtp", "qwen3", overrides={"num_nextn_predict_layers": 1}),
    Subject("draft model of Qwen3", "draft_model", "qwen3", {"layers": [0]}),
    Subject("draft model of MiMo", "draft_model", "mimo", {"layers": [0, 3]}),
    Subject("draft model, an OPT", "draft_model", "qwen3", source=_make_opt),
]


def make_policy(folder: Path, family: str, seed: int = 0) -> Path:
    """A random policy with enough spread in its logits that sampling means something."""
    torch.manual_seed(seed)
    sizes = {
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
    if family == "qwen3":
        _settle(Qwen3ForCausalLM(Qwen3Config(**sizes))).save_pretrained(folder)
        return folder
    _settle(Qwen2ForCausalLM(Qwen2Config(**sizes))).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def demo_policy(folder: Path) -> Path:
    """The policy that the demo starts from, trained below `folder`: some minutes."""
    return train_policy(folder / "policies", Recipe(), lambda done, loss: None).folder


@torch.no_grad()
def _settle(model: PreTrainedModel) -> PreTrainedModel:
    """The last token mostly decides the next: what a small drafter can guess."""
    model.model.norm.weight.uniform_(0.5, 1.5)  # a forgotten norm would show
    model.model.embed_tokens.weight *= 10
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight *= 0.06
        layer.mlp.down_proj.weight *= 0.06
        if layer.self_attn.q_proj.bias is not None:
            for projection in ("q_proj", "k_proj", "v_proj"):
                torch.nn.init.normal_(getattr(layer.self_attn, projection).bias, std=0.3)
    return model.eval()
