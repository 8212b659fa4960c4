"""The sidecar over a real spool and a real registry, as its own process where it may be killed."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import making
import pytest
import yaml

from drafttrain.checkpoints.registry import Registry
from drafttrain.checkpoints.verify import verify
from drafttrain.config import GateConfig, SidecarConfig, load_config
from drafttrain.control.gate import Verdict
from drafttrain.errors import ConfigError, InputError
from drafttrain.publishing import publish_drafter, publish_folder
from drafttrain.rollouts.spool import SpoolWriter
from drafttrain.sidecar import Sidecar
from drafttrain.telemetry import EventLog

POLICY = making.policy_shape()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A policy, a drafter, a spool with rollouts, and a configuration that uses them."""
    POLICY.config.save_pretrained(tmp_path / "policy")
    making.drafter(POLICY).export(tmp_path / "first", dtype=making.torch.float32)
    write_rollouts(tmp_path, seed=0)
    config = {
        "target": str(tmp_path / "policy"),
        "spool": str(tmp_path / "spool"),
        "registry": str(tmp_path / "registry"),
        "state": str(tmp_path / "state"),
        "drafter": str(tmp_path / "first"),
        "threads": 1,
        "training": {"learning_rate": 3e-3, "warmup_steps": 5, "tokens_per_step": 256},
        "replay": {"min_rollouts": 8},
        "gate": {"steps_between": 10},
    }
    (tmp_path / "sidecar.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def write_rollouts(folder: Path, seed: int, version: int = 0) -> None:
    writer = SpoolWriter(folder / "spool", engine="test")
    writer.write_head(making.policy_head(POLICY, version))
    writer.write(making.rollouts(POLICY, 120, seed=seed, version=version), making.layout(POLICY))


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    log = EventLog(folder / "state" / "events.jsonl")
    return [event for event in log.read() if event["event"] == kind]


def wait_for(folder: Path, kind: str, count: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while len(events(folder, kind)) < count:
        assert time.monotonic() < deadline, f"no {count} {kind} events"
        time.sleep(0.02)


def start(folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "drafttrain", "sidecar", str(folder / "sidecar.yaml")]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def config_of(folder: Path) -> SidecarConfig:
    return load_config(folder / "sidecar.yaml")


def test_it_publishes_better_drafters_and_stops_on_ctrl_c(folder: Path) -> None:
    process = start(folder)
    wait_for(folder, "published", 2)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0
    registry = Registry.open(folder / "registry")
    assert registry.versions() == list(range(1, len(events(folder, "published")) + 2))
    lengths = [
        manifest.acceptance.acceptance_length
        for manifest in map(registry.manifest, registry.versions())
        if manifest.acceptance is not None
    ]
    assert lengths[-1] > lengths[0]
    newest = registry.manifest(registry.versions()[-1])
    assert newest.parent == newest.version - 1
    assert newest.lineage.policy_versions == [0]
    assert newest.lineage.rollouts > 0


def test_it_continues_after_kills_at_any_moment(folder: Path) -> None:
    rng = random.Random(0)
    for round_ in range(4):
        started = len(events(folder, "started"))
        process = start(folder)
        wait_for(folder, "started", started + 1)
        if round_ == 0:
            wait_for(folder, "trained", 2)  # one round of training is saved for certain
        time.sleep(rng.uniform(0.0, 1.5))
        process.kill()
        process.wait()
        write_rollouts(folder, seed=1 + round_, version=round_ // 2)
        registry = Registry.open(folder / "registry")
        for version in registry.versions():
            verify(registry.folder(version))
        # A kill between a version's appearance and the move of `latest` leaves it one behind.
        assert registry.latest() in registry.versions()[-2:]
    process = start(folder)
    wait_for(folder, "started", 5)
    trained = len(events(folder, "trained"))
    wait_for(folder, "trained", trained + 1)
    process.terminate()
    assert process.wait(30) == 0
    starts = [event["step"] for event in events(folder, "started")]
    assert starts == sorted(starts)
    assert starts[-1] > 0


def run_until_stopped(sidecar: Sidecar) -> threading.Thread:
    thread = threading.Thread(target=sidecar.run)
    thread.start()
    return thread


def test_it_trains_longer_than_it_saves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = GateConfig(steps_between=1)
    sidecar = Sidecar(config_of(folder).model_copy(update={"gate": gate}), engines=[])
    monkeypatch.setattr(sidecar, "_save", lambda: time.sleep(0.5))
    thread = run_until_stopped(sidecar)
    wait_for(folder, "judged", 2)
    sidecar.stop.set()
    thread.join(30)
    (first, second), trained = events(folder, "judged")[:2], events(folder, "trained")[1]
    assert first["step"] == 1
    assert second["step"] > 2
    assert trained["time"] - first["time"] > 0.5 + 2 * 0.5


def test_it_waits_for_rollouts_it_has_not_seen_often(folder: Path) -> None:
    sidecar = Sidecar(config_of(folder).model_copy(update={"passes_per_rollout": 2}), engines=[])
    sidecar._rest = 60.0  # what was slow does not make it train on for longer
    thread = run_until_stopped(sidecar)
    wait_for(folder, "judged", 1)
    available = sum(rollout.length for rollout in sidecar.replay.training)
    time.sleep(1.0)
    assert 2 * available <= sidecar.trainer.tokens_seen < 2 * available + 256
    assert sidecar.trainer.step_count > 10
    write_rollouts(folder, seed=1)
    wait_for(folder, "judged", 2)
    sidecar.stop.set()
    thread.join(30)


def test_a_version_rolled_back_by_hand_is_what_serves(folder: Path) -> None:
    sidecar = Sidecar(config_of(folder), engines=[])
    thread = run_until_stopped(sidecar)
    wait_for(folder, "published", 1)
    sidecar.stop.set()
    thread.join(30)
    sidecar.registry.set_latest(1)
    again = Sidecar(config_of(folder), engines=[])
    assert again.serving_version == 1


def test_an_empty_registry_without_a_drafter_is_refused(folder: Path) -> None:
    config = config_of(folder).model_copy(update={"drafter": None})
    with pytest.raises(ConfigError, match="registry is empty"):
        Sidecar(config, engines=[])


@pytest.mark.parametrize("function", ["judge", "publish_drafter"])
def test_a_candidate_is_not_published_over_what_it_was_not_judged_against(
    folder: Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    """Whether another version comes while it is judged, or after that."""
    sidecar = Sidecar(config_of(folder), engines=[])
    sidecar.replay.refresh()
    better = Verdict(publish=True, gain=1.0, interval=(1.0, 1.0), candidate=2.0, serving=1.0)
    functions = {"judge": lambda *_, **__: better, "publish_drafter": publish_drafter}

    def publish_meanwhile(*arguments: Any, **options: Any) -> object:
        publish_folder(folder / "first", folder / "policy", sidecar.registry)
        return functions[function](*arguments, **options)

    for name, usual in functions.items():
        now = publish_meanwhile if name == function else usual
        monkeypatch.setattr(f"drafttrain.sidecar.{name}", now)
    assert not sidecar._offer_candidate()
    assert sidecar.registry.versions() == [1, 2]
    (event,) = events(folder, "overtaken")
    assert (event["judged_against"], event["latest"]) == (1, 2)
    sidecar._catch_up_engines()
    assert sidecar.serving_version == 2


def test_a_second_sidecar_on_the_same_state_is_refused(folder: Path) -> None:
    first = Sidecar(config_of(folder), engines=[])
    with pytest.raises(ConfigError, match="state: another sidecar works on it"):
        Sidecar(config_of(folder), engines=[])
    first.stop.set()
    first.run()
    Sidecar(config_of(folder), engines=[])


@pytest.mark.parametrize("key", ["state", "spool", "registry"])
def test_a_folder_that_cannot_be_made_is_named(folder: Path, key: str) -> None:
    (folder / "file").touch()
    for place in (folder / "file", folder / "file" / "inside", Path("/proc/x")):
        config = config_of(folder).model_copy(update={key: place})
        with pytest.raises(InputError, match=f"{place}: .*cannot be"):
            Sidecar(config, engines=[])


def test_a_full_disk_ends_it_with_a_name(folder: Path) -> None:
    sidecar = Sidecar(config_of(folder), engines=[])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(InputError, match=r"trainer.safetensors: state: cannot be written"):
            sidecar._save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((folder / "state").glob("trainer*"))


def test_unknown_keys_are_named(folder: Path) -> None:
    path = folder / "sidecar.yaml"
    path.write_text(path.read_text() + "gates: {}\n")
    process = start(folder)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.strip() == f"drafttrain: {path}: gates: unknown key"


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("threads: 100000000000", "threads: "),
        ("engines: ['127.0.0.1:18431']", "engines.0: "),
        ("engines: ['']", "engines.0: "),
        ("engines: ['http://127.0.0.1:99999999']", "engines.0: "),
        ("training: {seed: 99999999999999999999999}", "training.seed: "),
        ("a: " + "[" * 3000, "file: is nested too deeply"),
        ("a: 2026-99-99", "file: is not YAML"),
        ("a: " + "9" * 5000, "file: is not YAML"),
    ],
)
def test_a_value_that_is_none_is_named(line: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "sidecar.yaml"
    path.write_text("".join(f"{key}: x\n" for key in ("target", "spool", "registry", "state")))
    load_config(path)
    path.write_text(path.read_text() + line)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    assert str(refused.value).startswith(f"{path}: {named}")
    assert "\n" not in str(refused.value)


def test_a_missing_policy_is_named(folder: Path) -> None:
    path = folder / "sidecar.yaml"
    path.write_text(path.read_text().replace(str(folder / "policy"), str(folder / "nowhere")))
    process = start(folder)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "nowhere" in stderr
    assert len(stderr.strip().splitlines()) == 1
