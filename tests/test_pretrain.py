"""Offline training from saved rollouts: it learns, ends early, resumes exactly, and in company."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import making
import pytest
import torch
from offline_files import write_drafter, write_policy, write_rollouts
from safetensors.torch import load_file

from drafttrain.checkpoints.registry import Registry
from drafttrain.config import PretrainConfig, TrainingConfig
from drafttrain.control.acceptance import estimate_acceptance
from drafttrain.drafters import Drafter
from drafttrain.errors import CheckpointError, ConfigError, RolloutError, SpoolError
from drafttrain.opening import Inputs, open_corpus
from drafttrain.pretrain.command import PretrainCommand, Pretrained, run_pretrain
from drafttrain.pretrain.run import Pretraining
from drafttrain.rollouts.record import Rollout
from drafttrain.rollouts.spool import SpoolWriter
from drafttrain.training.corpus import Corpus

CONFIG = PretrainConfig(
    training=TrainingConfig(tokens_per_step=256, learning_rate=5e-3, warmup_steps=5),
    steps=40,
    microbatch_tokens=64,
    evaluate_every=10,
    holdout_fraction=0.3,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("offline")
    policy = write_policy(root / "policy")
    write_rollouts(root / "rollouts.jsonl", policy, 120)
    write_drafter(root / "drafter", policy)
    return root


def command(files: Path, out: Path, **changes: Any) -> PretrainCommand:
    return replace(
        PretrainCommand(
            inputs=Inputs(files / "policy", [files / "rollouts.jsonl"]),
            drafter=files / "drafter",
            registry=out / "registry",
            out=out / "run",
            config=CONFIG,
        ),
        **changes,
    )


def pretrain(asked: PretrainCommand) -> Pretrained:
    result = run_pretrain(asked)
    assert result is not None
    return result


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "registry" / "drafter" / "latest" / "model.safetensors")


def assert_same_weights(first: Path, second: Path) -> None:
    theirs = weights(second)
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, theirs[name]), name


def arguments(files: Path, out: Path, *more: object) -> list[str]:
    return [
        "-m", "drafttrain", "pretrain", "--json",
        "--target", str(files / "policy"),
        "--rollouts", str(files / "rollouts.jsonl"),
        "--drafter", str(files / "drafter"),
        "--registry", str(out / "registry"),
        "--out", str(out / "run"),
        "--tokens-per-step", "256",
        "--microbatch-tokens", "64",
        "--evaluate-every", "10",
        *map(str, more),
    ]  # fmt: skip


def test_it_learns_and_leaves_a_version_and_a_report(files: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = run_pretrain(command(files, tmp_path), said.append)
    assert result is not None
    before, after = result.report.history[0][1], result.report.history[-1][1]
    assert after > before
    manifest = Registry.open(tmp_path / "registry").manifest(1)
    assert manifest.acceptance is not None
    assert manifest.acceptance.acceptance_length == result.report.acceptance.acceptance_length
    assert manifest.lineage.optimizer_steps == 40
    assert manifest.lineage.tokens == result.manifest.lineage.tokens > 0
    text = result.report_path.read_text()
    assert "Best k" in text
    assert (tmp_path / "run" / "report.png").stat().st_size > 1000
    assert any(sentence.startswith("memory: about") for sentence in said)
    assert not (tmp_path / "run" / "trainer.safetensors").exists()


def test_whole_prompt_groups_are_held_out(files: Path) -> None:
    inputs = Inputs(files / "policy", [files / "rollouts.jsonl"])
    corpus = open_corpus(inputs, (1, 2, 3), CONFIG).corpus
    sides = [
        {entry.group for part in side for entry in part.entries}
        for side in (corpus.training, corpus.held_out)
    ]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_a_kill_changes_nothing(files: Path, tmp_path: Path) -> None:
    """A run killed with SIGKILL goes on with the same losses, and ends with the same bits."""
    straight = subprocess.run(
        [sys.executable, *arguments(files, tmp_path / "straight", "--steps", 60)],
        check=True,
        capture_output=True,
        text=True,
    )
    expected = json.loads(straight.stdout)
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, *arguments(files, killed, "--steps", 60)], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (killed / "run" / "trainer.safetensors").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, "it ended before its state was seen"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = subprocess.run(
        [sys.executable, *arguments(files, killed, "--steps", 60, "--resume")],
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(resumed.stdout)
    assert 0 < len(found["losses"]) < 60
    assert found["losses"] == expected["losses"][-len(found["losses"]) :]
    assert found["history"] == expected["history"]
    assert_same_weights(tmp_path / "straight", killed)


KILLED = """
import os, pathlib, signal, sys, threading, torch
sys.path.insert(0, {tests!r})
import test_pretrain as t
from drafttrain.training import state

