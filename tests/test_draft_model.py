"""Small draft models: where they come from, LoRA, and what an engine would misunderstand."""

from __future__ import annotations

from pathlib import Path

import making
import pytest
import torch
from transformers import (
    CohereConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from drafttrain.config import TrainingConfig
from drafttrain.drafters import DraftModel, PolicyShape, load_drafter
from drafttrain.drafters.batch import make_batch
from drafttrain.errors import CheckpointError, ConfigError
from drafttrain.training.trainer import Trainer

POLICY = making.policy_shape()
LAYOUT = making.layout(POLICY)
HEADS = {0: making.policy_head(POLICY)}


@pytest.fixture
def policy_folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Qwen3ForCausalLM(POLICY.config).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def reference(folder: Path) -> PreTrainedModel:
    return Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_drafts_are_the_models_own_logits(policy_folder: Path) -> None:
    drafter = DraftModel.from_policy(policy_folder, POLICY, layers=[0, 2])
    rollouts = making.rollouts(POLICY, 3)
    batch = make_batch(rollouts, LAYOUT, HEADS[0])
    with torch.no_grad():
        hidden = drafter.unroll(batch, HEADS[0].embed_tokens, 2)
        logits = hidden @ drafter.head_weight(HEADS[0].lm_head).T
        for index, start in enumerate(batch.rounds.tolist()):
            rollout, slot = rollouts[int(batch.rollout_of[start])], int(batch.positions[start])
            for depth in range(2):
                context = rollout.tokens[None, : slot + 2 + depth].long()
                if context.shape[1] == slot + 2 + depth:
                    expected = drafter.model(input_ids=context).logits[0, -1]
                    torch.testing.assert_close(logits[depth, index], expected)


def test_layers_of_the_policy_are_taken_whole(policy_folder: Path) -> None:
    drafter, policy = (
        DraftModel.from_policy(policy_folder, POLICY, layers=[1, 3]),
        reference(policy_folder),
    )
    for index, source in enumerate((1, 3)):
        taken = drafter.model.model.layers[index].state_dict()
        for name, tensor in policy.model.layers[source].state_dict().items():
            assert torch.equal(taken[name], tensor), name
    assert torch.equal(drafter.model.lm_head.weight, policy.lm_head.weight)
    assert len(DraftModel.from_policy(policy_folder, POLICY).model.model.layers) == 1
    with pytest.raises(CheckpointError, match="layers"):
        DraftModel.from_policy(policy_folder, POLICY, layers=[2, 9])


def test_all_layers_are_the_policy_itself(policy_folder: Path) -> None:
    drafter = DraftModel.from_policy(policy_folder, POLICY, layers=POLICY.num_layers)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = reference(policy_folder)(input_ids=tokens).logits
        torch.testing.assert_close(drafter.model(input_ids=tokens).logits, expected)


def test_experts_find_their_way_in_and_out(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=POLICY.vocab_size,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    whole = Qwen3MoeForCausalLM(config).eval()
    whole.save_pretrained(tmp_path / "policy")
    policy = PolicyShape.from_folder(tmp_path / "policy")
    drafter = DraftModel.from_policy(tmp_path / "policy", policy, layers=3)
    drafter.export(tmp_path / "out")
    loaded = load_drafter(tmp_path / "out", policy)
    assert isinstance(loaded, DraftModel)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = whole(input_ids=tokens).logits
        torch.testing.assert_close(loaded.model(input_ids=tokens).logits, expected)


def test_another_family_with_the_same_vocabulary_can_draft(tmp_path: Path) -> None:
    torch.manual_seed(0)
    llama = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=POLICY.vocab_size,
    )
    LlamaForCausalLM(llama).save_pretrained(tmp_path)
    drafter = DraftModel.from_policy(tmp_path, POLICY, source=tmp_path)
    assert drafter.model.config.model_type == "llama"
    with pytest.raises(CheckpointError, match="vocab_size"):
        DraftModel.from_policy(tmp_path, making.policy_shape(vocab_size=29), source=tmp_path)


def test_lora_trains_little_and_exports_everything(policy_folder: Path, tmp_path: Path) -> None:
    drafter = DraftModel.from_policy(policy_folder, POLICY, layers=2)
    before = drafter.model.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer = Trainer(drafter, TrainingConfig(draft_tokens=2, lora_rank=2, learning_rate=1e-2))
    trained = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
    assert trained < 0.3 * sum(p.numel() for p in drafter.parameters())
    for seed in range(3):
        trainer.step(making.rollouts(POLICY, 4, seed=seed), LAYOUT, HEADS)
    base = drafter.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert torch.equal(base, before), "what it started from stays"
    drafter.export(tmp_path / "out")
    loaded = load_drafter(tmp_path / "out", POLICY)
    assert isinstance(loaded, DraftModel)
    assert not torch.equal(loaded.model.model.layers[0].mlp.up_proj.weight, before)
    batch = make_batch(making.rollouts(POLICY, 2), LAYOUT, HEADS[0])
    with torch.no_grad():
        expected = drafter.unroll(batch, HEADS[0].embed_tokens, 2)
        torch.testing.assert_close(loaded.unroll(batch, HEADS[0].embed_tokens, 2), expected)


def test_lora_is_for_draft_models_only() -> None:
    with pytest.raises(ConfigError, match="lora_rank"):
        Trainer(making.drafter(POLICY), TrainingConfig(lora_rank=2))


def test_a_family_with_mtp_heads_is_refused(policy_folder: Path) -> None:
    config = policy_folder / "config.json"
    config.write_text(config.read_text().replace("Qwen3ForCausalLM", "MiMoForCausalLM"))
    with pytest.raises(CheckpointError, match="MTP head"):
        DraftModel.from_policy(policy_folder, POLICY, source=policy_folder)


def test_scaled_logits_are_refused(tmp_path: Path) -> None:
    config = CohereConfig(vocab_size=POLICY.vocab_size, hidden_size=16, num_hidden_layers=1)
    config.architectures = ["CohereForCausalLM"]
    config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="logit_scale"):
        DraftModel.from_policy(tmp_path, POLICY, source=tmp_path)
