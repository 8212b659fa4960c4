"""What verify accepts, and that everything else is refused with the file and the field."""

from __future__ import annotations

import json
import re
import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drafter_files import CONFIG, TARGET, make_tensors, write_drafter
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.checkpoints.decoder_format import Sizes
from drafttrain.checkpoints.eagle3_format import FULL, SLIDING
from drafttrain.checkpoints.formats import LAYER, LAYER_ALIAS, expected_tensors, with_defaults
from drafttrain.checkpoints.manifest import TargetFingerprint
from drafttrain.checkpoints.verify import verify
from drafttrain.errors import CheckpointError

REDUCED = {**CONFIG, "draft_vocab_size": 6}
QWEN3 = {**CONFIG, "architectures": ["Eagle3Qwen3ForCausalLM"]}
USED = {"architectures": ["Eagle3Qwen3ForCausalLM"], "use_sliding_window": True} | {
    "sliding_window": 4
}
Q_PROJ = LAYER + "self_attn.q_proj.weight"
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
NOT_THE_SAME_INNER_IDS = {"eagle_config": {LAYER_IDS: [0, 1, 2]}}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"draft_vocab_size": 6},
        {"architectures": ["Eagle3Qwen3ForCausalLM"], "attention_bias": True},
        {"head_dim": 16},
        {"norm_before_fc": True, "fc_norm": True},
        {"attention_bias": True},
        {"hidden_size": 16, "target_hidden_size": 8},
        {"eagle_config": None},
    ],
)
def test_sound_drafters_are_accepted(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = {**CONFIG, **changes}
    tensors = make_tensors(config)
    verified = verify(write_drafter(tmp_path, config, tensors), TARGET)
    assert verified.manifest is None
    assert verified.config["draft_vocab_size"] == changes.get("draft_vocab_size", 20)
    assert verified.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(verified.tensors[name], tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_engine_dtypes_and_both_layer_names_are_accepted(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = {
        name.replace(LAYER, LAYER_ALIAS): tensor.to(dtype)
        for name, tensor in make_tensors(CONFIG).items()
    }
    tensors |= {"embed_tokens.weight": torch.zeros(20, 8), "t2d": torch.ones(20, dtype=torch.bool)}
    verified = verify(write_drafter(tmp_path, CONFIG, tensors), TARGET)
    assert verified.tensors["layers.0.mlp.up_proj.weight"].dtype is dtype


def test_eagle3_tensors_are_those_of_the_engine() -> None:
    shapes = expected_tensors(REDUCED).required
    assert shapes["fc.weight"] == (8, 24)
    assert shapes[Q_PROJ] == (8, 16)
    assert shapes["midlayer.self_attn.k_proj.weight"] == (4, 16)
    assert shapes["lm_head.weight"] == (6, 8)
    assert shapes["d2t"] == (6,)
    assert "midlayer.self_attn.q_norm.weight" not in shapes
    assert expected_tensors(QWEN3).required["midlayer.self_attn.q_norm.weight"] == (4,)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"architectures": ["Eagle3Speculator"]}, "architectures"),
        ({"architectures": None}, "architectures"),
        ({"architectures": [1]}, "architectures"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"intermediate_size": -1}, "intermediate_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"vocab_size": 21}, "vocab_size"),
        ({"target_hidden_size": 16}, "target_hidden_size"),
        ({"draft_vocab_size": 21}, "draft_vocab_size"),
        ({"norm_output": "yes"}, "norm_output"),
        ({"eagle_config": [1]}, "eagle_config"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "eagle_config.use_aux_hidden_state"),
        ({LAYER_IDS: None, "eagle_config": {}}, LAYER_IDS),
        ({LAYER_IDS: [1, 1, 2], "eagle_config": {}}, LAYER_IDS),
        ({LAYER_IDS: [2, 1, 3], "eagle_config": {}}, LAYER_IDS),
        ({LAYER_IDS: [-1, 1, 3], "eagle_config": {}}, LAYER_IDS),
        ({LAYER_IDS: [1, 2, 5], "eagle_config": {}}, LAYER_IDS),
        ({LAYER_IDS: [1, 2], "num_aux_hidden_states": 3, "eagle_config": {}}, LAYER_IDS),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_key_value_heads"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"layer_types": [SLIDING, SLIDING], "sliding_window": 4}, "layer_types"),
        ({"layer_types": [SLIDING]}, "sliding_window"),
        ({"layer_types": [SLIDING], "sliding_window": 0}, "sliding_window"),
        (NOT_THE_SAME_INNER_IDS, f"eagle_config.{LAYER_IDS}"),
    ],
)
def test_a_wrong_config_is_refused_by_key(
    tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    write_drafter(tmp_path, {**CONFIG, **changes}, make_tensors(CONFIG))
    refuses(tmp_path, "config.json", field)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({"sliding_window": 4}, None),
        ({"layer_types": [SLIDING], "sliding_window": 4}, 4),
        ({"layer_types": [FULL], "sliding_window": 4}, None),
        (USED | {"layer_types": [SLIDING]}, 4),
        (USED | {"layer_types": [SLIDING], "use_sliding_window": False}, None),
        (USED | {"max_window_layers": 0}, 4),
        (USED, None),
    ],
)
def test_a_window_is_where_the_engine_finds_it(changes: dict[str, Any], window: int | None) -> None:
    config = with_defaults({**CONFIG, **changes})
    assert config["sliding_window"] == window
    assert config["layer_types"] == [FULL if window is None else SLIDING]
    assert with_defaults(config) == config


