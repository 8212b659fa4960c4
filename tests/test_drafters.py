"""The contract every kind of drafter keeps, over the kinds there are."""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import replace
from pathlib import Path

import making
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from drafttrain.checkpoints.manifest import TargetFingerprint
from drafttrain.checkpoints.registry import Registry
from drafttrain.checkpoints.verify import verify
from drafttrain.config import TrainingConfig
from drafttrain.control.acceptance import estimate_acceptance
from drafttrain.drafters import KINDS, Drafter, load_drafter
from drafttrain.drafters.batch import Batch, make_batch
from drafttrain.drafters.policy import read_policy_head
from drafttrain.errors import CheckpointError
from drafttrain.publishing import UNTRAINED, publish_drafter
from drafttrain.rollouts.record import PolicyHead, Rollout
from drafttrain.training.trainer import Trainer

POLICY = making.policy_shape()
LAYOUT = making.layout(POLICY)
TARGET = TargetFingerprint.from_config(POLICY.config.to_dict())
OPTIONS = {"eagle3": {"layer_ids": making.LAYERS}, "mtp": {}, "draft_model": {"layers": 2}}
DEPTHS = 3
kinds = pytest.mark.parametrize("kind", KINDS)


def new_drafter(kind: str, seed: int = 0) -> Drafter:
    torch.manual_seed(seed)
    return KINDS[kind].initialise(POLICY, **OPTIONS[kind])


def random_drafter(kind: str) -> Drafter:
    """Without the zeros that a new one has, which would hide mistakes."""
    drafter = new_drafter(kind)
    torch.manual_seed(1)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter


def batch_of(rollouts: list[Rollout]) -> tuple[Batch, PolicyHead]:
    head = making.policy_head(POLICY)
    return make_batch(rollouts, LAYOUT, head), head


def draft(drafter: Drafter, rollouts: list[Rollout], depths: int = DEPTHS) -> Tensor:
    """[depths, R, H_drafter]."""
    batch, head = batch_of(rollouts)
    with torch.no_grad():
        return drafter.unroll(batch, head.embed_tokens, depths)


def whole_rounds(rollouts: list[Rollout]) -> Tensor:
    """bool [R]: rounds whose drafts all lie inside their rollout."""
    batch, _ = batch_of(rollouts)
    left = batch.lengths[batch.rollout_of] - batch.positions
    return (left > DEPTHS + 1)[batch.rounds]


