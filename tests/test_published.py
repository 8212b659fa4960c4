"""Eagle3 drafters in the forms in which others publish them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import making
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3ForCausalLM

from drafttrain.checkpoints.registry import Registry
from drafttrain.checkpoints.verify import verify
from drafttrain.drafters import Eagle3Drafter, PolicyShape, load_drafter
from drafttrain.errors import CheckpointError
from drafttrain.publishing import publish_folder

IDS = "eagle_aux_hidden_state_layer_ids"
Edit = Callable[[dict[str, Any], dict[str, Tensor]], None]


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    Qwen3ForCausalLM(making.policy_shape().config).save_pretrained(tmp_path / "policy")
    return tmp_path / "policy"


def published(folder: Path, edit: Edit) -> Path:
    """A drafter for the policy, in bfloat16, then edited."""
    making.drafter(making.policy_shape()).export(folder, torch.bfloat16)
    config = json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    edit(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def named(architecture: str) -> Edit:
    return lambda config, _: config.update(architectures=[architecture])


def no_ids(value: list[int] | None) -> Edit:
    """Named in the inner object alone."""

    def edit(config: dict[str, Any], _: dict[str, Tensor]) -> None:
        config["eagle_config"] = {IDS: config[IDS]}
        config[IDS] = value

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        named("LlamaForCausalLM"),
        named("Eagle3LlamaForCausalLM"),
        named("Eagle3MiniMaxM2ForCausalLM"),
        no_ids([]),
        no_ids(None),
    ],
)
def test_other_names_for_the_same_are_read(policy: Path, tmp_path: Path, edit: Edit) -> None:
    shape = PolicyShape.from_folder(policy)
    expected = load_drafter(published(tmp_path / "plain", lambda *_: None), shape)
    found = load_drafter(published(tmp_path / "other", edit), shape)
    assert isinstance(found, Eagle3Drafter)
    assert found.config.to_dict() | {"eagle_config": None} == (
        expected.config.to_dict() | {"eagle_config": None}
    )
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_a_name_that_is_only_the_layers_may_be_qwen3s(tmp_path: Path) -> None:
    policy = making.policy_shape()
    drafter = Eagle3Drafter.initialise(policy, layer="qwen3")
    drafter.export(tmp_path, torch.float32)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("Eagle3Qwen3ForCausalLM", "Qwen3ForCausalLM"))
    assert isinstance(load_drafter(tmp_path, policy), Eagle3Drafter)


def test_weights_in_several_files_are_read(policy: Path, tmp_path: Path) -> None:
    folder = published(tmp_path / "divided", lambda *_: None)
    whole = folder / "model.safetensors"
    tensors = load_file(whole)
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[:4]}, folder / "a.safetensors")
    save_file({name: tensors[name] for name in names[4:]}, folder / "b.safetensors")
    whole.unlink()
    assert verify(folder).tensors.keys() == tensors.keys()
    load_drafter(folder, PolicyShape.from_folder(policy))
    save_file({names[0]: tensors[names[0]]}, folder / "c.safetensors")
    with pytest.raises(CheckpointError, match=r"c\.safetensors: .*in another file"):
        verify(folder)


def test_a_pickle_is_named_and_not_read(tmp_path: Path) -> None:
    folder = published(tmp_path, lambda *_: None)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        verify(folder)


def test_a_missing_head_is_the_policys(policy: Path, tmp_path: Path) -> None:
    folder = published(tmp_path / "headless", lambda _, tensors: drop(tensors, "lm_head.weight"))
    drafter = load_drafter(folder, PolicyShape.from_folder(policy))
    assert isinstance(drafter, Eagle3Drafter)
    head = load_file(policy / "model.safetensors")["lm_head.weight"]
    assert torch.equal(drafter.lm_head.weight, head.float())
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: missing"):
        load_drafter(folder, making.policy_shape())


@pytest.mark.parametrize("marks", [torch.uint8, torch.int32, torch.int64])
def test_a_draft_vocabulary_in_other_integers_is_written_as_ours(
    policy: Path, tmp_path: Path, marks: torch.dtype
) -> None:
    """The engine widens ``d2t`` and passes ``t2d`` over."""
    ids = torch.tensor([1, 4, 5, 11])

    def narrow(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        config["draft_vocab_size"] = len(ids)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][ids]
        tensors["d2t"] = (ids - torch.arange(len(ids))).int()
        tensors["t2d"] = torch.zeros(config["vocab_size"], dtype=marks).index_fill(0, ids, 1)

    registry = Registry(tmp_path / "registry")
    publish_folder(published(tmp_path / "narrow", narrow), policy, registry)
    written = verify(registry.folder(1)).tensors
    assert (written["d2t"].dtype, written["t2d"].dtype) == (torch.int64, torch.bool)
    assert (written["d2t"] + torch.arange(len(ids))).tolist() == ids.tolist()
    assert written["t2d"].nonzero()[:, 0].tolist() == ids.tolist()


def drop(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


@pytest.mark.parametrize("copied", [True, False])
def test_an_embedding_that_is_no_copy_is_kept(policy: Path, tmp_path: Path, copied: bool) -> None:
    name = "embed_tokens.weight"
    embedding = load_file(policy / "model.safetensors")[f"model.{name}"].bfloat16()
    given = embedding if copied else embedding + 1
    folder = published(tmp_path / "own", lambda _, tensors: tensors.update({name: given}))
    registry = Registry(tmp_path / "registry")
    publish_folder(folder, policy, registry)
    written = verify(registry.folder(1)).tensors
    assert (name in written) is not copied
    if not copied:
        assert torch.equal(written[name], given)


def test_what_is_published_has_one_form_and_the_same_bits(policy: Path, tmp_path: Path) -> None:
    """An engine that swaps knows no other, and one of its runners reads no inner layer ids."""
    folder = published(tmp_path / "inner", no_ids(None))
    registry = Registry(tmp_path / "registry")
    publish_folder(folder, policy, registry)
    config = json.loads((registry.folder(1) / "config.json").read_text())
    assert config[IDS] == config["eagle_config"][IDS]
    before, after = verify(folder).tensors, verify(registry.folder(1)).tensors
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"architectures": ["Eagle3DeepseekV2ForCausalLM"]}, "architectures"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"bias": True}, "bias"),
        ({"is_causal": False}, "is_causal"),
    ],
)
def test_what_would_draft_otherwise_in_the_engine_is_refused(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    folder = published(tmp_path, lambda config, _: config.update(changes))
    with pytest.raises(CheckpointError, match=rf"config\.json: {field}: .*expected"):
        load_drafter(folder, making.policy_shape())


def test_yarn_stretches_the_length_it_had(tmp_path: Path) -> None:
    """Not the policy's, which the drafter gets."""
    policy = making.policy_shape()
    assert policy.max_length is not None
    own = policy.max_length // 4
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    changes = {"max_position_embeddings": own, "rope_parameters": rope}
    folder = published(tmp_path, lambda config, _: config.update(changes))
    drafter = load_drafter(folder, policy)
    assert isinstance(drafter, Eagle3Drafter)
    assert drafter.config.max_position_embeddings == policy.max_length
    assert drafter.config.rope_parameters["original_max_position_embeddings"] == own


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_mrope_turns_text_as_plain_rope(tmp_path: Path, key: str) -> None:
    """The engine calls it so, and keeps the sections, which are for pictures."""
    policy = making.policy_shape()
    plain = {"rope_type": "default", "rope_theta": 5e5}
    mrope = {key: "mrope", "mrope_section": [2, 3, 3]}

    def turning(name: str, rope: dict[str, Any]) -> Eagle3Drafter:
        changes = {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": rope}
        folder = published(tmp_path / name, lambda config, _: config.update(changes))
        drafter = load_drafter(folder, policy)
        assert isinstance(drafter, Eagle3Drafter)
        return drafter

    found, expected = turning("mrope", mrope), turning("plain", plain)
    turns = [drafter._rotations(20, torch.float32) for drafter in (found, expected)]
    assert torch.equal(*turns)
    assert found.config.rope_parameters == plain | {"mrope_section": [2, 3, 3]}
    with pytest.raises(CheckpointError, match=r"rope_scaling\.mrope_section: missing"):
        turning("refused", {key: "mrope"})
