"""Eagle3 drafters to and from the layout of the ``speculators`` library, which takes part."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import making
import pytest
import torch
from safetensors.torch import load_file
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig
from torch import Tensor
from transformers import Qwen3ForCausalLM

from drafttrain.checkpoints.manifest import TargetFingerprint
from drafttrain.checkpoints.verify import verify
from drafttrain.drafters import Eagle3Drafter, PolicyShape, load_drafter
from drafttrain.drafters.batch import Batch, make_batch
from drafttrain.rollouts.record import PolicyHead

DEPTHS = 3
DRAFT_IDS = torch.tensor([0, 2, 3, 7, 11, 12, 20])
VARIANTS: list[dict[str, Any]] = [
    {},
    {"draft_ids": DRAFT_IDS, "norm_before_residual": True},
    {"layer": "qwen3", "norm_output": True},
    {"num_hidden_layers": 2, "fc_norm": True},
    {"norm_before_fc": True, "attention_bias": True},
]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(v) or "plain")


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    Qwen3ForCausalLM(making.policy_shape().config).save_pretrained(folder)
    return folder


def random_drafter(policy: PolicyShape, variant: dict[str, Any]) -> Eagle3Drafter:
    torch.manual_seed(0)
    drafter = Eagle3Drafter.initialise(policy, layer_ids=making.LAYERS, **variant)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter


def one_rollout(policy: PolicyShape) -> tuple[Batch, PolicyHead]:
    head = making.policy_head(policy)
    return make_batch(making.rollouts(policy, 1), making.layout(policy), head), head


def logits_of(drafter: Eagle3Drafter, batch: Batch, embed_tokens: Tensor) -> Tensor:
    """[DEPTHS, R, Vd]."""
    with torch.no_grad():
        hidden = drafter.unroll(batch, embed_tokens, DEPTHS)
        return hidden @ drafter.head_weight(torch.empty(0)).T


def speculators_logits(model: Eagle3DraftModel, batch: Batch) -> list[Tensor]:
    """Of each training-time-test step, at every slot: [1, T-1, Vd]."""
    seen: list[Tensor] = []
    hook = model.lm_head.register_forward_hook(lambda *call: seen.append(call[-1]))
    with torch.no_grad():
        model(
            hidden_states=batch.aux_hidden[:-1].flatten(1)[None],
            input_ids=batch.tokens[None, 1:],
            document_ids=torch.zeros(1, len(batch.tokens) - 1, dtype=torch.long),
            ttt_steps=DEPTHS,
        )
    hook.remove()
    return seen


def open_speculators(folder: Path) -> Eagle3DraftModel:
    config = Eagle3SpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"  # flex needs an accelerator
    model = Eagle3DraftModel.from_pretrained(folder, config=config, dtype=torch.float32)
    return model.eval()


@variants
def test_speculators_computes_what_we_compute(
    variant: dict[str, Any], policy_folder: Path, tmp_path: Path
) -> None:
    policy = PolicyShape.from_folder(policy_folder)
    drafter = random_drafter(policy, variant)
    drafter.export_speculators(tmp_path / "out", policy_folder, k=DEPTHS)
    model = open_speculators(tmp_path / "out")
    batch, head = one_rollout(policy)
    model.embed_tokens.weight.data.copy_(head.embed_tokens)
    ours = logits_of(drafter, batch, head.embed_tokens)
    for depth, theirs in enumerate(speculators_logits(model, batch)):
        whole = batch.rounds < len(batch.tokens) - 2 - depth
        torch.testing.assert_close(
            ours[depth, whole], theirs[0, batch.rounds[whole]], rtol=1e-4, atol=1e-4
        )


@variants
def test_every_layout_holds_the_same_bits(
    variant: dict[str, Any], policy_folder: Path, tmp_path: Path
) -> None:
    policy = PolicyShape.from_folder(policy_folder)
    drafter = random_drafter(policy, variant)
    drafter.export(tmp_path / "raw")
    first = load_drafter(tmp_path / "raw", policy)
    assert isinstance(first, Eagle3Drafter)
    first.export_speculators(tmp_path / "speculators", policy_folder, k=2)
    second = load_drafter(tmp_path / "speculators", policy)
    second.export(tmp_path / "again", torch.float32)
    expected, found = (
        load_file(tmp_path / name / "model.safetensors") for name in ("raw", "again")
    )
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    configs = [verify(tmp_path / name).config for name in ("raw", "speculators", "again")]
    for key in ("architectures", "norm_output", "draft_vocab_size", "fc_norm", "head_dim"):
        assert configs[0][key] == configs[2][key], key
    assert configs[1]["norm_before_residual"] is bool(variant.get("norm_before_residual"))


def test_a_draft_vocabulary_has_what_sglang_needs(policy_folder: Path, tmp_path: Path) -> None:
    policy = PolicyShape.from_folder(policy_folder)
    random_drafter(policy, {"draft_ids": DRAFT_IDS}).export(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert tensors["t2d"].nonzero()[:, 0].tolist() == DRAFT_IDS.tolist()
    assert (tensors["d2t"] + torch.arange(len(DRAFT_IDS))).tolist() == DRAFT_IDS.tolist()


def test_one_that_speculators_made_drafts_the_same_here(
    policy_folder: Path, tmp_path: Path
) -> None:
    policy = PolicyShape.from_folder(policy_folder)
    model = new_speculator(policy, policy_folder)
    train_one_step(model, policy)
    model.save_pretrained(tmp_path)
    verified = verify(tmp_path, TargetFingerprint.from_folder(policy_folder))
    assert verified.config["norm_before_residual"] is True
    drafter = load_drafter(tmp_path, policy)
    assert isinstance(drafter, Eagle3Drafter)
    batch, _ = one_rollout(policy)
    ours = logits_of(drafter, batch, model.embed_tokens.weight)
    for depth, theirs in enumerate(speculators_logits(model, batch)):
        whole = batch.rounds < len(batch.tokens) - 2 - depth
        torch.testing.assert_close(
            ours[depth, whole], theirs[0, batch.rounds[whole]], rtol=1e-4, atol=1e-4
        )


def test_its_window_is_kept_by_every_layout(policy_folder: Path, tmp_path: Path) -> None:
    policy = PolicyShape.from_folder(policy_folder)
    sliding = {"layer_types": ["sliding_attention"], "sliding_window": 4}
    model = new_speculator(policy, policy_folder, use_sliding_window=True, **sliding)
    model.save_pretrained(tmp_path / "made")
    drafter = load_drafter(tmp_path / "made", policy)
    drafter.export(tmp_path / "raw")
    again = load_drafter(tmp_path / "raw", policy)
    again.export_speculators(tmp_path / "speculators", policy_folder, k=2)
    batch, _ = one_rollout(policy)
    # At the first depth alone: in its training a window stays where the round began.
    theirs = speculators_logits(model, batch)[0][0, batch.rounds]
    for name in ("made", "raw", "speculators"):
        drafter = load_drafter(tmp_path / name, policy)
        ours = logits_of(drafter, batch, model.embed_tokens.weight)[0]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    config = open_speculators(tmp_path / "speculators").config.transformer_layer_config
    assert {key: getattr(config, key) for key in sliding} == sliding


def new_speculator(policy: PolicyShape, folder: Path, **layer: Any) -> Eagle3DraftModel:
    """Of one layer with a draft vocabulary; `layer` are keys of the layer's configuration."""
    t2d = torch.zeros(policy.vocab_size, dtype=torch.bool)
    t2d[DRAFT_IDS] = True
    torch.manual_seed(0)
    layer_config = copy.deepcopy(policy.config)
    layer_config.num_hidden_layers, layer_config.layer_types = 1, ["full_attention"]
    layer_config.update(layer)
    return Eagle3DraftModel.from_training_args(
        layer_config,
        t2d=t2d,
        d2t=DRAFT_IDS - torch.arange(len(DRAFT_IDS)),
        draft_vocab_size=len(DRAFT_IDS),
        norm_before_residual=True,
        target_layer_ids=list(making.LAYERS),
        verifier_name_or_path=str(folder),
        ttt_steps=DEPTHS,
        draft_attn_impl="eager",
    )


