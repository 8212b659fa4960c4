"""Small draft models: where they come from, LoRA, and what an engine would misunderstand."""

from __future__ import annotations

import copy
from pathlib import Path

import making
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
)

from drafttrain.checkpoints.manifest import TargetFingerprint
from drafttrain.checkpoints.verify import verify
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


# Enough of any family's configuration for a model of the policy's vocabulary.
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": POLICY.vocab_size,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}


def write_model(folder: Path, config: PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "config",
    [
        Qwen3MoeConfig(**SMALL, **EXPERTS, mlp_only_layers=[0, 1]),
        SmolLM3Config(**SMALL),  # no positions in its last layer
    ],
    ids=lambda config: config.model_type,
)
def test_layers_stay_of_their_kind(config: PretrainedConfig, tmp_path: Path) -> None:
    policy = write_model(tmp_path / "policy", config)
    shape = PolicyShape.from_folder(tmp_path / "policy")
    drafter = DraftModel.from_policy(tmp_path / "policy", shape, layers=[0, 3])
    drafter.export(tmp_path / "out")
    loaded = load_drafter(tmp_path / "out", shape)
    assert isinstance(loaded, DraftModel)
    # The policy without its other layers is what was asked for.
    kept = [policy.model.layers[index] for index in (0, 3)]
    policy.model.layers = torch.nn.ModuleList(kept)
    policy.config.num_hidden_layers = 2
    policy.config.layer_types = loaded.model.config.to_dict().get("layer_types")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = policy(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(loaded.model(input_ids=tokens).logits, expected)


def test_a_layer_that_would_become_another_kind_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, Qwen3MoeConfig(**SMALL, **EXPERTS, decoder_sparse_step=2))
    policy = PolicyShape.from_folder(tmp_path)
    with pytest.raises(CheckpointError, match="layer 3 would be of another kind"):
        DraftModel.from_policy(tmp_path, policy, layers=[3])
    DraftModel.from_policy(tmp_path, policy, layers=[0, 3])


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


@pytest.mark.parametrize(
    "config",
    [
        GPTNeoXConfig(**SMALL),
        OPTConfig(**(SMALL | {"word_embed_proj_dim": 16, "ffn_dim": 48})),
    ],
    ids=lambda config: config.model_type,
)
def test_families_with_other_names_come_and_go(config: PretrainedConfig, tmp_path: Path) -> None:
    whole = write_model(tmp_path / "model", config)
    drafter = DraftModel.from_policy(tmp_path, POLICY, source=tmp_path / "model")
    config = TrainingConfig(draft_tokens=2)
    assert Trainer(copy.deepcopy(drafter), config).step(making.rollouts(POLICY, 2), LAYOUT, HEADS)
    drafter.export(tmp_path / "out")
    verify(tmp_path / "out", TargetFingerprint.from_config(POLICY.config.to_dict()))
    loaded = load_drafter(tmp_path / "out", POLICY)
    assert isinstance(loaded, DraftModel)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        expected = whole(input_ids=tokens).logits
        torch.testing.assert_close(loaded.model(input_ids=tokens).logits, expected)


def test_what_cannot_be_loaded_again_is_refused_at_once(tmp_path: Path) -> None:
    write_model(tmp_path, GPT2Config(**SMALL))
    with pytest.raises(CheckpointError, match="architectures"):
        DraftModel.from_policy(tmp_path, POLICY, source=tmp_path)
    write_model(tmp_path, BloomConfig(**SMALL))
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: missing"):
        DraftModel.from_policy(tmp_path, POLICY, source=tmp_path)


def test_missing_tensors_are_not_made_up(policy_folder: Path) -> None:
    tensors = load_file(policy_folder / "model.safetensors")
    foreign = {f"language_{name}": tensor.clone() for name, tensor in tensors.items()}
    making.write_tensors(policy_folder, foreign)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing \(and"):
        DraftModel.from_policy(policy_folder, POLICY, layers=[1, 2])
    lost = "model.layers.1.mlp.up_proj.weight"
    kept = {name: tensor for name, tensor in tensors.items() if name != lost}
    making.write_tensors(policy_folder, kept)
    for option in ({"layers": [0, 1]}, {"source": policy_folder}):
        with pytest.raises(CheckpointError, match=rf"{lost}: missing"):
            DraftModel.from_policy(policy_folder, POLICY, **option)
    DraftModel.from_policy(policy_folder, POLICY, layers=[0, 2])


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    policy = making.policy_shape(tie_word_embeddings=True)
    whole = write_model(tmp_path, policy.config)
    for option in ({"layers": 4}, {"source": tmp_path}):
        drafter = DraftModel.from_policy(tmp_path, policy, **option)
        assert torch.equal(drafter.model.lm_head.weight, whole.model.embed_tokens.weight)


WITH_EXPERTS = {
    "qwen3_moe": Qwen3MoeConfig(**SMALL, **EXPERTS),
    # With biases.
    "gpt_oss": GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("family", ["qwen3", *WITH_EXPERTS])
def test_lora_trains_little_and_exports_everything(
    family: str, policy_folder: Path, tmp_path: Path
) -> None:
    projection = "mlp.up_proj.weight"
    if family in WITH_EXPERTS:
        projection = "mlp.experts.gate_up_proj"
        write_model(policy_folder, WITH_EXPERTS[family])
    policy = PolicyShape.from_folder(policy_folder)
    drafter = DraftModel.from_policy(policy_folder, policy, layers=2)
    before = drafter.model.model.layers[0].get_parameter(projection).detach().clone()
    config = TrainingConfig(draft_tokens=2, lora_rank=2, learning_rate=1e-2, average_decay=0.0)
    trainer = Trainer(drafter, config)
    trained = sum(p.numel() for p in drafter.parameters() if p.requires_grad)
    assert trained < 0.4 * sum(p.numel() for p in drafter.parameters())
    for seed in range(3):
        trainer.step(making.rollouts(POLICY, 4, seed=seed), LAYOUT, HEADS)
    kept = [weight for weight in drafter.parameters() if weight.shape == before.shape]
    assert any(torch.equal(weight, before) for weight in kept), "what it started from stays"
    trainer.average.export(tmp_path / "out")  # of the last step alone: the same weights
    loaded = load_drafter(tmp_path / "out", policy)
    assert isinstance(loaded, DraftModel)
    assert not torch.equal(loaded.model.model.layers[0].get_parameter(projection), before)
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


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (CohereConfig(**SMALL), "logit_scale"),
        (PhiConfig(**SMALL), "bias"),
        (DeepseekV3Config(**SMALL), "MTP head"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_a_head_alone_does_not_draft_is_refused(
    config: PretrainedConfig, field: str, tmp_path: Path
) -> None:
    """As another model, and as the policy whose layers are taken: before any weight is read."""
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(tmp_path)
    policy = PolicyShape.from_folder(tmp_path)
    for option in ({"layers": 2}, {"source": tmp_path}):
        with pytest.raises(CheckpointError, match=field):
            DraftModel.from_policy(tmp_path, policy, **option)
