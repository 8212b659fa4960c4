"""Version folders whose hashes and digests are right, and whose content is not."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from benchmarks.broken.content import (
    BytesDamage,
    claim_a_huge_header,
    empty,
    many_tensors,
    not_the_format,
    overlapping_tensors,
    truncate,
)
from benchmarks.broken.folders import CONFIG, LAYER, MANIFEST, WEIGHTS, FolderDamage, reseal
from drafttrain.checkpoints.verify import dtype_name, sha256_of

TensorsDamage = Callable[[dict[str, Tensor], random.Random], dict[str, Tensor]]

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"


def _forge_file(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    files = json.loads((folder / MANIFEST).read_text())["files"]
    reseal(folder, files=files | {name: sha256_of(folder / name)})


def _forged_weights(damage: TensorsDamage) -> FolderDamage:
    def forge(folder: Path, rng: random.Random) -> None:
        tensors = damage(load((folder / WEIGHTS).read_bytes()), rng)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        _forge_file(folder, WEIGHTS, save(tensors))
        specs = {
            name: {"dtype": dtype_name(tensor), "shape": list(tensor.shape)}
            for name, tensor in tensors.items()
        }
        reseal(folder, tensors=specs)

    return forge


def _forged_bytes(damage: BytesDamage) -> FolderDamage:
    def forge(folder: Path, rng: random.Random) -> None:
        _forge_file(folder, WEIGHTS, damage((folder / WEIGHTS).read_bytes(), rng))

    return forge


def _any(tensors: dict[str, Tensor], rng: random.Random) -> str:
    return rng.choice(sorted(tensors))


def not_finite(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    name = _any(tensors, rng)
    changed = tensors[name].clone()
    changed.view(-1)[rng.randrange(changed.numel())] = float(rng.choice(["nan", "inf", "-inf"]))
    return tensors | {name: changed}


def one_missing(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    missing = _any(tensors, rng)
    return {name: tensor for name, tensor in tensors.items() if name != missing}


def half_a_fused_group(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    part = rng.choice(["self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"])
    return {name: tensor for name, tensor in tensors.items() if part not in name}


def other_shape(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    name = _any(tensors, rng)
    tensor = tensors[name]
    choices = [tensor[:-1], torch.cat([tensor, tensor]), tensor[None], tensor[:0]]
    return tensors | {name: rng.choice(choices).clone()}


def other_dtype(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    name = _any(tensors, rng)
    dtype = rng.choice([torch.float64, torch.int32, torch.int8, torch.bool, torch.float8_e4m3fn])
    return tensors | {name: tensors[name].to(dtype)}


def the_policys_embedding(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    return tensors | {"embed_tokens.weight": torch.randn(tensors["lm_head.weight"].shape)}


def one_too_many(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    name = rng.choice(["model.norm.weight", "a/../../b", "midlayer.extra", "lm_head.bias", "d2t"])
    return tensors | {name: torch.ones(8)}


def the_layer_twice(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    name = rng.choice([name for name in sorted(tensors) if name.startswith(LAYER)])
    return tensors | {name.replace(LAYER, "layers.0."): tensors[name].clone()}


_OF_TENSORS: list[TensorsDamage] = [
    not_finite, one_missing, half_a_fused_group, other_shape, other_dtype,
    the_policys_embedding, one_too_many, the_layer_twice,
]  # fmt: skip
FORGED_WEIGHTS: list[FolderDamage] = [
    *(_forged_weights(damage) for damage in _OF_TENSORS),
    *(_forged_bytes(damage) for damage in (
        claim_a_huge_header, many_tensors, overlapping_tensors, empty, truncate, not_the_format,
    )),
]  # fmt: skip


def _forged_config(**choices: list[Any]) -> FolderDamage:
    def forge(folder: Path, rng: random.Random) -> None:
        config = json.loads((folder / CONFIG).read_text())
        changes = {key: rng.choice(values) for key, values in choices.items()}
        _forge_file(folder, CONFIG, json.dumps(config | changes).encode())

    return forge


def other_layers(folder: Path, rng: random.Random) -> None:
    ids = rng.choice([[0, 2, 3], [1, 2, 4], [3, 2, 1], [1, 1, 2], [1, 2], [1, 2, 99], "1,2,3"])
    config = json.loads((folder / CONFIG).read_text())
    config |= {LAYER_IDS: ids, "eagle_config": {LAYER_IDS: ids}}
    _forge_file(folder, CONFIG, json.dumps(config).encode())
    reseal(folder, layer_ids=ids)


_SIZES = ("hidden_size", "vocab_size", "intermediate_size", "num_attention_heads",
          "num_key_value_heads", "head_dim", "draft_vocab_size", "target_hidden_size")  # fmt: skip
FORGED_CONFIG: list[FolderDamage] = [
    *(_forged_config(**{key: [1, 7, 96, 10**15, "64", -1]}) for key in _SIZES),
    _forged_config(num_hidden_layers=[2, 0]),
    _forged_config(architectures=[None, [], ["GPT"], "LlamaForCausalLMEagle3", [["x"]]]),
    *(_forged_config(**{key: [True, 3, "yes"]}) for key in (
        "norm_before_residual", "norm_before_fc", "fc_norm", "norm_output", "attention_bias",
    )),
    _forged_config(rope_theta=[1.0, 1e6]),
    _forged_config(hidden_act=["gelu", "relu"]),
    _forged_config(rms_norm_eps=[1.0]),
    _forged_config(eagle_config=[[1], "x", {"use_aux_hidden_state": False}]),
    *[other_layers] * 4,
]  # fmt: skip


def _forged_manifest(**choices: list[Any]) -> FolderDamage:
    def forge(folder: Path, rng: random.Random) -> None:
        reseal(folder, **{key: rng.choice(values) for key, values in choices.items()})

    return forge


def another_target(folder: Path, rng: random.Random) -> None:
    target = json.loads((folder / MANIFEST).read_text())["target"]
    key = rng.choice(["hidden_size", "vocab_size", "num_hidden_layers"])
    reseal(folder, target=target | {key: rng.choice([1, target[key] + 1, 10**12, "64", -3])})


_HASH = "0" * 64
FORGED_MANIFEST: list[FolderDamage] = [
    _forged_manifest(schema_version=[2, 99, "1", None, 1.0]),
    _forged_manifest(version=[1, 2, 10**9, -1, "3"]),
    _forged_manifest(name=["another", "../drafter", 3]),
    _forged_manifest(kind=["mtp", "draft_model", "eagle2", None]),
    _forged_manifest(layer_ids=[[1, 2], [0, 1, 2], ["1"], None]),
    _forged_manifest(tensors=[{}, None, {"norm.weight": {"dtype": "float32", "shape": [64]}}]),
    _forged_manifest(files=[
        {}, {CONFIG: _HASH}, {CONFIG: _HASH, WEIGHTS: _HASH}, {"../../registry.json": _HASH},
        {CONFIG: _HASH, WEIGHTS: _HASH, "/etc/passwd": _HASH}, None, [CONFIG, WEIGHTS],
    ]),
    _forged_manifest(surprise=[1]),
    _forged_manifest(lineage=[{}, None]),
    *[another_target] * 3,
]  # fmt: skip
