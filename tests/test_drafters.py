"""The contract every kind of drafter keeps, over the kinds there are."""

from __future__ import annotations

import json
from pathlib import Path

import making
import pytest
import torch

from drafttrain.checkpoints.manifest import TargetFingerprint
from drafttrain.checkpoints.verify import verify
from drafttrain.drafters import KINDS, load_drafter
from drafttrain.drafters.batch import make_batch
from drafttrain.errors import CheckpointError

POLICY = making.policy_shape()
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_export_and_load_keep_every_bit(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    drafter = KINDS[kind].initialise(POLICY)
    drafter.export(tmp_path, torch.float32)
    loaded = load_drafter(tmp_path, POLICY)
    assert loaded.kind == kind
    assert loaded.layer_ids == drafter.layer_ids
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exports_are_sound(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    KINDS[kind].initialise(POLICY).export(tmp_path, dtype)
    verified = verify(tmp_path, TargetFingerprint.from_config(POLICY.config.to_dict()))
    assert {tensor.dtype for tensor in verified.tensors.values()} == {dtype}
    assert "embed_tokens.weight" not in verified.tensors, "the policy's embedding is not ours"


@kinds
def test_unroll_has_the_contracts_shape(kind: str) -> None:
    drafter = KINDS[kind].initialise(POLICY, layer_ids=making.LAYERS)
    rollouts = making.rollouts(POLICY, 3)
    head = making.policy_head(POLICY)
    batch = make_batch(rollouts, making.layout(POLICY), head)
    hidden = drafter.unroll(batch, head.embed_tokens, 2)
    # A rollout's first round starts at its prompt's end, its last drafts the last token.
    rounds = sum(rollout.completion_length - 1 for rollout in rollouts)
    assert hidden.shape[:2] == (2, rounds)
    logits = hidden @ drafter.head_weight(head.lm_head).T
    assert logits.shape[-1] == POLICY.vocab_size


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"vocab_size": 29}, "vocab_size"),
        ({"hidden_size": 64}, "hidden_size"),
        ({"num_hidden_layers": 2}, "layer_ids"),
    ],
)
def test_a_drafter_of_another_policy_is_refused(
    change: dict[str, int], field: str, tmp_path: Path
) -> None:
    making.drafter(POLICY).export(tmp_path, torch.float32)
    with pytest.raises(CheckpointError) as refusal:
        load_drafter(tmp_path, making.policy_shape(**change))
    assert field in str(refusal.value)


def test_what_is_no_drafter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config.json"):
        load_drafter(tmp_path, POLICY)