def test_aux_layers_that_are_not_named_are_the_engines_default(tmp_path: Path) -> None:
    unnamed = {**CONFIG, LAYER_IDS: None, "num_aux_hidden_states": None, "eagle_config": None}
    write_drafter(tmp_path, unnamed, make_tensors(CONFIG))
    deep = TARGET.model_copy(update={"num_hidden_layers": 12})
    assert verify(tmp_path, deep).config[LAYER_IDS] == [2, 6, 9]
    with pytest.raises(CheckpointError, match=LAYER_IDS):
        verify(tmp_path)


@pytest.mark.parametrize("name", sorted(expected_tensors(REDUCED).required))
def test_every_required_tensor_must_be_whole(tmp_path: Path, name: str) -> None:
    tensors = make_tensors(REDUCED)
    write_drafter(tmp_path, REDUCED, {n: t for n, t in tensors.items() if n != name})
    refuses(tmp_path, "model.safetensors", name)
    write_drafter(tmp_path, REDUCED, {**tensors, name: tensors[name][:-1].contiguous()})
    refuses(tmp_path, "model.safetensors", name)
    wrong = tensors[name].double() if tensors[name].is_floating_point() else tensors[name].short()
    write_drafter(tmp_path, REDUCED, {**tensors, name: wrong})
    refuses(tmp_path, "model.safetensors", name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, dtype: torch.dtype, value: float
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in make_tensors(CONFIG).items()}
    tensors[Q_PROJ][3, 5] = value
    write_drafter(tmp_path, CONFIG, tensors)
    refuses(tmp_path, "model.safetensors", Q_PROJ)


def test_unknown_and_doubled_tensors_are_refused(tmp_path: Path) -> None:
    tensors = make_tensors(CONFIG)
    write_drafter(tmp_path, CONFIG, {**tensors, "model.norm.weight": torch.ones(8)})
    refuses(tmp_path, "model.safetensors", "model.norm.weight")
    write_drafter(tmp_path, CONFIG, {**tensors, "d2t": torch.zeros(20, dtype=torch.int64)})
    refuses(tmp_path, "model.safetensors", "d2t")
    doubled = {**tensors, Q_PROJ.replace(LAYER, LAYER_ALIAS): tensors[Q_PROJ].clone()}
    write_drafter(tmp_path, CONFIG, doubled)
    refuses(tmp_path, "model.safetensors", LAYER)


@pytest.mark.parametrize(
    ("ids", "field"),
    [([0, 1, 2, 3, 4, 20], "d2t"), ([-1, 1, 2, 3, 4, 5], "d2t"), ([0, 1, 2, 3, 3, 5], "d2t")],
)
def test_draft_vocabulary_must_name_distinct_target_ids(
    tmp_path: Path, ids: list[int], field: str
) -> None:
    offsets = torch.tensor(ids) - torch.arange(6)
    write_drafter(tmp_path, REDUCED, {**make_tensors(REDUCED), "d2t": offsets})
    refuses(tmp_path, "model.safetensors", field)


def test_draft_vocabulary_survives_overflow_and_must_agree_with_t2d(tmp_path: Path) -> None:
    tensors = make_tensors(REDUCED)
    largest = torch.iinfo(torch.int64).max
    write_drafter(tmp_path, REDUCED, {**tensors, "d2t": torch.full((6,), largest)})
    refuses(tmp_path, "model.safetensors", "d2t")
    marks = torch.zeros(20, dtype=torch.bool)
    marks[tensors["d2t"] + torch.arange(6)] = True
    verify(write_drafter(tmp_path, REDUCED, {**tensors, "t2d": marks}), TARGET)
    write_drafter(tmp_path, REDUCED, {**tensors, "t2d": ~marks})
    refuses(tmp_path, "model.safetensors", "t2d")