@kinds
def test_export_and_load_keep_every_bit(kind: str, tmp_path: Path) -> None:
    drafter = random_drafter(kind)
    drafter.export(tmp_path, torch.float32)
    loaded = load_drafter(tmp_path, POLICY)
    assert loaded.kind == kind
    assert loaded.layer_ids == drafter.layer_ids
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    rollouts = making.rollouts(POLICY, 2)
    assert torch.equal(draft(drafter, rollouts), draft(loaded, rollouts))


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exports_are_sound(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    new_drafter(kind).export(tmp_path, dtype)
    verified = verify(tmp_path, TARGET)
    assert {tensor.dtype for tensor in verified.tensors.values()} == {dtype}
    assert "embed_tokens.weight" not in verified.tensors, "the policy's embedding is not ours"


@kinds
def test_versions_of_a_registry_are_what_was_published(kind: str, tmp_path: Path) -> None:
    registry, drafter = Registry(tmp_path), random_drafter(kind)
    manifest = publish_drafter(
        registry, drafter, TARGET, parent=None, lineage=UNTRAINED, acceptance=None
    )
    assert manifest.kind == kind
    assert manifest.layer_ids == list(drafter.layer_ids)
    published = load_drafter(registry.folder(manifest.version), POLICY)
    rollouts = making.rollouts(POLICY, 2)
    assert torch.equal(draft(drafter, rollouts), draft(published, rollouts))


@kinds
def test_unroll_has_the_contracts_shape(kind: str) -> None:
    drafter, rollouts = new_drafter(kind), making.rollouts(POLICY, 3)
    batch, head = batch_of(rollouts)
    hidden = drafter.unroll(batch, head.embed_tokens, 2)
    # A rollout's first round starts at its prompt's end, its last drafts the last token.
    assert hidden.shape[:2] == (2, sum(rollout.completion_length - 1 for rollout in rollouts))
    logits = hidden @ drafter.head_weight(head.lm_head).T
    assert logits.shape[-1] == POLICY.vocab_size


@kinds
def test_a_deeper_draft_begins_like_a_shallower_one(kind: str) -> None:
    drafter, rollouts = random_drafter(kind), making.rollouts(POLICY, 2)
    torch.testing.assert_close(draft(drafter, rollouts, 4)[:2], draft(drafter, rollouts, 2))


@kinds
def test_a_round_sees_nothing_of_what_comes_after_it(kind: str) -> None:
    """Nor of the policy's features past its slot: only the tokens that it drafted itself."""
    drafter, rollout = random_drafter(kind), making.rollouts(POLICY, 1)[0]
    slot = 7
    changed = dataclasses.replace(
        rollout,
        tokens=rollout.tokens.clone(),
        last_hidden=rollout.last_hidden.clone(),
        aux_hidden=rollout.aux_hidden.clone(),
    )
    # Depth j embeds tokens up to slot + 1 + j.
    changed.tokens[slot + 1 + DEPTHS :] = 0
    changed.last_hidden[slot + 1 :] = 9.0
    changed.aux_hidden[slot + 1 :] = 9.0
    round_at = slot - (rollout.prompt_length - 1)
    before, after = draft(drafter, [rollout]), draft(drafter, [changed])
    torch.testing.assert_close(after[:, : round_at + 1], before[:, : round_at + 1])
    assert not torch.allclose(after[:, -1], before[:, -1])


@kinds
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_rollouts_of_a_batch_do_not_see_each_other(kind: str, data: st.DataObject) -> None:
    drafter = random_drafter(kind)
    several = making.rollouts(POLICY, 5, seed=3)
    chosen = data.draw(st.lists(st.sampled_from(several), min_size=2, max_size=6))
    together, at = draft(drafter, chosen), 0
    for rollout in chosen:
        alone, whole = draft(drafter, [rollout]), whole_rounds([rollout])
        mine = together[:, at : at + alone.shape[1]]
        torch.testing.assert_close(mine[:, whole], alone[:, whole], rtol=1e-4, atol=1e-5)
        at += alone.shape[1]


@kinds
def test_training_raises_acceptance(kind: str) -> None:
    config = TrainingConfig(draft_tokens=3, learning_rate=5e-3)
    drafter, held_out = new_drafter(kind), making.rollouts(POLICY, 24, seed=999)
    heads = {0: making.policy_head(POLICY)}
    before = estimate_acceptance(drafter, held_out, LAYOUT, heads, k=3).acceptance_length
    trainer = Trainer(drafter, config)
    for seed in range(40):
        trainer.step(making.rollouts(POLICY, 6, seed=seed), LAYOUT, heads)
    after = estimate_acceptance(drafter, held_out, LAYOUT, heads, k=3).acceptance_length
    assert after > before + 0.3


@kinds
def test_completions_of_one_token_have_nothing_to_train_on(kind: str) -> None:
    rollouts = [replace(r, prompt_length=r.length - 1) for r in making.rollouts(POLICY, 3)]
    trainer = Trainer(new_drafter(kind), TrainingConfig(draft_tokens=3))
    report = trainer.step(rollouts, LAYOUT, {0: making.policy_head(POLICY)})
    assert (report.loss, report.acceptance, report.grad_norm) == (0.0, [0.0] * 3, 0.0)


@kinds
def test_bfloat16_gives_about_the_same_step(kind: str) -> None:
    rollouts, heads = making.rollouts(POLICY, 4), {0: making.policy_head(POLICY)}
    exact, rounded = (
        Trainer(new_drafter(kind), TrainingConfig(draft_tokens=2, precision=precision)).step(
            rollouts, LAYOUT, heads
        )
        for precision in ("float32", "bfloat16")
    )
    assert rounded.loss == pytest.approx(exact.loss, rel=0.02)
    assert rounded.grad_norm == pytest.approx(exact.grad_norm, rel=0.1)


@kinds
def test_resume_is_exact(kind: str, tmp_path: Path) -> None:
    config = TrainingConfig(draft_tokens=2, lora_rank=2 if kind == "draft_model" else None)
    heads = {0: making.policy_head(POLICY)}

    def steps(trainer: Trainer, first_seed: int) -> list[float]:
        seeds = range(first_seed, first_seed + 2)
        batches = [making.rollouts(POLICY, 4, seed=seed) for seed in seeds]
        return [trainer.step(rollouts, LAYOUT, heads).loss for rollouts in batches]

    straight = Trainer(new_drafter(kind), config)
    steps(straight, 0)
    straight.save(tmp_path)
    expected = steps(straight, 2)
    resumed = Trainer(new_drafter(kind, seed=7), config)
    resumed.restore(tmp_path)
    assert steps(resumed, 2) == expected
    for name, tensor in straight.average.state_dict().items():
        assert torch.equal(tensor, resumed.average.state_dict()[name]), name


@kinds
def test_a_frozen_head_stays_as_it_is(kind: str) -> None:
    drafter = new_drafter(kind)
    head = making.policy_head(POLICY)
    before = drafter.head_weight(head.lm_head).detach().clone()
    trainer = Trainer(drafter, TrainingConfig(draft_tokens=2, train_head=False, weight_decay=0.1))
    trainer.step(making.rollouts(POLICY, 4), LAYOUT, {0: head})
    assert torch.equal(drafter.head_weight(head.lm_head), before)


@kinds
@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"vocab_size": 29}, "vocab_size"),
        ({"hidden_size": 64}, "hidden_size"),
        ({"num_hidden_layers": 2}, "layer_ids"),
    ],
)
def test_a_drafter_of_another_policy_is_refused(
    kind: str, change: dict[str, int], field: str, tmp_path: Path
) -> None:
    reads_it = {"eagle3": True, "mtp": field != "layer_ids", "draft_model": field == "vocab_size"}
    new_drafter(kind).export(tmp_path, torch.float32)
    if not reads_it[kind]:
        load_drafter(tmp_path, making.policy_shape(**change))
        return
    with pytest.raises(CheckpointError) as refusal:
        load_drafter(tmp_path, making.policy_shape(**change))
    assert field in str(refusal.value)