save_file = state.save_file

def save_half(tensors, path, metadata):
    long = dict(tensors, long=torch.zeros(1 << 27))
    threading.Thread(target=save_file, args=(long, path, metadata)).start()
    while not any(path.parent.iterdir()):
        pass
    os.kill(os.getpid(), signal.SIGKILL)

state.save_file = save_half
t.run_pretrain(t.command(pathlib.Path({files!r}), pathlib.Path({out!r})))
"""


def test_a_run_killed_in_its_first_save_begins_again(files: Path, tmp_path: Path) -> None:
    out, tests = tmp_path / "killed", str(Path(__file__).parent)
    script = KILLED.format(tests=tests, files=str(files), out=str(out))
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    (half,) = (out / "run").iterdir()
    assert half.name != "trainer.safetensors"
    with pytest.raises(ConfigError, match="nothing to resume"):
        run_pretrain(command(files, out, resume=True))
    for name in ("notes.txt", ".notes"):  # beside which it may be anyone's
        other = out / "run" / name
        other.touch()
        with pytest.raises(CheckpointError, match="exists already"):
            run_pretrain(command(files, out))
        other.unlink()
    pretrain(command(files, out))
    assert {path.name for path in (out / "run").iterdir()} == {"report.md", "report.png"}
    run_pretrain(command(files, tmp_path / "straight"))
    assert_same_weights(out, tmp_path / "straight")


def test_an_unfinished_run_is_not_overwritten_nor_mixed_up(files: Path, tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop_late(progress: Any) -> None:
        if progress.report.step == 15:
            raise Stop

    with pytest.raises(Stop):
        run_pretrain(command(files, tmp_path), on_step=stop_late)
    with pytest.raises(ConfigError, match="--resume"):
        run_pretrain(command(files, tmp_path))
    other = CONFIG.model_copy(update={"patience": 9})
    with pytest.raises(ConfigError, match="other settings"):
        run_pretrain(command(files, tmp_path, config=other, resume=True))
    result = pretrain(command(files, tmp_path, resume=True))
    assert len(result.report.losses) == 30


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """Forty rollouts, half of them held out."""
    policy = making.policy_shape()
    writer = SpoolWriter(tmp_path, engine="test")
    writer.write_head(making.policy_head(policy))
    writer.write(making.rollouts(policy, 40), making.layout(policy))
    return Corpus.of_spool(tmp_path, microbatch_tokens=64, holdout_fraction=0.5)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[list[Rollout]]:
    """What a run estimates on, as it goes on."""
    noted: list[list[Rollout]] = []

    def noting(drafter: Drafter, rollouts: list[Rollout], *rest: Any, **how: Any) -> Any:
        noted.append(rollouts)
        return estimate_acceptance(drafter, rollouts, *rest, **how)

    monkeypatch.setattr("drafttrain.pretrain.run.estimate_acceptance", noting)
    return noted


def test_estimates_on_the_way_look_at_half_of_the_tokens_trained_on(
    corpus: Corpus, taken: list[list[Rollout]]
) -> None:
    training = CONFIG.training.model_copy(update={"tokens_per_step": 128})
    config = CONFIG.model_copy(update={"training": training, "steps": 2, "evaluate_every": 1})
    Pretraining(making.drafter(making.policy_shape()), corpus, config).run()
    on_the_way, at_the_end = taken[: -len(corpus.held_out)], taken[-len(corpus.held_out) :]
    assert 0 < sum(rollout.length for part in on_the_way for rollout in part) < 64 + 64
    assert sum(map(len, at_the_end)) == sum(len(part.entries) for part in corpus.held_out)


def test_an_estimate_takes_one_microbatch_after_the_other(
    corpus: Corpus, taken: list[list[Rollout]]
) -> None:
    run = Pretraining(making.drafter(making.policy_shape()), corpus, CONFIG)
    found = run.estimate()
    assert max(sum(rollout.length for rollout in part) for part in taken) <= 64
    together = [rollout for part in taken for rollout in part]
    assert len(together) == sum(len(part.entries) for part in corpus.held_out)
    whole = estimate_acceptance(
        run.trainer.drafter, together, corpus.layout, corpus.heads, k=3, method="probabilistic"
    )
    assert found.acceptance_length == pytest.approx(whole.acceptance_length)


def test_without_gain_the_decay_begins_early(files: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"steps": 400, "min_gain": 10.0, "patience": 2})
    report = pretrain(command(files, tmp_path, config=config)).report
    assert report.stopped_early
    # The third estimate is the second without gain; a quarter of its steps is left to decay.
    assert report.lineage.optimizer_steps == 38


def test_a_cache_trains_the_same_drafter_and_needs_no_policy_weights(
    files: Path, tmp_path: Path
) -> None:
    streamed = pretrain(command(files, tmp_path / "a"))
    inputs = Inputs(files / "policy", [files / "rollouts.jsonl"], cache=tmp_path / "cache")
    said: list[str] = []
    run_pretrain(command(files, tmp_path / "b", inputs=inputs), said.append)
    assert any("MiB go to" in sentence and "are free" in sentence for sentence in said)
    again = run_pretrain(command(files, tmp_path / "c", inputs=inputs), said.append)
    assert again is not None
    assert f"features: from {tmp_path / 'cache'}" in said
    assert_same_weights(tmp_path / "b", tmp_path / "c")
    assert again.report.acceptance.acceptance_length == pytest.approx(
        streamed.report.acceptance.acceptance_length, abs=0.2
    )
    with pytest.raises(RolloutError, match="other rollouts or of another policy"):
        open_corpus(inputs, (1, 2, 4), CONFIG)


def test_a_cache_that_does_not_fit_is_refused_first(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr("drafttrain.opening.shutil.disk_usage", lambda path: usage)
    inputs = Inputs(files / "policy", [files / "rollouts.jsonl"], cache=tmp_path / "cache")
    with pytest.raises(SpoolError, match="10 B are free"):
        open_corpus(inputs, (1, 2, 3), CONFIG)
    assert not list((tmp_path / "cache" / "segments").iterdir())


def test_a_cache_whose_writer_was_killed_at_its_end_is_written_again(
    files: Path, tmp_path: Path
) -> None:
    inputs = Inputs(files / "policy", [files / "rollouts.jsonl"], cache=tmp_path / "cache")
    written = open_corpus(inputs, (1, 2, 3), CONFIG)
    (tmp_path / "cache" / "features.json").write_text("")
    (tmp_path / "cache" / "features.unfinished").touch()
    assert open_corpus(inputs, (1, 2, 3), CONFIG).digest == written.digest
    assert not (tmp_path / "cache" / "features.unfinished").exists()


def test_a_cache_replaces_no_other_spool(files: Path, tmp_path: Path) -> None:
    (tmp_path / "segments").mkdir()
    kept = tmp_path / "segments" / "00000000-e-00000000.safetensors"
    kept.touch()
    inputs = Inputs(files / "policy", [files / "rollouts.jsonl"], cache=tmp_path)
    with pytest.raises(RolloutError, match="something else"):
        open_corpus(inputs, (1, 2, 3), CONFIG)
    assert kept.exists()


def test_a_version_continues_with_its_parent_named(files: Path, tmp_path: Path) -> None:
    short = CONFIG.model_copy(update={"steps": 5})
    run_pretrain(command(files, tmp_path, config=short))
    latest = tmp_path / "registry" / "drafter" / "latest"
    result = pretrain(command(files, tmp_path, config=short, drafter=latest))
    assert (result.manifest.version, result.manifest.parent) == (2, 1)


def test_what_is_interrupted_says_what_it_leaves(files: Path, tmp_path: Path) -> None:
    """Nothing to resume, before a state is saved; a state, after."""
    with pytest.raises(ConfigError, match="nothing to resume"):
        run_pretrain(command(files, tmp_path, resume=True))
    process = subprocess.Popen(
        [sys.executable, *arguments(files, tmp_path, "--steps", 10**6, "--patience", 10**6)],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "trainer.safetensors").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert said == (
        f"drafttrain: interrupted; {tmp_path}/run keeps its last saved state, "
        "and --resume continues from there\n"
    )
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_too_little_memory_is_said_and_more_is_used(files: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="do not hold even the smallest microbatch"):
        run_pretrain(command(files, tmp_path, memory=1000))
    said: list[str] = []
    run_pretrain(command(files, tmp_path, memory=1 << 30), said.append)
    assert "memory: microbatches of 256 tokens fit" in said


def test_too_few_prompt_groups(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text((files / "rollouts.jsonl").read_text().splitlines()[0])
    inputs = Inputs(files / "policy", [path])
    with pytest.raises(RolloutError, match="too few"):
        run_pretrain(command(files, tmp_path, inputs=inputs))


@pytest.fixture(scope="module")
def alone(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What one process makes of it: its folder and its summary."""
    out = tmp_path_factory.mktemp("alone")
    result = subprocess.run(
        [sys.executable, *arguments(files, out, "--steps", 20)],
        check=True,
        capture_output=True,
        text=True,
    )
    return out, json.loads(result.stdout)


