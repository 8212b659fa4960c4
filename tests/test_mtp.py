"""MTP heads of every family: training-time test token by token, and their way in and out."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import making
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafttrain.checkpoints.manifest import TargetFingerprint
from drafttrain.checkpoints.mtp_format import FAMILIES, family_of
from drafttrain.checkpoints.verify import verify
from drafttrain.drafters import MTPDrafter, PolicyShape, load_drafter
from drafttrain.drafters.batch import Batch, make_batch
from drafttrain.drafters.experts import fuse_experts
from drafttrain.drafters.policy import read_policy_head, read_tensors, weight_files
from drafttrain.errors import CheckpointError, RolloutError
from drafttrain.rollouts.record import PolicyHead

DEPTHS = 3
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 23,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
DENSE = {"intermediate_size": 48, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 24, "num_experts_per_tok": 2}
QWEN_EXPERTS = EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 24, "head_dim": 8}
DEEPSEEK_EXPERTS = EXPERTS | {
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "intermediate_size": 48,
}
LATENT = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "qk_nope_head_dim": 8}
LATENT |= {"q_lora_rank": 24, "num_key_value_heads": 4}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mimo": ("Qwen2Config", DENSE),
    "qwen3_next": ("Qwen3NextConfig", QWEN_EXPERTS | {"intermediate_size": 48}),
    "qwen3_5": ("Qwen3_5TextConfig", DENSE),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", QWEN_EXPERTS),
    "deepseek_v3": ("DeepseekV3Config", DEEPSEEK_EXPERTS | LATENT),
    "glm4_moe": ("Glm4MoeConfig", DEEPSEEK_EXPERTS | {"use_qk_norm": True, "head_dim": 8}),
}
families = pytest.mark.parametrize("family", CONFIGS)


def policy_of(family: str, **changes: int) -> PolicyShape:
    name, sizes = CONFIGS[family]
    config = getattr(transformers, name)(**SIZES | sizes | changes)
    config.architectures = [FAMILIES[family].architecture]
    setattr(config, FAMILIES[family].count_key, 1)
    return PolicyShape(config)


def random_head(policy: PolicyShape, seed: int = 0) -> MTPDrafter:
    torch.manual_seed(seed)
    drafter = MTPDrafter.initialise(policy)
    for parameter in drafter.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return drafter


def batch_for(drafter: MTPDrafter, policy: PolicyShape, count: int = 2) -> tuple[Batch, PolicyHead]:
    head = making.policy_head(policy)
    layout = dataclasses.replace(
        making.layout(policy), last_hidden_normed=drafter.reads_normed, layer_ids=()
    )
    return make_batch(making.rollouts(policy, count), layout, head), head


def write_policy(folder: Path, policy: PolicyShape, head: MTPDrafter | None) -> Path:
    """As a policy ships it: trunk and head in one checkpoint. The trunk here is only its ends."""
    folder.mkdir()
    config = policy.config.to_dict()
    (folder / "config.json").write_text(json.dumps(config))
    table = (policy.vocab_size, policy.hidden_size)
    trunk = {"model.embed_tokens.weight": torch.randn(table), "lm_head.weight": torch.randn(table)}
    trunk["model.norm.weight"] = torch.ones(policy.hidden_size)
    tensors = trunk | ({} if head is None else head.head_tensors())
    save_file(
        {name: t.detach().contiguous().clone() for name, t in tensors.items()},
        folder / "model.safetensors",
    )
    return folder


def rename(folder: Path, old: str, new: str) -> None:
    """Let the policy's tensors that start with `old` start with `new`."""
    tensors = {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor.clone()
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    making.write_tensors(folder, tensors)


def write_multimodal(folder: Path, head: MTPDrafter | None) -> Path:
    """A Qwen3.5 as it is released: the language model is a part with its own configuration."""
    policy = policy_of("qwen3_5")
    write_policy(folder, policy, head)
    rename(folder, "model.", "model.language_model.")
    text = policy.config.to_dict()
    del text["architectures"], text["mtp_num_hidden_layers"]
    config = transformers.Qwen3_5Config(text_config=text, tie_word_embeddings=False).to_dict()
    config["architectures"] = ["Qwen3_5ForConditionalGeneration"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def draft_one_round(
    drafter: MTPDrafter, tokens: Tensor, states: Tensor, embed: Tensor, slot: int
) -> Tensor:
    """What a round that starts at `slot` drafts, the whole prefix run again at every depth.

    Args:
        tokens: [T]; states: [T, H], of one rollout, as the engine hands them over.

    Returns:
        [DEPTHS, H].
    """
    family = drafter.family
    known, outputs = list(states[: slot + 1]), []
    for _ in range(DEPTHS):
        rows = len(known)
        embeds = torch.nn.functional.embedding(tokens[1 : rows + 1], embed)
        if family.zero_first:
            embeds = embeds * (torch.arange(rows) > 0)[:, None]
        parts = [drafter.embed_norm(embeds), drafter.hidden_norm(torch.stack(known))]
        x = drafter.project(torch.cat(parts if family.embed_first else parts[::-1], -1))
        hidden = run_layer(drafter, x)[-1]
        outputs.append(drafter.out_norm(hidden))
        known.append(outputs[-1] if family.feeds_normed else hidden)
    return torch.stack(outputs)


def run_layer(drafter: MTPDrafter, x: Tensor) -> Tensor:
    """[N, H]: the decoder layer over one rollout's first N positions, with its plain attention."""
    layer = copy.deepcopy(drafter.layer)
    layer.self_attn.config._attn_implementation = "eager"
    positions = torch.arange(len(x))[None]
    out: Tensor = layer(
        x[None],
        attention_mask=torch.full((len(x), len(x)), float("-inf")).triu(1)[None, None],
        position_ids=positions,
        position_embeddings=drafter.rotary(x, positions),
    )
    return out[0]


@families
def test_unroll_equals_drafting_token_by_token(family: str) -> None:
    policy = policy_of(family)
    drafter = random_head(policy)
    batch, head = batch_for(drafter, policy)
    with torch.no_grad():
        unrolled = drafter.unroll(batch, head.embed_tokens, DEPTHS)
    for index, start in enumerate(batch.rounds.tolist()):
        rollout, slot = int(batch.rollout_of[start]), int(batch.positions[start])
        first, last = batch.offsets[rollout : rollout + 2].tolist()
        if slot + 1 + DEPTHS >= last - first:
            continue
        expected = draft_one_round(
            drafter,
            batch.tokens[first:last],
            batch.engine_hidden[first:last],
            head.embed_tokens,
            slot,
        )
        torch.testing.assert_close(unrolled[:, index], expected, rtol=1e-3, atol=1e-4)


@families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exports_are_what_the_family_names(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy = policy_of(family)
    drafter = random_head(policy)
    drafter.export(tmp_path, dtype)
    target = TargetFingerprint.from_config(policy.config.to_dict())
    verified = verify(tmp_path, target)
    assert family_of(verified.config) == family
    kept = [name for name, t in verified.tensors.items() if t.dtype != dtype]
    assert all(name.endswith("e_score_correction_bias") for name in kept), "others are cast"
    loaded = load_drafter(tmp_path, policy)
    for name, tensor in drafter.state_dict().items():
        expected = tensor if name.endswith("correction_bias") else tensor.to(dtype).float()
        assert torch.equal(loaded.state_dict()[name], expected), name


@pytest.mark.parametrize("settings", [{"attention_bias": True}, {"use_qk_norm": False}])
def test_a_glms_attention_is_what_its_config_says(
    settings: dict[str, bool], tmp_path: Path
) -> None:
    policy = policy_of("glm4_moe", **settings)
    shipped = random_head(policy)
    shipped.export(tmp_path)
    loaded = load_drafter(tmp_path, policy)
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in shipped.state_dict().items())


@families
def test_a_type_alone_names_the_family(family: str) -> None:
    config = policy_of(family).config.to_dict() | {"architectures": None}
    assert family_of(config) == (None if family == "mimo" else family), "a plain qwen2 has none"


@pytest.mark.parametrize(("model_type", "family"), [("mimo", "mimo"), ("kimi_k2", "deepseek_v3")])
def test_a_type_that_transformers_does_not_know(model_type: str, family: str) -> None:
    assert family_of({"model_type": model_type}) == family


@pytest.mark.parametrize("value", [None, 0, "4"])
@pytest.mark.parametrize("key", ["num_hidden_layers", "vocab_size", "num_nextn_predict_layers"])
def test_a_head_without_a_size_is_refused_by_its_key(
    key: str, value: object, tmp_path: Path
) -> None:
    random_head(policy_of("deepseek_v3")).export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(CheckpointError) as caught:
        verify(tmp_path)
    assert caught.value.field == key


@families
def test_every_parameter_gets_a_gradient(family: str) -> None:
    policy = policy_of(family)
    drafter = random_head(policy)
    batch, head = batch_for(drafter, policy, count=6)
    drafter.unroll(batch, head.embed_tokens, 2).square().sum().backward()
    without = [name for name, p in drafter.named_parameters() if p.grad is None]
    assert not without


@families
def test_a_policys_own_head_is_taken_and_put_back(family: str, tmp_path: Path) -> None:
    policy = policy_of(family)
    shipped, trained = random_head(policy), random_head(policy, seed=5)
    folder = write_policy(tmp_path / "policy", policy, shipped)
    taken = MTPDrafter.from_policy(folder, policy)
    for name, tensor in shipped.state_dict().items():
        assert torch.equal(taken.state_dict()[name], tensor), name

    trained.stitch(folder, tmp_path / "out")
    again = MTPDrafter.from_policy(tmp_path / "out", PolicyShape.from_folder(tmp_path / "out"))
    for name, tensor in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    before, after = weight_files(folder), weight_files(tmp_path / "out")
    assert after.keys() == before.keys(), "nothing lost, nothing twice"
    old = load_file(folder / "model.safetensors")
    kept = load_file(tmp_path / "out" / "model.safetensors")
    assert kept.keys() == before.keys() - trained.head_tensors().keys()
    assert all(torch.equal(old[name], tensor) for name, tensor in kept.items())
    for file in set(after.values()):
        with safe_open(file, framework="pt") as written:
            assert written.metadata() == {"format": "pt"}, "transformers 4 reads no other"


def test_a_head_is_put_into_a_policy_that_had_none(tmp_path: Path) -> None:
    policy = policy_of("mimo")
    folder = write_policy(tmp_path / "policy", policy, None)
    made = MTPDrafter.from_policy(folder, policy)
    made.stitch(folder, tmp_path / "out")
    names = weight_files(tmp_path / "out")
    assert names.keys() == weight_files(folder).keys() | made.head_tensors().keys()
    with pytest.raises(CheckpointError, match="exists already"):
        made.stitch(folder, tmp_path / "out")


def test_a_policy_of_another_family_gets_no_foreign_head(tmp_path: Path) -> None:
    folder = write_policy(tmp_path / "policy", policy_of("qwen3_5"), None)
    with pytest.raises(CheckpointError, match="MiMoForCausalLM"):
        random_head(policy_of("mimo")).stitch(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("old", "new"), [("", "language_model."), ("model.", "model.language_model.")]
)
def test_a_multimodal_policy_keeps_its_head_deeper(old: str, new: str, tmp_path: Path) -> None:
    policy = policy_of("deepseek_v3")
    shipped, trained = random_head(policy), random_head(policy, seed=5)
    folder = write_policy(tmp_path / "policy", policy, shipped)
    tensors = load_file(folder / "model.safetensors")
    copies = {"model.layers.4.shared_head.head.weight": torch.zeros(23, 32)}
    copies |= {"model.layers.4.embed_tokens.weight": torch.zeros(23, 32)}
    making.write_tensors(folder, {name: t.clone() for name, t in (tensors | copies).items()})
    rename(folder, old, new)
    taken = MTPDrafter.from_policy(folder, policy)
    assert torch.equal(taken.project.weight, shipped.project.weight)
    trained.stitch(folder, tmp_path / "out")
    assert weight_files(tmp_path / "out").keys() == weight_files(folder).keys()
    again = MTPDrafter.from_policy(tmp_path / "out", policy)
    assert torch.equal(again.project.weight, trained.project.weight)
    assert read_policy_head(folder, policy).embed_tokens.any(), "the trunk's, not the head's copy"


def test_a_new_head_goes_where_the_policys_layers_are(tmp_path: Path) -> None:
    policy = policy_of("deepseek_v3")
    folder = write_policy(tmp_path / "policy", policy, None)
    rename(folder, "", "language_model.")
    random_head(policy).stitch(folder, tmp_path / "out")
    added = weight_files(tmp_path / "out").keys() - weight_files(folder).keys()
    assert {name.partition("layers.4.")[0] for name in added} == {"language_model.model."}


@pytest.mark.parametrize("ships", [True, False])
def test_a_text_config_of_a_multimodal_policy_names_the_family(ships: bool, tmp_path: Path) -> None:
    shipped, trained = (random_head(policy_of("qwen3_5"), seed) for seed in (0, 5))
    folder = write_multimodal(tmp_path / "policy", shipped if ships else None)
    policy = PolicyShape.from_folder(folder)
    taken = MTPDrafter.from_policy(folder, policy)
    assert taken.family is FAMILIES["qwen3_5"]
    assert torch.equal(taken.project.weight, shipped.project.weight) == ships
    taken.export(tmp_path / "head")
    assert load_drafter(tmp_path / "head", policy).kind == "mtp"

    trained.stitch(folder, tmp_path / "out")
    names = weight_files(folder).keys() | trained.head_tensors().keys()
    assert weight_files(tmp_path / "out").keys() == names
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["mtp_num_hidden_layers"] == 1
    assert "mtp_num_hidden_layers" not in config, "the text part's to say"


def test_a_head_for_another_number_of_layers_is_refused(tmp_path: Path) -> None:
    random_head(policy_of("glm4_moe")).export(tmp_path / "head")
    deeper = policy_of("glm4_moe", num_hidden_layers=8)
    folder = write_policy(tmp_path / "policy", deeper, None)
    with pytest.raises(CheckpointError, match="num_hidden_layers: 4, but the policy has 8"):
        load_drafter(tmp_path / "head", deeper)
    with pytest.raises(CheckpointError, match="num_hidden_layers: 8, but the head's policy has 4"):
        random_head(policy_of("glm4_moe")).stitch(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen3_5_moe", "deepseek_v3"])
def test_a_stitched_heads_experts_are_laid_out_as_the_policys(family: str, tmp_path: Path) -> None:
    policy = policy_of(family)
    folder = write_policy(tmp_path / "policy", policy, random_head(policy))
    stacked = fuse_experts(load_file(folder / "model.safetensors"))
    making.write_tensors(folder, {name: tensor.clone() for name, tensor in stacked.items()})
    trained = random_head(policy, seed=5)
    trained.stitch(folder, tmp_path / "out")
    assert weight_files(tmp_path / "out").keys() == stacked.keys()
    again = MTPDrafter.from_policy(tmp_path / "out", policy)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_a_head_with_tensors_that_ours_has_not_is_not_replaced(tmp_path: Path) -> None:
    policy = policy_of("deepseek_v3")
    folder = write_policy(tmp_path / "policy", policy, random_head(policy))
    scale = {"model.layers.4.mlp.experts.0.up_proj.weight_scale_inv": torch.ones(1, 1)}
    tensors = load_file(folder / "model.safetensors") | scale
    making.write_tensors(folder, {name: tensor.clone() for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match="weight_scale_inv"):
        random_head(policy).stitch(folder, tmp_path / "out")


def test_no_file_of_the_policy_is_lost_to_a_name(tmp_path: Path) -> None:
    """The head's own name may be taken, by a file that keeps some of its tensors."""
    policy = policy_of("deepseek_v3")
    trunk, head = random_head(policy), random_head(policy, seed=5)
    folder = write_policy(tmp_path / "policy", policy, None)
    copy_of = "model.layers.4.embed_tokens.weight"
    shipped = {copy_of: torch.ones(23, 32)} | trunk.head_tensors()
    contiguous = {name: t.detach().contiguous().clone() for name, t in shipped.items()}
    save_file(contiguous, folder / "model-mtp.safetensors")
    table = dict.fromkeys(weight_files(folder), "model.safetensors")
    table |= dict.fromkeys(shipped, "model-mtp.safetensors")
    index = json.dumps({"weight_map": table})
    (folder / "model.safetensors.index.json").write_text(index)

    head.stitch(folder, tmp_path / "out")
    names = weight_files(tmp_path / "out")
    assert names.keys() == table.keys()
    assert torch.equal(read_tensors(tmp_path / "out", names)[copy_of], torch.ones(23, 32))
    # And again, into what was made: the old head's file goes, the new one's has its name.
    trunk.stitch(tmp_path / "out", tmp_path / "again")
    assert read_tensors(tmp_path / "again", names).keys() == table.keys()
    held = {file.name for file in weight_files(tmp_path / "again").values()}
    assert {file.name for file in (tmp_path / "again").glob("*.safetensors")} == held


def test_files_of_a_folder_within_stay_whatever_their_names(tmp_path: Path) -> None:
    policy = policy_of("mimo")
    folder = write_policy(tmp_path / "policy", policy, random_head(policy))
    (folder / "within").mkdir()
    (folder / "within" / "model.safetensors").write_text("another model's")
    random_head(policy).stitch(folder, tmp_path / "out")
    assert (tmp_path / "out" / "within" / "model.safetensors").read_text() == "another model's"


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_a_routers_bias_stays_exact_in_a_stitched_head(family: str, tmp_path: Path) -> None:
    policy = policy_of(family)
    folder = write_policy(tmp_path / "policy", policy, None)
    tensors = load_file(folder / "model.safetensors")
    making.write_tensors(folder, {name: tensor.bfloat16() for name, tensor in tensors.items()})
    drafter = random_head(policy)
    bias = drafter.get_buffer("layer.mlp.gate.e_score_correction_bias").uniform_(5, 6)
    drafter.stitch(folder, tmp_path / "out")
    added = load_file(tmp_path / "out" / "model-mtp.safetensors")
    exact = [name for name, tensor in added.items() if tensor.dtype != torch.bfloat16]
    assert exact == ["model.layers.4.mlp.gate.e_score_correction_bias"]
    assert torch.equal(added[exact[0]], bias)


def test_stitching_that_fails_leaves_nothing(tmp_path: Path) -> None:
    policy = policy_of("mimo")
    folder = write_policy(tmp_path / "policy", policy, random_head(policy))
    table = dict.fromkeys(weight_files(folder), "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": table | {"lost": "lost.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"lost\.safetensors"):
        random_head(policy).stitch(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    index.write_text(json.dumps({"weight_map": table}))
    random_head(policy).stitch(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "policy"]


def test_half_a_head_is_refused(tmp_path: Path) -> None:
    policy = policy_of("qwen3_next")
    folder = write_policy(tmp_path / "policy", policy, random_head(policy))
    tensors = load_file(folder / "model.safetensors")
    del tensors["mtp.layers.0.mlp.experts.2.up_proj.weight"]
    making.write_tensors(folder, {name: tensor.clone() for name, tensor in tensors.items()})
    with pytest.raises(CheckpointError, match="MTP head"):
        MTPDrafter.from_policy(folder, policy)


@pytest.mark.parametrize(
    ("part", "read"),
    [("mtp.fc.weight", MTPDrafter.from_policy), ("lm_head.weight", read_policy_head)],
)
def test_a_quantised_policy_is_refused(
    part: str, read: Callable[[Path, PolicyShape], object], tmp_path: Path
) -> None:
    policy = policy_of("qwen3_next")
    folder = write_policy(tmp_path / "policy", policy, random_head(policy))
    tensors = {name: t.clone() for name, t in load_file(folder / "model.safetensors").items()}
    tensors[part] = tensors[part].to(torch.float8_e4m3fn)
    tensors[f"{part}_scale_inv"] = torch.ones(1, 1)
    making.write_tensors(folder, tensors)
    with pytest.raises(CheckpointError, match=f"{part}: float8_e4m3fn, expected 16 bits"):
        read(folder, policy)


def test_a_policy_without_a_family_gets_a_mimo_head() -> None:
    drafter = MTPDrafter.initialise(making.policy_shape())
    assert drafter.family is FAMILIES["mimo"]
    assert drafter.reads_normed, "a Qwen3 hands its state over after its final norm"
    layout = dataclasses.replace(making.layout(making.policy_shape()), last_hidden_normed=False)
    with pytest.raises(RolloutError, match="reads it after"):
        drafter.check_layout(layout)


def test_the_state_before_the_final_norm_is_what_mimo_reads() -> None:
    policy = policy_of("mimo")
    drafter = random_head(policy)
    assert not drafter.reads_normed
    batch, head = batch_for(drafter, policy)
    assert batch.raw_hidden is not None
    assert batch.engine_hidden is batch.raw_hidden
    scaled = dataclasses.replace(batch, last_hidden=batch.last_hidden * 3)
    assert torch.equal(
        drafter.unroll(batch, head.embed_tokens, 1), drafter.unroll(scaled, head.embed_tokens, 1)
    )


def test_more_than_one_head_is_refused(tmp_path: Path) -> None:
    policy = policy_of("mimo")
    random_head(policy).export(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 3}))
    with pytest.raises(CheckpointError, match="num_nextn_predict_layers"):
        load_drafter(tmp_path, policy)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 32,
            "short_factor": [1.0] * 8,
            "long_factor": [4.0] * 8,
        },
    ],
)
def test_a_new_head_for_rotations_it_does_not_have_is_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="rope_parameters"):
        MTPDrafter.initialise(making.policy_shape(rope_parameters=rope))


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(CheckpointError, match="num_attention_heads"):
        MTPDrafter.initialise(making.policy_shape(num_attention_heads=6, num_key_value_heads=2))


@pytest.mark.parametrize("reads_text_alone", [True, False])
def test_positions_have_one_row_where_the_policys_have(
    reads_text_alone: bool, tmp_path: Path
) -> None:
    shipped, trained = (random_head(policy_of("qwen3_5"), seed) for seed in (0, 5))
    folder = write_multimodal(tmp_path / "policy", shipped)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] |= {
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    }
    if reads_text_alone:
        config = config["text_config"]
    (folder / "config.json").write_text(json.dumps(config))

    taken = MTPDrafter.from_policy(folder, PolicyShape.from_folder(folder))
    taken.export(tmp_path / "head")
    trained.stitch(folder, tmp_path / "out")
    for made in ("head", "out"):
        found = json.loads((tmp_path / made / "config.json").read_text())
        rope = found.get("text_config", found)["rope_parameters"]
        assert ("mrope_section" in rope) != reads_text_alone
        assert rope["partial_rotary_factor"] == 0.25
