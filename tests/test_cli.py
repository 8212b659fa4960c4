"""The command line as a user meets it: what it prints, its exit status, one line for a mistake."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import making
import pytest
from transformers import Qwen3ForCausalLM

from drafttrain.cli.arguments import print_json
from drafttrain.cli.engines import _by_version, _status_row
from drafttrain.integrations.vllm.messages import (
    Acceptance,
    EngineStatus,
    TapCounters,
    VersionAcceptance,
)
from drafttrain.rollouts.spool import SpoolWriter

POLICY = making.policy_shape()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, a drafter made for it, and a spool of rollouts."""
    root = tmp_path_factory.mktemp("cli")
    Qwen3ForCausalLM(POLICY.config).save_pretrained(root / "policy")
    run("init", "--target", root / "policy", "--out", root / "drafter")
    writer = SpoolWriter(root / "spool", engine="test")
    writer.write_head(making.policy_head(POLICY))
    # What `init` makes reads other layers than the toy rollouts have; this one reads theirs.
    making.drafter(POLICY).export(root / "toy", making.torch.float32)
    writer.write(making.rollouts(POLICY, 120), making.layout(POLICY))
    return root


def run(*arguments: object) -> str:
    """Run a command that must succeed; returns its standard output."""
    result = call(*arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "drafttrain", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def refused(*arguments: object) -> str:
    """Run a command that must end with status 2 and one line; returns the line."""
    result = call(*arguments)
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    return lines[0]


def test_from_init_to_versions(folder: Path, tmp_path: Path) -> None:
    registry = tmp_path / "registry"
    assert "sound" in run("verify", folder / "drafter", "--target", folder / "policy")
    run("publish", folder / "drafter", "--target", folder / "policy", "--registry", registry)
    listing = json.loads(run("versions", "--registry", registry, "--json"))
    assert listing["latest"] == 1
    assert listing["versions"][0]["target"]["vocab_size"] == POLICY.vocab_size
    assert "version" in run("versions", "--registry", registry)


def test_pretrain_improves_on_what_eval_says_of_the_start(folder: Path, tmp_path: Path) -> None:
    common = ("--target", folder / "policy", "--rollouts", folder / "spool", "--json")
    before = json.loads(run("eval", "--drafter", folder / "toy", *common))
    assert len(before["accepted_per_position"]) == 3
    low, high = before["interval"]
    assert low <= before["acceptance_length"] <= high
    pretrain = ("pretrain", "--drafter", folder / "toy", "--out", tmp_path / "run")
    trained = json.loads(run(*pretrain, "--registry", tmp_path, "--steps", 30, *common))
    assert trained["acceptance_length"] > before["acceptance_length"]
    chosen = ("--set", "training.objective=tv", "--set", "training.learning_rate=1e-2")
    other = run(*pretrain, "--registry", tmp_path / "other", "--steps", 5, *chosen, *common)
    assert json.loads(other)["acceptance_length"] != trained["acceptance_length"]
    after = json.loads(run("eval", "--drafter", tmp_path / "drafter" / "latest", *common))
    assert after["acceptance_length"] > before["acceptance_length"]


def test_a_missing_policy(tmp_path: Path) -> None:
    line = refused("init", "--target", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert "nowhere" in line
    assert "config.json" in line


def test_a_policy_without_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "policy" / "config.json").read_bytes())
    line = refused("init", "--target", tmp_path, "--out", tmp_path / "out")
    assert "weights" in line


def test_a_drafter_of_another_policy(folder: Path, tmp_path: Path) -> None:
    making.policy_shape(vocab_size=29, hidden_size=64).config.save_pretrained(tmp_path)
    line = refused("verify", folder / "drafter", "--target", tmp_path)
    assert "config.json" in line


def test_a_registry_of_a_newer_schema(tmp_path: Path) -> None:
    (tmp_path / "registry.json").write_text('{"schema_version": 99}')
    line = refused("versions", "--registry", tmp_path)
    assert "schema_version" in line
    assert "99" in line