def launch(*command: str) -> dict[str, Any]:
    """Run on two processes under ``accelerate launch``; a CPU has gloo between them."""
    launcher = [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ]  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-m", *launcher, *command],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    summary: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return summary


@pytest.mark.parametrize("mode", [(), ("--shard",)], ids=["ddp", "fsdp2"])
def test_two_processes_train_as_one(
    files: Path, tmp_path: Path, alone: tuple[Path, dict[str, Any]], mode: tuple[str, ...]
) -> None:
    found = launch(*arguments(files, tmp_path, "--steps", 20, *mode))
    out, expected = alone
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
    assert found["acceptance_length"] == pytest.approx(expected["acceptance_length"], rel=1e-3)
    theirs = weights(out)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=1e-3)


STOPPED = """
import json, os, pathlib, sys
sys.path.insert(0, {tests!r})
import test_pretrain as t

class Stop(Exception):
    pass

def stop(progress):
    if progress.report.step == 15:
        raise Stop

out = pathlib.Path({out!r})
config = t.CONFIG.model_copy(update=dict(steps=20))
try:
    t.run_pretrain(
        t.command(pathlib.Path({files!r}), out, config=config, sharded=True), on_step=stop
    )
except Stop:
    if os.environ.get("RANK", "0") == "0":  # one line, for two processes
        print(json.dumps(dict(stopped=15)))
"""


