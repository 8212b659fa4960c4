"""Eagle3: training-time test against re-running the drafter token by token."""

from __future__ import annotations

import making
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import drafttrain.drafters.eagle3 as eagle3
from drafttrain.drafters.batch import Batch
from drafttrain.drafters.eagle3 import Eagle3Drafter, default_layer_ids
from drafttrain.drafters.policy import PolicyShape

DEPTHS = 3


def tiny_drafter(policy: PolicyShape, seed: int = 0) -> Eagle3Drafter:
    drafter = making.drafter(policy, seed)
    torch.manual_seed(seed)
    for parameter in drafter.parameters():  # the initial zeros would hide mistakes
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter.double()


def tiny_batch(policy: PolicyShape, lengths: list[int], seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    rows, size, hidden = len(lengths), max(lengths), policy.hidden_size
    captured = torch.arange(size) < (torch.tensor(lengths) - 1)[:, None]
    return Batch(
        tokens=torch.randint(policy.vocab_size, (rows, size), generator=generator),
        captured=captured,
        last_hidden=torch.zeros(rows, size, hidden, dtype=torch.float64),
        aux_hidden=torch.randn(rows, size, 3, hidden, generator=generator, dtype=torch.float64),
        prompt_lengths=torch.full((rows,), 2),
        lengths=torch.tensor(lengths),
        temperatures=torch.ones(rows),
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
    layer = drafter.midlayer
    attention = layer.self_attn
    features = [drafter.fc(aux[s].flatten()) for s in range(slot + 1)]
    outputs = []
    for _ in range(depths):
        inputs, rows = torch.stack(features), len(features)
        embeds = F.embedding(tokens[1 : rows + 1], embed)
        normed = layer.hidden_norm(inputs)
        x = torch.cat([layer.input_layernorm(embeds), normed], -1)[None]
        cos, sin = drafter.rotary(x, torch.arange(rows)[None])
        query, key, value = attention.project(x, cos[:, None], sin[:, None])
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        residual = normed if layer.norm_before_residual else inputs
        hidden = residual + attention.o_proj(attended.transpose(1, 2).flatten(2))[0]
        out = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        outputs.append(drafter.norm(out[-1]))
        features.append(out[-1])
    return torch.stack(outputs)


@pytest.mark.parametrize("norm_before_residual", [False, True])
@pytest.mark.parametrize("query_block", [4, 1024])
def test_unroll_equals_drafting_token_by_token(
    norm_before_residual: bool, query_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eagle3, "QUERY_BLOCK", query_block)
    policy = making.policy_shape()
    drafter = tiny_drafter(policy)
    drafter.midlayer.norm_before_residual = norm_before_residual
    lengths = [14, 9]
    batch = tiny_batch(policy, lengths)
    embed = torch.randn(policy.vocab_size, policy.hidden_size, dtype=torch.float64)
    unrolled = drafter.unroll(batch, embed, DEPTHS)
    assert batch.aux_hidden is not None
    for row, length in enumerate(lengths):
        for slot in range(length - 1 - DEPTHS):
            expected = draft_one_round(
                drafter, batch.tokens[row], batch.aux_hidden[row], embed, slot, DEPTHS
            )
            torch.testing.assert_close(unrolled[:, row, slot], expected)


def test_rollouts_of_a_batch_do_not_see_each_other() -> None:
    policy = making.policy_shape()
    drafter = tiny_drafter(policy)
    embed = torch.randn(policy.vocab_size, policy.hidden_size, dtype=torch.float64)
    both = tiny_batch(policy, [12, 8])
    assert both.aux_hidden is not None
    alone = Batch(
        **{
            name: value[1:, :8] if value.dim() > 1 else value[1:]
            for name, value in vars(both).items()
            if value is not None
        }
    )
    together = drafter.unroll(both, embed, DEPTHS)[:, 1, : 8 - 1 - DEPTHS]
    torch.testing.assert_close(
        together, drafter.unroll(alone, embed, DEPTHS)[:, 0, : 8 - 1 - DEPTHS]
    )


def test_missing_rows_are_not_attended() -> None:
    policy = making.policy_shape()
    drafter = tiny_drafter(policy)
    embed = torch.randn(policy.vocab_size, policy.hidden_size, dtype=torch.float64)
    batch = tiny_batch(policy, [12])
    batch.captured[0, 3] = False
    before = drafter.unroll(batch, embed, DEPTHS)
    assert batch.aux_hidden is not None
    batch.aux_hidden[0, 3] = 1e3
    after = drafter.unroll(batch, embed, DEPTHS)
    torch.testing.assert_close(after[:, :, 4:], before[:, :, 4:])
    assert not torch.allclose(after[:, :, 3], before[:, :, 3])


@pytest.mark.parametrize("layers", range(2, 40))
def test_default_layer_ids_are_three_and_within_the_policy(layers: int) -> None:
    ids = default_layer_ids(layers)
    assert len(set(ids)) == 3
    assert all(0 <= layer <= layers for layer in ids)
    assert list(ids) == sorted(ids)