def test_a_spool_that_is_none(folder: Path, tmp_path: Path) -> None:
    line = refused(
        "eval",
        "--target", folder / "policy",
        "--drafter", folder / "toy",
        "--rollouts", tmp_path / "nothing",
    )  # fmt: skip
    assert "nothing" in line


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("training.objektive=tv", "training.objektive"),
        ("training.objective=best", "training.objective"),
        ("min_gain.more=1", "min_gain"),
        ("patience=-1", "patience"),
        ("objective", "KEY=VALUE"),
        ("training.seed=99999999999999999999999", "training.seed"),
    ],
)
def test_a_setting_that_is_none(folder: Path, tmp_path: Path, setting: str, named: str) -> None:
    result = call(
        "pretrain",
        "--target", folder / "policy", "--rollouts", folder / "spool",
        "--drafter", folder / "toy", "--registry", tmp_path, "--set", setting,
    )  # fmt: skip
    assert result.returncode == 2
    assert named in result.stderr.strip().splitlines()[-1]


def test_an_engine_as_teacher_beside_what_it_cannot_do(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretrain = (
        *("pretrain", "--target", folder / "policy", "--rollouts", folder / "spool"),
        *("--drafter", folder / "toy", "--registry", tmp_path, "--teacher", "vllm"),
    )  # fmt: skip
    assert "--device-map" in refused(*pretrain, "--device-map", "auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--cache" in refused(*pretrain)


def test_a_temperature_that_nothing_is_sampled_at(folder: Path) -> None:
    common = ("--target", folder / "policy", "--rollouts", folder / "spool")
    line = refused("eval", "--drafter", folder / "toy", *common, "--temperature", "1e-320")
    assert "--temperature: 1e-320; expected" in line


def test_what_is_no_number_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"history": [(1, math.nan)], "steps": 2, "waited": math.inf})
    assert capsys.readouterr().out == '{"history": [[1, null]], "steps": 2, "waited": null}\n'


def test_a_run_without_a_summary(tmp_path: Path) -> None:
    assert "summary.json" in refused("report", tmp_path)


def test_wrong_usage_has_status_2() -> None:
    assert call("swap").returncode == 2
    assert call("fly").returncode == 2


def test_an_engine_that_does_not_answer() -> None:
    result = call("status", "--engine", "http://127.0.0.1:9")
    assert result.returncode == 1
    assert "127.0.0.1:9" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("url", ["127.0.0.1:18431", "", "http://127.0.0.1:99999999", "http://:80"])
def test_an_engine_s_url_that_is_none(url: str) -> None:
    result = call("status", "--engine", url)
    assert result.returncode == 2
    assert "--engine" in result.stderr.splitlines()[-1]
    assert "expected a URL as http://" in result.stderr.splitlines()[-1]


def test_the_version_that_serves_is_marked_whatever_was_counted() -> None:
    status = EngineStatus(
        plugin="", vllm="", engine="one", method="eagle3", num_draft_tokens=3,
        draft_sample_method=None, policy_version=0, drafter_version=2, drafter_sha=None, swaps=1,
        acceptance=Acceptance(), tap=TapCounters(), cpu_sampler_corrected=False,
        acceptance_by_version=[VersionAcceptance(drafter_version=1, requests=7)],
    )  # fmt: skip
    rows = [_status_row(status, found, first=False) for found in _by_version(status)]
    assert [row[1:3] for row in rows] == [["1", "7"], ["2 *", "0"]]
    counted = status.model_copy(update={"drafter_version": 1})
    assert [_status_row(counted, v, first=True)[1] for v in _by_version(counted)] == ["1 *"]


@pytest.fixture
def server_without_plugin() -> Iterator[str]:
    """An HTTP server that knows none of our routes, as `vllm serve` without the plugin."""

    class NotFound(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(404)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), NotFound)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_an_engine_without_the_plugin(server_without_plugin: str) -> None:
    result = call("status", "--engine", server_without_plugin)
    assert result.returncode == 1
    assert "additional-config" in result.stderr or "additional_config" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