def test_missing_parts_are_named(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "nowhere", "folder")
    refuses(tmp_path, "config.json", "file")
    write_drafter(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refuses(tmp_path, "model.safetensors", "file")


@pytest.mark.parametrize("text", ["{", "[]", "", "\xff\xfe", "[" * 100_000, "1" * 10_000])
def test_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    write_drafter(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    refuses(tmp_path, "config.json", "file")


def test_a_huge_config_is_not_read(tmp_path: Path) -> None:
    write_drafter(tmp_path)
    with (tmp_path / "config.json").open("r+b") as file:
        file.truncate(1 << 40)
    refuses(tmp_path, "config.json", "file")


@pytest.mark.parametrize("length", [1 << 62, 101_000_000, 99_000_000, 3, 0])
def test_a_hostile_header_length_takes_no_memory(tmp_path: Path, length: int) -> None:
    write_drafter(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", length) + b"{}" + b" " * 64)
    refuses(tmp_path, "model.safetensors", "file")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_damaged_weights_file_passes_or_crashes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Truncated anywhere, or with a bit of the header flipped: CheckpointError or sound tensors."""
    folder = write_drafter(tmp_path_factory.mktemp("drafter"))
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    if data.draw(st.booleans(), label="truncate"):
        path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        refuses(folder, "model.safetensors", "file")
        return
    content[data.draw(st.integers(0, header - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content)
    try:
        verified = verify(folder, TARGET)
    except CheckpointError:
        return
    assert sum(map(Tensor.numel, verified.tensors.values())) == sum(
        map(Tensor.numel, make_tensors(CONFIG).values())
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tensors_are_mapped_not_copied(tmp_path: Path) -> None:
    tensors = make_tensors(CONFIG) | {"embed_tokens.weight": torch.zeros(20, 8)}
    verified = verify(write_drafter(tmp_path, CONFIG, tensors), TARGET)
    maps = Path("/proc/self/maps").read_text().splitlines()
    (mapped,) = (line.split()[0] for line in maps if str(tmp_path) in line)
    start, stop = (int(address, 16) for address in mapped.split("-"))
    assert all(start < tensor.data_ptr() < stop for tensor in verified.tensors.values())


def test_fingerprint_reads_a_policy_folder(tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 64,
        "vocab_size": 100,
        "num_hidden_layers": 3,
    }
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    fingerprint = TargetFingerprint.from_folder(tmp_path)
    assert fingerprint == TargetFingerprint(
        architecture="Qwen3ForCausalLM", hidden_size=64, vocab_size=100, num_hidden_layers=3
    )
    nested = {"architectures": ["Qwen3ForCausalLM"], "text_config": config}
    assert TargetFingerprint.from_config(nested) == fingerprint
    for key in ("hidden_size", "vocab_size", "num_hidden_layers"):
        path.write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        with pytest.raises(CheckpointError, match=re.escape(f"{path}: {key}: ")):
            TargetFingerprint.from_folder(tmp_path)
    for wrong in ({**config, "architectures": "Qwen"}, {**config, "hidden_size": "64"}, {}):
        with pytest.raises(CheckpointError):
            TargetFingerprint.from_config(wrong)


@pytest.mark.parametrize("key", ["num_hidden_layers", "num_experts", "n_routed_experts"])
def test_what_has_tensors_of_its_own_is_counted_up_to_a_limit(key: str) -> None:
    assert Sizes({key: 128}, "config.json")[key] == 128
    with pytest.raises(CheckpointError, match=f"config.json: {key}: 1000000000, expected at most"):
        Sizes({key: 10**9}, "config.json")[key]


def test_save_file_and_verify_agree_on_the_engine_s_own_export(tmp_path: Path) -> None:
    save_file(make_tensors(QWEN3), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**QWEN3, "torch_dtype": "float32"}))
    assert verify(tmp_path, TARGET).config["torch_dtype"] == "float32"


def refuses(folder: Path, file: str, field: str) -> None:
    """`verify` blames `field` of `file`, in one line."""
    with pytest.raises(CheckpointError) as caught:
        verify(folder, TARGET)
    assert Path(caught.value.where).name == file, str(caught.value)
    assert caught.value.field == field, str(caught.value)
    assert "\n" not in str(caught.value)
