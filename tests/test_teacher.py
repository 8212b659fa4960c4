"""The teacher's features are the policy's hidden states, however they are batched and chunked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import making
import pytest
import torch
from offline_files import write_policy
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
)

from drafttrain.errors import CheckpointError, ConfigError
from drafttrain.rollouts.sources.samples import Facts, SavedRollout
from drafttrain.training.teacher import TransformersTeacher


def saved(length: int, prompt: int = 2, seed: int = 0, gap: bool = False) -> SavedRollout:
    generator = torch.Generator().manual_seed(seed)
    generated = torch.arange(length) >= prompt
    if gap:
        generated[prompt + 2] = False
    tokens = torch.randint(20, (length,), generator=generator, dtype=torch.int32)
    return SavedRollout(tokens, generated, Facts("r", "g", temperature=0.7, domain="d"))


def hear(into: list[torch.Tensor]) -> Any:
    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        into.append(inputs[0])

    return hook


@pytest.mark.parametrize("layer_ids", [(1, 2, 3), (0, 2, 4)])
@pytest.mark.parametrize("chunk", [8192, 12])
def test_features_are_the_policys_hidden_states(
    tmp_path: Path, layer_ids: tuple[int, ...], chunk: int
) -> None:
    policy = write_policy(tmp_path)
    teacher = TransformersTeacher(tmp_path, layer_ids, chunk=chunk)
    rollouts = [saved(17, seed=1), saved(12, seed=2), saved(20, seed=3)]
    for rollout, found in zip(rollouts, teacher.features(rollouts), strict=True):
        tokens = rollout.tokens.long()[None]
        before_norm: list[torch.Tensor] = []
        handle = policy.model.norm.register_forward_pre_hook(hear(before_norm))
        expected = policy(tokens, output_hidden_states=True).hidden_states
        handle.remove()
        torch.testing.assert_close(found.last_hidden, expected[-1][0], rtol=1e-4, atol=1e-4)
        assert found.aux_hidden is not None
        for place, layer_id in enumerate(layer_ids):
            # What transformers lists last is after the final norm.
            want = before_norm[0] if layer_id == 4 else expected[layer_id]
            torch.testing.assert_close(found.aux_hidden[:, place], want[0], rtol=1e-4, atol=1e-4)


def test_a_rollout_keeps_what_was_known_of_it(tmp_path: Path) -> None:
    write_policy(tmp_path)
    teacher = TransformersTeacher(tmp_path, (1, 2, 3))
    plain, with_gap = teacher.features([saved(10, prompt=3), saved(10, gap=True)])
    assert (plain.prompt_length, plain.temperature, plain.domain) == (3, 0.7, "d")
    assert plain.generated is None
    assert with_gap.generated is not None
    assert with_gap.sampled_runs.tolist() == [0, 0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert plain.captured.tolist() == [True] * 9 + [False]


def test_the_state_before_the_norm(tmp_path: Path) -> None:
    policy = write_policy(tmp_path)
    teacher = TransformersTeacher(tmp_path, (), normed=False)
    (found,) = teacher.features([saved(9)])
    assert (found.aux_hidden, teacher.layout.last_hidden_normed) == (None, False)
    expected = policy(saved(9).tokens.long()[None], output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(
        policy.model.norm(found.last_hidden), expected[0], rtol=1e-4, atol=1e-4
    )
    assert teacher.head.final_norm is not None


def test_the_same_rollouts_give_the_same_bits(tmp_path: Path) -> None:
    write_policy(tmp_path)
    teacher = TransformersTeacher(tmp_path, (1, 2, 3))
    rollouts = [saved(17, seed=1), saved(12, seed=2)]
    for first, second in zip(
        teacher.features(rollouts),
        TransformersTeacher(tmp_path, (1, 2, 3)).features(rollouts),
        strict=True,
    ):
        assert torch.equal(first.last_hidden, second.last_hidden)


def test_another_architecture(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=32, n_layer=3, n_head=2)).eval()
    policy.save_pretrained(tmp_path)
    (found,) = TransformersTeacher(tmp_path, (1, 2)).features([saved(9)])
    expected = policy(saved(9).tokens.long()[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(found.last_hidden, expected[-1][0], rtol=1e-4, atol=1e-4)
    assert found.aux_hidden is not None
    torch.testing.assert_close(found.aux_hidden[:, 1], expected[2][0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", [8192, 7])
def test_a_trunk_of_another_name_than_its_model_says(tmp_path: Path, chunk: int) -> None:
    """Llama4's; its layers attend within chunks of the text, whatever chunks it comes in."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "intermediate_size_mlp": 48}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    config = Llama4TextConfig(
        vocab_size=20,
        num_hidden_layers=2,
        num_local_experts=2,
        attention_chunk_size=8,
        initializer_range=0.3,
        pad_token_id=None,
        **sizes,
        **heads,
    )
    policy = Llama4ForCausalLM(config).eval()
    policy.save_pretrained(tmp_path)
    (found,) = TransformersTeacher(tmp_path, (0, 1), chunk=chunk).features([saved(20)])
    expected = policy(saved(20).tokens.long()[None], output_hidden_states=True).hidden_states
    torch.testing.assert_close(found.last_hidden, expected[-1][0], rtol=1e-4, atol=1e-4)
    assert found.aux_hidden is not None
    torch.testing.assert_close(found.aux_hidden[:, 1], expected[1][0], rtol=1e-4, atol=1e-4)


def test_a_policy_whose_logits_are_capped_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = Gemma2Config(vocab_size=20, final_logit_softcapping=0.1, **sizes, **heads)
    Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="lm_head"):
        TransformersTeacher(tmp_path, (0, 1, 2))


def test_a_policy_without_weights_or_layers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        TransformersTeacher(tmp_path, (1, 2, 3))
    making.policy_shape().config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        TransformersTeacher(tmp_path, (1, 2, 3))
    with pytest.raises(CheckpointError, match="9; the policy has 4 layers"):
        TransformersTeacher(tmp_path, (1, 2, 9))


def test_a_policy_that_lacks_a_tensor(tmp_path: Path) -> None:
    write_policy(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        TransformersTeacher(tmp_path, (1, 2, 3))


@pytest.mark.parametrize("device", ["cuda:99", "foo", "meta"])
def test_a_device_that_is_none(device: str, tmp_path: Path) -> None:
    write_policy(tmp_path)
    with pytest.raises(ConfigError, match=f"policy: device_map: {device}: ") as refused:
        TransformersTeacher(tmp_path, (1,), device_map=device)
    assert "\n" not in str(refused.value)


def test_only_safetensors_are_loaded(tmp_path: Path) -> None:
    policy = write_policy(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(policy.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        TransformersTeacher(tmp_path, (1, 2, 3))
