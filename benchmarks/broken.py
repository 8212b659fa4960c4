"""Ways to break what drafttrain reads: version folders, spool files, requests.

*Torn* is what accidents do: the content no longer has the hash it was published with. *Forged* is
what a faulty or hostile publisher does: hashes and digests are right, the content is not.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from drafttrain.checkpoints.manifest import digest_of
from drafttrain.checkpoints.verify import dtype_name, sha256_of

FolderDamage = Callable[[Path, random.Random], None]
BytesDamage = Callable[[bytes, random.Random], bytes]
RequestDamage = Callable[[random.Random], dict[str, Any]]
TensorsDamage = Callable[[dict[str, Tensor], random.Random], dict[str, Tensor]]

CONFIG, WEIGHTS, MANIFEST = "config.json", "model.safetensors", "manifest.json"
LAYER = "midlayer."
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
WRONG_TYPES: list[Any] = [None, True, "8", -1, 0, 2.5, [], {}, 10**18, "../../etc/passwd"]


def reseal(folder: Path, **changes: Any) -> None:
    """Make the manifest agree with the folder again, and say something else besides."""
    path = folder / MANIFEST
    document = json.loads(path.read_text()) | changes
    del document["digest"]
    path.write_text(json.dumps(document | {"digest": digest_of(document)}))


def remove(folder: Path) -> None:
    """Whatever it has become."""
    if folder.is_symlink() or folder.is_file():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


# ---- bytes


def flip_a_bit(content: bytes, rng: random.Random) -> bytes:
    index = rng.randrange(len(content))
    flipped = content[index] ^ (1 << rng.randrange(8))
    return content[:index] + bytes([flipped]) + content[index + 1 :]


def flip_in_header(content: bytes, rng: random.Random) -> bytes:
    end = min(len(content), 1200)
    return flip_a_bit(content[:end], rng) + content[end:]


def truncate(content: bytes, rng: random.Random) -> bytes:
    # A trailing line end of JSON is nothing lost.
    return content[: rng.randrange(len(content) - 2)]


def append(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.randint(1, 64))


def zero_a_block(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(max(1, len(content) - 64))
    return content[:start] + b"\1" * 64 + content[start + 64 :]


def shuffle_blocks(content: bytes, rng: random.Random) -> bytes:
    middle = rng.randrange(len(content) // 4, len(content) // 2)
    return content[middle:] + content[:middle]


def claim_a_huge_header(content: bytes, rng: random.Random) -> bytes:
    length = rng.choice([1 << 62, 2**64 - 1, 101_000_000, 90_000_000, len(content) + 1])
    return struct.pack("<Q", length) + content[8:]


def many_tensors(content: bytes, rng: random.Random) -> bytes:
    """A header of several megabytes of empty tensors: small on disk, large in memory."""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": entry for i in range(80_000 + rng.randrange(1000))}).encode()
    return struct.pack("<Q", len(header)) + header


def overlapping_tensors(content: bytes, rng: random.Random) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    first, second = rng.sample(names, 2)
    header[first]["data_offsets"] = header[second]["data_offsets"]
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + content[8 + length :]


def empty(content: bytes, rng: random.Random) -> bytes:
    return b""


def not_the_format(content: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"\x80\x04", b"PK\x03\x04", b"\0" * 100, b"{" * 1000, b"[" * 100_000])


BYTES: list[BytesDamage] = [
    flip_a_bit, flip_in_header, truncate, append, zero_a_block, shuffle_blocks,
    claim_a_huge_header, many_tensors, overlapping_tensors, empty, not_the_format,
]  # fmt: skip
_OF_ANY_FILE = (flip_a_bit, truncate, append, zero_a_block, shuffle_blocks, empty, not_the_format)


# ---- torn version folders


def _torn(name: str, damage: BytesDamage) -> FolderDamage:
    def tear(folder: Path, rng: random.Random) -> None:
        path = folder / name
        path.write_bytes(damage(path.read_bytes(), rng))

    return tear


def swap_two_tensors(folder: Path, rng: random.Random) -> None:
    path = folder / WEIGHTS
    tensors = load(path.read_bytes())
    first, second = "mlp.gate_proj.weight", "mlp.up_proj.weight"  # of one shape
    tensors[LAYER + first], tensors[LAYER + second] = (
        tensors[LAYER + second], tensors[LAYER + first],
    )  # fmt: skip
    path.write_bytes(save(tensors))


def another_versions_file(folder: Path, rng: random.Random) -> None:
    (folder / WEIGHTS).write_bytes((folder.parent / "v000001" / WEIGHTS).read_bytes())


def a_field_of_the_manifest(folder: Path, rng: random.Random) -> None:
    path = folder / MANIFEST
    document = json.loads(path.read_text())
    key = rng.choice(list(document))
    if rng.random() < 0.5:
        del document[key]
    else:
        document[key] = rng.choice([value for value in WRONG_TYPES if value != document[key]])
    path.write_text(json.dumps(document))


TORN: list[FolderDamage] = [
    *(_torn(name, damage) for damage in _OF_ANY_FILE for name in (CONFIG, WEIGHTS, MANIFEST)),
    *(_torn(WEIGHTS, damage) for damage in (claim_a_huge_header, many_tensors)),
    swap_two_tensors,
    another_versions_file,
    *[a_field_of_the_manifest] * 10,
]


# ---- forged version folders


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


# ---- paths


def _link(name: str, *goals: str) -> FolderDamage:
    def forge(folder: Path, rng: random.Random) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(rng.choice(goals))

    return forge


def _elsewhere(name: str) -> FolderDamage:
    """The right content, outside the registry."""

    def forge(folder: Path, rng: random.Random) -> None:
        outside = folder.parent.parent.parent / "outside"
        outside.mkdir(exist_ok=True)
        shutil.copy(folder / name, outside / name)
        (folder / name).unlink()
        (folder / name).symlink_to(outside / name)

    return forge


def _pipe(name: str) -> FolderDamage:
    def forge(folder: Path, rng: random.Random) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return forge


def _folder_instead(name: str) -> FolderDamage:
    def forge(folder: Path, rng: random.Random) -> None:
        (folder / name).unlink()
        (folder / name).mkdir()

    return forge


def _sparse(name: str) -> FolderDamage:
    def forge(folder: Path, rng: random.Random) -> None:
        os.truncate(folder / name, 1 << rng.randint(33, 42))

    return forge


def whole_folder_elsewhere(folder: Path, rng: random.Random) -> None:
    outside = folder.parent.parent.parent / "outside-version"
    shutil.rmtree(outside, ignore_errors=True)
    shutil.move(folder, outside)
    folder.symlink_to(outside)


def a_file_for_a_folder(folder: Path, rng: random.Random) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def a_loop(folder: Path, rng: random.Random) -> None:
    shutil.rmtree(folder)
    folder.symlink_to(folder)


PATHS: list[FolderDamage] = [
    *(_link(n, "/etc/passwd", "/dev/zero", "/proc/self/mem", "nowhere", "../../../x", n)
      for n in (CONFIG, WEIGHTS, MANIFEST)),
    *(make(name) for make in (_elsewhere, _pipe, _folder_instead, _sparse)
      for name in (CONFIG, WEIGHTS, MANIFEST)),
    whole_folder_elsewhere, a_file_for_a_folder, a_loop,
]  # fmt: skip


# ---- requests


def _bodies(rng: random.Random) -> dict[str, Any]:
    versions: list[Any] = [
        None, True, "3", 0, -1, 1.5, 1e30, 10**30, [], {}, "../../etc", "v000002", [2], "latest",
    ]  # fmt: skip
    return {"json": {"version": rng.choice(versions)}}


def _no_version(rng: random.Random) -> dict[str, Any]:
    return {"json": rng.choice([{}, [], None, 3, "x", {"Version": 2}, {"versions": [2]}])}


def _unknown_version(rng: random.Random) -> dict[str, Any]:
    return {"json": {"version": rng.randint(1000, 999_999_999)}}


def _not_json(rng: random.Random) -> dict[str, Any]:
    bodies = [
        b"",
        b"\xff\xfe",
        b"{",
        b"[" * 4000,
        b'{"version": 2',
        rng.randbytes(200),
        b"2" * 4000,
    ]
    return {"content": rng.choice(bodies)}


def _too_long(rng: random.Random) -> dict[str, Any]:
    return {"content": b'{"version": 2}' + b" " * rng.randint(5000, 2_000_000)}


def _bad_token(rng: random.Random) -> dict[str, Any]:
    wrong = ["", "Bearer", "Bearer wrong", "Basic dXNlcjpwYXNz", "Bearer " + "x" * 5000]
    return {"json": {"version": 1}, "headers": {"Authorization": rng.choice(wrong)}}


def _other_path(rng: random.Random) -> dict[str, Any]:
    paths = ["/drafttrain/../drafter", "/drafttrain/drafter/..", "/drafttrain/status", "/",
             "/drafttrain/%2e%2e/drafter", "/drafttrain/drafter/2", "//drafter"]  # fmt: skip
    return {"path": rng.choice(paths), "json": {"version": 1}}


REQUESTS: list[RequestDamage] = [
    *[_bodies] * 3, _no_version, _unknown_version, _not_json, _too_long, _bad_token, _other_path,
]  # fmt: skip
