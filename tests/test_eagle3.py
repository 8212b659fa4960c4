"""Eagle3: training-time test against re-running the drafter token by token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import making
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import drafttrain.drafters.attention_plan as attention_plan
from drafttrain.checkpoints.verify import verify
from drafttrain.drafters.batch import Batch
from drafttrain.drafters.eagle3 import Eagle3Drafter
from drafttrain.drafters.eagle3_config import default_layer_ids
from drafttrain.drafters.eagle3_layer import Eagle3Layer
from drafttrain.drafters.policy import PolicyShape
from drafttrain.errors import CheckpointError, ConfigError

DEPTHS = 3


def tiny_drafter(policy: PolicyShape, seed: int = 0, **variant: Any) -> Eagle3Drafter:
    torch.manual_seed(seed)
    drafter = Eagle3Drafter.initialise(policy, layer_ids=making.LAYERS, **variant)
    for parameter in drafter.parameters():  # the initial zeros would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter.double()


def tiny_batch(policy: PolicyShape, lengths: list[int], prompts: list[int], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    total, hidden = int(offsets[-1]), policy.hidden_size
    captured = torch.ones(total, dtype=torch.bool)
    captured[offsets[1:] - 1] = False
    return Batch(
        tokens=torch.randint(policy.vocab_size, (total,), generator=generator),
        offsets=offsets,
        captured=captured,
        last_hidden=torch.zeros(total, hidden, dtype=torch.float64),
        aux_hidden=torch.randn(total, 3, hidden, generator=generator, dtype=torch.float64),
        prompt_lengths=torch.tensor(prompts),
        temperatures=torch.ones(len(lengths)),
    )


def one_of(batch: Batch, rollout: int) -> Batch:
    """The batch of one of its rollouts."""
    first, last = batch.offsets[rollout : rollout + 2].tolist()
    assert batch.aux_hidden is not None
    return Batch(
        tokens=batch.tokens[first:last],
        offsets=torch.tensor([0, last - first]),
        captured=batch.captured[first:last],
        last_hidden=batch.last_hidden[first:last],
        aux_hidden=batch.aux_hidden[first:last],
        prompt_lengths=batch.prompt_lengths[rollout : rollout + 1],
        temperatures=batch.temperatures[rollout : rollout + 1],
    )


def finished(batch: Batch, depths: int) -> Tensor:
    """bool [R]: rounds whose drafts all lie inside their rollout."""
    left = batch.lengths[batch.rollout_of] - batch.positions
    return (left > depths + 1)[batch.rounds]


def norm(module: Any, x: Tensor) -> Tensor:
    """In float64, where the module itself would go through float32; none leaves `x` as it is."""
    return (
        x if module is None else F.rms_norm(x, x.shape[-1:], module.weight, module.variance_epsilon)
    )


def draft_one_round(
    drafter: Eagle3Drafter, tokens: Tensor, aux: Tensor, embed: Tensor, slot: int, depths: int
) -> Tensor:
    """What a round that starts at `slot` drafts: the whole prefix is run again at every depth.

    Args:
        tokens: [T]; aux: [T, A, H] of one rollout.

    Returns:
        [depths, H].
    """
    features = [drafter.fc(read(drafter, aux[s])) for s in range(slot + 1)]
    outputs = []
    for _ in range(depths):
        hidden = torch.stack(features)
        embeds = F.embedding(tokens[1 : len(features) + 1], embed)
        for layer in drafter.layers:
            hidden = through(drafter, layer, hidden, embeds)
        outputs.append(norm(drafter.norm, hidden[-1]))
        features.append(outputs[-1] if drafter.config.norm_output else hidden[-1])
    return torch.stack(outputs)


def read(drafter: Eagle3Drafter, aux: Tensor) -> Tensor:
    """What ``fc`` reads of a slot's aux states, [A, H]."""
    together = norm(drafter.input_norm, aux.flatten())
    chunks = together.view_as(aux)
    norms = drafter.fc_norm or [None] * len(aux)
    return torch.cat([norm(module, chunk) for module, chunk in zip(norms, chunks, strict=True)])


