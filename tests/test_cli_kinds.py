"""The commands that make a drafter and write it in another layout, for every kind."""

from __future__ import annotations

import io
import json
import resource
import shutil
import sys
from pathlib import Path

import making
import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from drafttrain.checkpoints.verify import verify
from drafttrain.cli import main
from drafttrain.drafters import KINDS
from drafttrain.rollouts.spool import SpoolWriter

VOCAB = making.policy_shape().vocab_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that is called a MiMo, and a spool of rollouts."""
    root = tmp_path_factory.mktemp("kinds")
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
    )
    Qwen2ForCausalLM(config).save_pretrained(root / "policy")
    path = root / "policy" / "config.json"
    changed = {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    writer = SpoolWriter(root / "spool", engine="test")
    writer.write_head(making.policy_head(making.policy_shape()))
    writer.write(making.rollouts(making.policy_shape(), 40), making.layout(making.policy_shape()))
    return root


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


@pytest.mark.parametrize("known", [True, False], ids=["known", "unknown"])
def test_a_folders_own_code_is_never_run(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, marker = tmp_path / "policy", tmp_path / "marker"
    policy.mkdir()
    config = {
        "model_type": "qwen3" if known else "unheard_of",
        "architectures": ["Qwen3ForCausalLM"],
        "auto_map": {
            "AutoConfig": "code.Config",
            "AutoModelForCausalLM": "code.Model",
            "AutoTokenizer": "code.Tokenizer",
        },
        **dict.fromkeys(("hidden_size", "vocab_size", "num_hidden_layers"), 8),
    }
    (policy / "config.json").write_text(json.dumps(config))
    (policy / "code.py").write_text(f"open({str(marker)!r}, 'w')\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    out = ("--out", tmp_path / "out")
    assert run("init", "--target", policy, "--kind", "draft_model", *out) == 2
    assert ("never run" in capsys.readouterr().err) != known
    assert not marker.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_init_makes_a_sound_drafter(kind: str, folder: Path, tmp_path: Path) -> None:
    assert run("init", "--target", folder / "policy", "--kind", kind, "--out", tmp_path) == 0
    assert run("verify", tmp_path, "--target", folder / "policy") == 0


def test_init_takes_the_options_of_a_kind(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = folder / "policy"
    chosen = ("--draft-vocab", 9, "--rollouts", folder / "spool", "--layers", "0,2,4")
    assert run("init", "--target", policy, "--out", tmp_path / "eagle", *chosen) == 0
    assert "9 tokens hold" in capsys.readouterr().out
    config = verify(tmp_path / "eagle").config
    assert config["draft_vocab_size"] == 9
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 2, 4]

    variant = ("--set", "layer=qwen3", "--set", "num_hidden_layers=2", "--set", "fc_norm=true")
    assert run("init", "--target", policy, "--out", tmp_path / "qwen3", *variant) == 0
    config = verify(tmp_path / "qwen3").config
    assert config["architectures"] == ["Eagle3Qwen3ForCausalLM"]
    assert (config["num_hidden_layers"], config["fc_norm"]) == (2, True)

    small = ("--kind", "draft_model", "--out", tmp_path / "small")
    assert run("init", "--target", policy, *small, "--layers", "1,3") == 0
    assert verify(tmp_path / "small").config["num_hidden_layers"] == 2
    again = ("--kind", "draft_model", "--out", tmp_path / "again", "--source", tmp_path / "small")
    assert run("init", "--target", policy, *again) == 0


def test_a_draft_vocabulary_of_saved_rollouts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"prompt_token_ids": [1, 2], "completion_token_ids": [5, 7, 7, 11]}', '{"no": 1}']
    (tmp_path / "one.jsonl").write_text(lines[0] + "\n")
    (tmp_path / "two.jsonl").write_text("\n".join(lines) + "\n")
    files = ("--rollouts", tmp_path / "one.jsonl", tmp_path / "two.jsonl")
    command = ("init", "--target", folder / "policy", "--out", tmp_path / "eagle", *files)
    assert run(*command, "--draft-vocab", 2) == 2
    assert "two.jsonl:2" in capsys.readouterr().err
    assert run(*command, "--draft-vocab", 2, "--skip-malformed") == 0
    said = capsys.readouterr().out
    assert "skipped: 1" in said
    assert "2 tokens hold 75.00%" in said
    d2t = verify(tmp_path / "eagle").tensors["d2t"]
    assert (torch.arange(2) + d2t).tolist() == [5, 7]


@pytest.mark.parametrize(
    "chosen",
    [
        ("--draft-vocab=9",),
        ("--rollouts", "spool"),
        ("--draft-vocab=9", "--rollouts", "spool", "x"),
    ],
    ids=["no rollouts", "no size", "a spool and more"],
)
def test_half_a_draft_vocabulary_is_refused(
    chosen: tuple[str, ...], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [folder / name if name in ("spool", "x") else name for name in chosen]
    assert run("init", "--target", folder / "policy", "--out", tmp_path / "x", *paths) == 2
    assert "rollouts" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("mtp", "--layers=1"),
        ("mtp", "--set=fc_norm=true"),
        ("mtp", "--skip-malformed"),
        ("eagle3", "--source=x"),
        ("eagle3", "--layers=9"),
        ("eagle3", "--set=fc_norm=perhaps"),
    ],
)
def test_options_of_another_kind_are_refused(
    kind: str, option: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = folder / "policy"
    assert run("init", "--target", policy, "--kind", kind, "--out", tmp_path / "x", option) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("kind", "layout"),
    [("eagle3", "speculators"), ("mtp", "policy"), ("draft_model", "raw")],
)
def test_export_writes_the_layout(kind: str, layout: str, folder: Path, tmp_path: Path) -> None:
    policy = folder / "policy"
    run("init", "--target", policy, "--kind", kind, "--out", tmp_path / "made")
    out = ("--out", tmp_path / "out", "--layout", layout)
    assert run("export", tmp_path / "made", "--target", policy, *out) == 0
    assert (tmp_path / "out" / "config.json").is_file()


def test_a_folder_that_is_not_new_is_never_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "policy", tmp_path / "policy")
    before = (tmp_path / "policy" / "model.safetensors").read_bytes()
    target = ("--target", folder / "policy")
    assert run("init", *target, "--out", tmp_path / "made") == 0
    pretrain = ("--rollouts", folder / "spool", "--registry", tmp_path / "registry")
    for command in (
        ("init",),
        ("export", tmp_path / "made", "--layout", "raw"),
        ("pretrain", "--drafter", tmp_path / "made", *pretrain),
    ):
        capsys.readouterr()
        assert run(*command, *target, "--out", tmp_path / "policy") == 2
        said = capsys.readouterr().err
        assert (
            said
            == f"drafttrain: {tmp_path}/policy: folder: exists already; expected a new folder\n"
        )
    assert (tmp_path / "policy" / "model.safetensors").read_bytes() == before
    assert not (tmp_path / "registry").exists()


def test_a_folder_that_cannot_be_written_is_named(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    target = ("--target", folder / "policy")
    assert run("init", *target, "--out", tmp_path / "made") == 0
    pretrain = ("--rollouts", folder / "spool", "--registry", tmp_path / "registry")
    for command in (("init",), ("pretrain", "--drafter", tmp_path / "made", *pretrain)):
        for out in (tmp_path / "file" / "x", Path("/proc/x")):
            capsys.readouterr()
            assert run(*command, *target, "--out", out) == 2
            said = capsys.readouterr().err
            assert said.startswith(f"drafttrain: {out}: folder: cannot be written")
            assert said.count("\n") == 1
    assert not (tmp_path / "registry").exists()


@pytest.mark.parametrize("option", ["--seed=99999999999999999999999", "--seed=-1"])
def test_a_seed_that_is_none(
    option: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = ("--out", tmp_path / "made")
    assert run("init", "--target", folder / "policy", *made, option) == 2
    assert "--seed" in capsys.readouterr().err.splitlines()[-1]


def test_a_full_disk_leaves_no_half_drafter(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        status = run("init", "--target", folder / "policy", "--out", tmp_path / "made")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 2
    assert "made: folder: cannot be written" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


def test_a_layout_that_a_kind_has_not_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = folder / "policy"
    run("init", "--target", policy, "--kind", "mtp", "--out", tmp_path / "made")
    out = ("--out", tmp_path / "out", "--layout", "speculators")
    assert run("export", tmp_path / "made", "--target", policy, *out) == 2
    assert "--layout" in capsys.readouterr().err


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 5}}'])
def test_an_index_that_names_no_files_is_refused(
    index: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "policy", tmp_path / "policy")
    (tmp_path / "policy" / "model.safetensors.index.json").write_text(index)
    out = ("--out", tmp_path / "out")
    assert run("init", "--target", tmp_path / "policy", "--kind", "draft_model", *out) == 2
    assert "weights: cannot be read" in capsys.readouterr().err