def test_a_state_goes_from_two_processes_to_one_and_back(files: Path, tmp_path: Path) -> None:
    """With divided weights; whole ones are saved by the same code."""
    config = CONFIG.model_copy(update={"steps": 20})
    expected = pretrain(command(files, tmp_path / "alone", config=config)).report.losses
    script = tmp_path / "stopped.py"
    places = {"tests": str(Path(__file__).parent), "files": str(files)}

    script.write_text(STOPPED.format(out=str(tmp_path / "two"), **places))
    assert launch(str(script)) == {"stopped": 15}
    resumed = pretrain(command(files, tmp_path / "two", config=config, resume=True)).report
    assert resumed.losses == pytest.approx(expected[10:], rel=1e-4)

    script.write_text(STOPPED.format(out=str(tmp_path / "one"), **places))
    subprocess.run([sys.executable, script], check=True, capture_output=True)
    script.write_text(RESUMED.format(out=str(tmp_path / "one"), **places))
    assert launch(str(script))["losses"] == pytest.approx(expected[10:], rel=1e-4)


RESUMED = """
import json, pathlib, sys
sys.path.insert(0, {tests!r})
import test_pretrain as t

config = t.CONFIG.model_copy(update=dict(steps=20))
asked = t.command(
    pathlib.Path({files!r}), pathlib.Path({out!r}), config=config, resume=True, sharded=True
)
result = t.run_pretrain(asked)
if result is not None:
    print(json.dumps(dict(losses=result.report.losses)))
"""