def through(drafter: Eagle3Drafter, layer: Eagle3Layer, hidden: Tensor, embeds: Tensor) -> Tensor:
    """One layer over a whole prefix, [N, H]."""
    attended_by, first = layer.self_attn, layer.hidden_norm is not None
    if first:
        normed = norm(layer.hidden_norm, hidden)
        x = torch.cat([norm(layer.input_layernorm, embeds), normed], -1)
    else:
        x = norm(layer.input_layernorm, hidden)
    query, key, value = (
        projection(x).unflatten(1, (-1, attended_by.head_dim)).transpose(0, 1)
        for projection in (attended_by.q_proj, attended_by.k_proj, attended_by.v_proj)
    )
    cos, sin = drafter.rotary(x, torch.arange(len(x))[None])
    query, key = norm(attended_by.q_norm, query), norm(attended_by.k_norm, key)
    query, key = apply_rotary_pos_emb(query[None], key[None], cos, sin)
    positions = torch.arange(len(x))
    distance = positions[:, None] - positions
    seen = (distance >= 0) & (distance < (layer.window or len(x)))
    attended = F.scaled_dot_product_attention(query, key, value[None], seen, enable_gqa=True)
    residual = normed if first and layer.norm_before_residual else hidden
    residual = residual + attended_by.o_proj(attended[0].transpose(0, 1).flatten(1))
    return residual + layer.mlp(norm(layer.post_attention_layernorm, residual))


VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm_before_residual": True},
    {"layer": "qwen3", "norm_output": True},
    {"num_hidden_layers": 2, "norm_before_fc": True, "fc_norm": True},
    {
        "layer": "qwen3",
        "num_hidden_layers": 3,
        "attention_bias": True,
        "norm_before_residual": True,
    },
    {"attention_bias": True, "norm_output": True, "fc_norm": True},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("square_at_once", [64, 1 << 20])
def test_unroll_equals_drafting_token_by_token(
    variant: dict[str, Any], square_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_plan, "square_at_once", lambda dtype: square_at_once)
    policy = making.policy_shape()
    assert_drafts_token_by_token(tiny_drafter(policy, **variant), policy)