@kinds
def test_a_missing_tensor_is_refused(kind: str, tmp_path: Path) -> None:
    drafter = new_drafter(kind)
    drafter.export(tmp_path, torch.float32)
    tensors = dict(verify(tmp_path).tensors)
    lost = next(name for name in tensors if "down_proj" in name)
    kept = {name: tensor.clone() for name, tensor in tensors.items() if name != lost}
    making.write_tensors(tmp_path, kept)
    with pytest.raises(CheckpointError, match="down_proj"):
        load_drafter(tmp_path, POLICY)


@kinds
def test_one_can_be_made_from_a_policys_folder(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(copy.deepcopy(POLICY.config)).save_pretrained(tmp_path)
    drafter = KINDS[kind].from_policy(tmp_path, POLICY, **OPTIONS[kind])
    assert draft(drafter, making.rollouts(POLICY, 2)).isfinite().all()


def test_what_is_no_drafter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_drafter(tmp_path, POLICY)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    with pytest.raises(CheckpointError, match="architectures"):
        load_drafter(tmp_path, POLICY)


@pytest.mark.parametrize(
    ("trunk", "head"),
    [
        ("model.", ""),
        ("model.language_model.", ""),
        ("language_model.model.", "language_model."),
    ],
)
def test_the_policys_head_is_found_under_any_prefix(trunk: str, head: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(POLICY.config.to_dict()))
    table = (POLICY.vocab_size, POLICY.hidden_size)
    tensors = {f"{trunk}embed_tokens.weight": torch.randn(table)}
    tensors[f"{trunk}norm.weight"] = torch.randn(POLICY.hidden_size)
    tensors[f"{head}lm_head.weight"] = torch.randn(table)
    others = {f"{trunk}layers.4.embed_tokens.weight", "model.visual.embed_tokens.weight"}
    making.write_tensors(tmp_path, tensors | {name: torch.zeros(3, 2) for name in others})
    found = read_policy_head(tmp_path, POLICY)
    assert found.final_norm is not None
    assert torch.equal(found.embed_tokens, tensors[f"{trunk}embed_tokens.weight"])
    assert torch.equal(found.final_norm, tensors[f"{trunk}norm.weight"])
    assert torch.equal(found.lm_head, tensors[f"{head}lm_head.weight"])


@pytest.mark.parametrize("names", [(), ("a.embed_tokens.weight", "b.embed_tokens.weight")])
def test_a_policy_has_one_embedding(names: tuple[str, ...], tmp_path: Path) -> None:
    making.write_tensors(tmp_path, {name: torch.zeros(2) for name in ("model.norm.weight", *names)})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: .*expected one"):
        read_policy_head(tmp_path, POLICY)
