"""Drafters with longrope turn as vLLM has them turn, however long its contexts may be."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Phi3Config
from vllm.model_executor.layers import rotary_embedding
from vllm.model_executor.layers.rotary_embedding import phi3_long_rope_scaled_rope as phi3_rope

from drafttrain.drafters import KINDS, DraftModel, PolicyShape, load_drafter

ORIGINAL, LONGEST = 16, 64
HEADS, HEAD_DIM = 2, 16


def policy_shape(**more: Any) -> PolicyShape:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0 + 0.1 * i for i in range(HEAD_DIM // 2)],
        "long_factor": [2.0 + 0.5 * i for i in range(HEAD_DIM // 2)],
        **more,
    }
    return PolicyShape(
        Phi3Config(
            architectures=["Phi3ForCausalLM"],
            hidden_size=HEADS * HEAD_DIM,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=HEADS,
            num_key_value_heads=1,
            vocab_size=23,
            max_position_embeddings=LONGEST,
            original_max_position_embeddings=ORIGINAL,
            pad_token_id=0,
            rope_parameters=rope,
        )
    )


def engines_rotation(
    config: dict[str, Any], positions: Tensor, max_model_len: int, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    """What vLLM makes of a vector of ones at some positions, [N, d]."""
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=max_model_len))
    monkeypatch.setattr(phi3_rope, "get_current_vllm_config", lambda: vllm_config)
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})
    rope = rotary_embedding.get_rope(
        HEAD_DIM, config["max_position_embeddings"], rope_parameters=config["rope_parameters"]
    )
    ones = torch.ones(len(positions), HEAD_DIM)
    return rope(positions, ones, ones.clone())[0]


def rotation(drafter: Any, positions: Tensor) -> Tensor:
    """The drafter's own, of a batch that ends with the last position."""
    if isinstance(drafter, DraftModel):
        cos, sin = drafter.model.model.rotary_emb(torch.ones(1), positions[None])
        cos, sin = cos[0], sin[0]
    else:
        cos, sin = drafter._rotations(len(positions), torch.float32)[:, :, 0]
        sin[..., : HEAD_DIM // 2].neg_()
    ones = torch.ones(len(positions), HEAD_DIM // 2)
    return cos + torch.cat([-ones, ones], dim=-1) * sin


@pytest.mark.parametrize("max_model_len", [ORIGINAL, LONGEST])
@pytest.mark.parametrize("scales", [{}, {"short_mscale": 1.1, "long_mscale": 1.3}])
@pytest.mark.parametrize("kind", ["eagle3", "draft_model"])
def test_it_turns_as_in_the_engine(
    kind: str,
    scales: dict[str, float],
    max_model_len: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy = policy_shape(**scales)
    KINDS[kind].initialise(policy).export(tmp_path)
    load_drafter(tmp_path, policy).export(tmp_path)  # which changes nothing more
    drafter = load_drafter(tmp_path, policy)
    config = json.loads((tmp_path / "config.json").read_text())
    # What vLLM computes for the policy beyond its original length.
    given = policy.config.to_dict()
    policys = engines_rotation(given, torch.arange(LONGEST), LONGEST, monkeypatch)
    for count in (ORIGINAL // 2, LONGEST):
        positions = torch.arange(count)
        expected = engines_rotation(config, positions, max_model_len, monkeypatch)
        torch.testing.assert_close(rotation(drafter, positions), expected)
        torch.testing.assert_close(expected, policys[:count])
    # What vLLM takes for the longest context of a draft model that is not told one.
    assert config.get("original_max_position_embeddings", LONGEST) == LONGEST
    assert config["rope_parameters"]["short_factor"] == policy.rope_parameters["long_factor"]