def assert_drafts_token_by_token(drafter: Eagle3Drafter, policy: PolicyShape) -> None:
    batch = tiny_batch(policy, lengths=[14, 13, 9], prompts=[2, 4, 1])
    embed = torch.randn(policy.vocab_size, policy.hidden_size, dtype=torch.float64)
    unrolled = drafter.unroll(batch, embed, DEPTHS)
    assert unrolled.shape[1] == 11 + 8 + 7, "rounds start at the prompt's end or later"
    for round_, start in enumerate(batch.rounds.tolist()):
        if finished(batch, DEPTHS)[round_]:
            alone, slot = one_of(batch, int(batch.rollout_of[start])), int(batch.positions[start])
            assert alone.aux_hidden is not None
            expected = draft_one_round(drafter, alone.tokens, alone.aux_hidden, embed, slot, DEPTHS)
            torch.testing.assert_close(unrolled[:, round_], expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_variant_has_the_tensors_its_config_tells_of(
    variant: dict[str, Any], tmp_path: Path
) -> None:
    drafter = tiny_drafter(making.policy_shape(), **variant)
    drafter.export(tmp_path)
    assert len(verify(tmp_path).tensors) == len(drafter.state_dict())


@pytest.mark.parametrize("windows", [(5, None), (None, 4), (1, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("square_at_once", [16, 64, 1 << 20])
def test_a_window_moves_on_with_the_drafts(
    windows: tuple[int | None, ...], square_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_plan, "square_at_once", lambda dtype: square_at_once)
    policy = making.policy_shape()
    drafter = windowed(tiny_drafter(policy, num_hidden_layers=len(windows)), windows)
    assert_drafts_token_by_token(drafter, policy)


def windowed(drafter: Eagle3Drafter, windows: Sequence[int | None]) -> Eagle3Drafter:
    for layer, window in zip(drafter.layers, windows, strict=True):
        layer.window = window
    return drafter


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=2),
    st.integers(0, 9),
    st.none() | st.integers(10, 15),
)
def test_what_lies_before_the_window_has_no_influence(
    windows: list[int], last: int, missing: int | None
) -> None:
    """All up to the slot `last` is changed; a round sees one window further back by every layer."""
    policy = making.policy_shape()
    drafter = windowed(tiny_drafter(policy, num_hidden_layers=len(windows)), windows)
    embed = torch.randn(policy.vocab_size, policy.hidden_size, dtype=torch.float64)
    batch = tiny_batch(policy, [24], [1])
    if missing is not None:
        batch.captured[missing] = False
    before = drafter.unroll(batch, embed, DEPTHS)
    assert batch.aux_hidden is not None
    batch.aux_hidden[: last + 1] += 1.0
    batch.tokens[: last + 2] = 0
    after = drafter.unroll(batch, embed, DEPTHS)
    unseen = batch.positions[batch.rounds] > last + sum(window - 1 for window in windows)
    assert torch.equal(after[:, unseen], before[:, unseen])
    if missing is None:
        assert not (after == before)[:, ~unseen].all(-1).any()


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(4, 20)), min_size=2, max_size=6),
    st.sampled_from([40, 1 << 20]),
)
def test_rollouts_of_a_batch_do_not_see_each_other(
    sizes: list[tuple[int, int]], square_at_once: int
) -> None:
    policy = making.policy_shape()
    drafter = tiny_drafter(policy)
    embed = torch.randn(policy.vocab_size, policy.hidden_size, dtype=torch.float64)
    prompts = [prompt for prompt, _ in sizes]
    batch = tiny_batch(policy, [prompt + completion for prompt, completion in sizes], prompts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_plan, "square_at_once", lambda dtype: square_at_once)
        together = drafter.unroll(batch, embed, DEPTHS)
        for rollout in range(len(sizes)):
            alone = one_of(batch, rollout)
            whole = finished(alone, DEPTHS)
            mine = together[:, batch.rollout_of[batch.rounds] == rollout]
            torch.testing.assert_close(
                mine[:, whole], drafter.unroll(alone, embed, DEPTHS)[:, whole]
            )


def test_missing_rows_are_not_attended() -> None:
    policy = making.policy_shape()
    drafter = tiny_drafter(policy)
    embed = torch.randn(policy.vocab_size, policy.hidden_size, dtype=torch.float64)
    batch = tiny_batch(policy, [12], [1])
    batch.captured[3] = False
    assert 3 not in batch.rounds, "no round starts where there are no features"
    before = drafter.unroll(batch, embed, DEPTHS)
    assert batch.aux_hidden is not None
    batch.aux_hidden[3] = 1e3
    torch.testing.assert_close(drafter.unroll(batch, embed, DEPTHS), before)
    batch.aux_hidden[2] = 1e3
    assert not torch.allclose(drafter.unroll(batch, embed, DEPTHS)[:, 3:], before[:, 3:])


def test_gradients_are_those_of_finite_differences() -> None:
    policy = making.policy_shape(hidden_size=8, head_dim=4, num_attention_heads=2, vocab_size=11)
    drafter = tiny_drafter(policy)
    batch = tiny_batch(policy, [7, 6], [2, 1])
    embed = torch.randn(policy.vocab_size, policy.hidden_size, dtype=torch.float64)
    whole = finished(batch, DEPTHS)
    names = [name for name, _ in drafter.named_parameters() if name != "lm_head.weight"]
    values = [drafter.get_parameter(name) for name in names]
    arguments = (batch, embed, DEPTHS)

    def outputs(*weights: Tensor) -> Tensor:
        drafter.forward = drafter.unroll
        unrolled = functional_call(drafter, dict(zip(names, weights, strict=True)), arguments)
        return unrolled[:, whole]

    assert torch.autograd.gradcheck(outputs, values, fast_mode=True)