def train_one_step(model: Eagle3DraftModel, policy: PolicyShape) -> None:
    """With its own loss, so that what is saved is what it trained."""
    batch, _ = one_rollout(policy)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    before = model.fc.weight.detach().clone()
    _, loss, _ = model(
        hidden_states=batch.aux_hidden[:-1].flatten(1)[None],
        input_ids=batch.tokens[None, 1:],
        document_ids=torch.zeros(1, len(batch.tokens) - 1, dtype=torch.long),
        loss_mask=torch.ones(1, len(batch.tokens) - 1, dtype=torch.bool),
        verifier_last_hidden_states=batch.last_hidden[None, 1:],
        **model.get_trainer_kwargs(
            loss_fn="ce", loss_implementation="eager", ttt_steps=DEPTHS, ttt_step_loss_decay=1.0
        )[0],
    )
    loss.backward()
    optimizer.step()
    assert not torch.equal(before, model.fc.weight)


def test_a_length_copied_from_elsewhere_is_not_kept(policy_folder: Path, tmp_path: Path) -> None:
    policy = PolicyShape.from_folder(policy_folder)
    random_drafter(policy, {}).export(tmp_path / "short")
    config = tmp_path / "short" / "config.json"
    config.write_text(
        config.read_text().replace('"max_position_embeddings": 64', '"max_position_embeddings": 16')
    )
    load_drafter(tmp_path / "short", policy).export(tmp_path / "out", torch.float32)
    assert verify(tmp_path / "out").config["max_position_embeddings"] == 64