@pytest.mark.parametrize("layers", range(2, 40))
def test_default_layer_ids_are_three_and_within_the_policy(layers: int) -> None:
    ids = default_layer_ids(layers)
    assert len(set(ids)) == 3
    assert all(0 <= layer <= layers for layer in ids)
    assert list(ids) == sorted(ids)


def test_sglang_counts_aux_layers_from_one_less(tmp_path: Path) -> None:
    drafter = making.drafter(making.policy_shape())
    drafter.export_sglang(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    expected = [layer - 1 for layer in making.LAYERS]
    assert config["eagle_aux_hidden_state_layer_ids"] == expected
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == expected
    assert load_file(tmp_path / "model.safetensors").keys() >= {"fc.weight", "lm_head.weight"}
    with pytest.raises(CheckpointError, match="SGLang"):
        Eagle3Drafter.initialise(making.policy_shape(), layer_ids=(0, 1, 2)).export_sglang(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"max_position_embeddings": "2048"},
        {"rms_norm_eps": "small"},
        {"rope_parameters": {"rope_type": "yarn"}},
    ],
)
def test_a_config_transformers_cannot_use_is_named(tmp_path: Path, changes: dict[str, Any]) -> None:
    policy = making.policy_shape()
    making.drafter(policy).export(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Eagle3Drafter.load(tmp_path, policy)


def test_heads_that_do_not_divide_the_width() -> None:
    wide = making.policy_shape(hidden_size=32, num_attention_heads=12, num_key_value_heads=6)
    drafter = Eagle3Drafter.initialise(wide)
    config = drafter.config
    assert config.hidden_size % config.num_attention_heads == 0
    assert config.num_attention_heads % config.num_key_value_heads == 0
    own = Eagle3Drafter.initialise(wide, layer="qwen3").config
    assert (own.num_attention_heads, own.num_key_value_heads) == (12, 6)


@pytest.mark.parametrize(
    ("variant", "named"),
    [
        ({"norms": True}, "norms"),
        ({"layer": "gpt"}, "layer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"fc_norm": "perhaps"}, "fc_norm"),
    ],
)
def test_a_variant_that_is_none(variant: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Eagle3Drafter.initialise(making.policy_shape(), **variant)


def test_it_starts_with_what_the_policys_last_norm_multiplies_by(tmp_path: Path) -> None:
    policy = making.policy_shape()
    tensors = {
        "model.embed_tokens.weight": torch.zeros(policy.vocab_size, policy.hidden_size),
        "lm_head.weight": torch.zeros(policy.vocab_size, policy.hidden_size),
        "model.norm.weight": torch.full((policy.hidden_size,), 0.25),
    }
    making.write_tensors(tmp_path, tensors)
    assert bool((Eagle3Drafter.from_policy(tmp_path, policy).norm.weight == 0.25).all())
    policy.config.model_type = "qwen3_next"  # whose norms keep it less one
    assert bool((Eagle3Drafter.from_policy(tmp_path, policy).norm.weight == 1.25).all())


def test_longrope_of_a_part_of_a_head_is_left_out() -> None:
    factors = [1.0, 2.0]  # for half of a head's four pairs
    given = {
        "rope_type": "longrope",
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.5,
        "original_max_position_embeddings": 32,
        "short_factor": factors,
        "long_factor": factors,
    }
    policy = making.policy_shape()
    policy.config.rope_parameters = given
    assert policy.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


def test_rope_is_the_policys_but_turns_whole_heads() -> None:
    half = {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}
    config = Eagle3Drafter.initialise(making.policy_shape(rope_parameters=half)).config
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}
    assert config.max_position_embeddings == 64
