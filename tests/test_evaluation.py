"""``eval``: by domain and by prompt group, several drafters side by side."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from offline_files import write_drafter, write_policy, write_rollouts

from benchmarks.subjects import make_policy
from drafttrain.control.acceptance import AcceptanceEstimate
from drafttrain.drafters.draft_model import DraftModel
from drafttrain.drafters.eagle3 import Eagle3Drafter
from drafttrain.drafters.mtp import MTPDrafter
from drafttrain.drafters.policy import PolicyShape
from drafttrain.errors import RolloutError
from drafttrain.evaluation import evaluate, print_table, summaries
from drafttrain.opening import Inputs


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    policy = write_policy(root / "policy")
    write_rollouts(root / "rollouts.jsonl", policy, 60)
    write_drafter(root / "drafter", policy)
    drafter = Eagle3Drafter.load(root / "drafter", PolicyShape.from_folder(root / "policy"))
    with torch.no_grad():
        drafter.lm_head.weight.mul_(0.0)  # every token is as likely as any other
    drafter.export(root / "indifferent", torch.float32)
    return root


def results(files: Path, *drafters: str, **options: Any) -> Any:
    inputs = Inputs(files / "policy", [files / "rollouts.jsonl"], **options)
    folders = [files / name for name in drafters]
    return evaluate(inputs, folders, k=3, method="probabilistic")


class Counts(NamedTuple):
    acceptance_length: float
    tokens_per_second: float


def test_the_parts_make_up_the_whole(files: Path) -> None:
    (row,) = summaries(results(files, "drafter"), "domain")
    assert sorted(row["by_domain"]) == ["even", "odd"]
    assert sum(part["rollouts"] for part in row["by_domain"].values()) == row["rollouts"] == 60
    lengths = [part["acceptance_length"] for part in row["by_domain"].values()]
    assert min(lengths) <= row["acceptance_length"] <= max(lengths)
    low, high = row["interval"]
    assert low <= row["acceptance_length"] <= high
    (by_group,) = summaries(results(files, "drafter"), "group")
    assert len(by_group["by_group"]) > 20


def test_a_group_of_two_domains_is_divided(files: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (files / "rollouts.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"group": "one" if number % 4 < 2 else "other"}
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    inputs = Inputs(files / "policy", [path])
    found = evaluate(inputs, [files / "drafter"], k=3, method="probabilistic")
    (row,) = summaries(found, "domain")
    assert [part["rollouts"] for part in row["by_domain"].values()] == [30, 30]


def test_versions_of_one_registry_can_be_told_apart(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    folder = "/data/runs/of/someone/registry/drafter[/x]/versions/"
    figures = {"acceptance_length": 2.0, "interval": [1.9, 2.1], "rollouts": 60}
    figures["accepted_per_position"] = [0.5, 0.3, 0.2]
    gain = {"gain": 0.1, "gain_interval": [0.0, 0.2]}
    print_table([{"drafter": f"{folder}{n}", **figures, **gain} for n in (1017, 1018)], None)
    cells = [
        line.split("│")[1].strip() for line in capsys.readouterr().out.splitlines() if "│" in line
    ]
    assert "".join(cells) == f"{folder}1017{folder}1018"


def test_a_head_that_reads_the_state_before_the_final_norm(files: Path, tmp_path: Path) -> None:
    policy = make_policy(tmp_path / "policy", "mimo")
    shape = PolicyShape.from_folder(policy)
    MTPDrafter.from_policy(policy, shape).export(tmp_path / "head")
    DraftModel.from_policy(policy, shape, layers=[0]).export(tmp_path / "model")  # reads none
    inputs = Inputs(policy, [files / "rollouts.jsonl"])
    folders = [tmp_path / "model", tmp_path / "head"]
    for row in summaries(evaluate(inputs, folders, k=2, method="probabilistic")):
        assert 1.0 < row["acceptance_length"] <= 3.0


def test_drafters_are_compared_on_the_same_rollouts(files: Path) -> None:
    first, second = summaries(results(files, "drafter", "indifferent"))
    assert "gain" not in first
    assert second["gain"] == pytest.approx(second["acceptance_length"] - first["acceptance_length"])
    low, high = second["gain_interval"]
    assert low <= second["gain"] <= high
    again = summaries(results(files, "drafter", "drafter"))[1]
    assert again["gain"] == 0
    third = summaries(results(files, "drafter", "indifferent", "drafter"))[2]
    assert third["gain"] == 0, "on the first, not on the one before"


def test_the_table_has_what_was_found_where_it_belongs(
    files: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "500")
    counted = [Counts(1.25, 10.0), Counts(2.5, 20.0)]
    rows = summaries(results(files, "drafter", "indifferent"), "domain", counted)
    assert [row["engine_tokens_per_second"] for row in rows] == [10.0, 20.0]
    print_table(rows, "domain")
    lines = [re.split("[│┃]", line)[1:-1] for line in capsys.readouterr().out.splitlines()]
    header, *table = [[cell.strip() for cell in line] for line in lines if line]
    assert header == [
        "drafter", "acceptance length", "interval", "by position", "rollouts",
        "gain on the first", "counted by vLLM",
    ]  # fmt: skip
    assert [cells[0] for cells in table] == [
        str(files / "drafter"), "even", "odd", str(files / "indifferent"), "even", "odd",
    ]  # fmt: skip
    for cells, row in zip(table[::3], rows, strict=True):
        assert cells[1] == f"{row['acceptance_length']:.3f}"
        assert cells[2] == "[{:.3f}, {:.3f}]".format(*row["interval"])
        assert cells[3] == " ".join(f"{rate:.2f}" for rate in row["accepted_per_position"])
        assert cells[4] == "60"
    low, high = rows[1]["gain_interval"]
    assert table[0][5:] == ["", "1.250"]
    assert table[3][5:] == [f"{rows[1]['gain']:+.3f} [{low:+.3f}, {high:+.3f}]", "2.500"]
    assert table[1][4] == "30"


def test_the_temperature_is_used_where_none_is_recorded(files: Path) -> None:
    (cold,) = results(files, "drafter", temperature=0.5)
    (warm,) = results(files, "drafter", temperature=1.0)
    assert cold.estimate.acceptance_length != warm.estimate.acceptance_length
    assert {request.temperature for request in cold.requests} == {0.5}


def test_drafts_are_made_as_asked_for(files: Path) -> None:
    inputs = Inputs(files / "policy", [files / "rollouts.jsonl"])
    (greedy,) = evaluate(inputs, [files / "drafter"], k=3, method="greedy")
    (sampled,) = results(files, "drafter")
    assert greedy.estimate.acceptance_length != sampled.estimate.acceptance_length


def test_an_engine_is_asked_for_what_was_recorded(
    files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("drafttrain.evaluation._MICROBATCH_TOKENS", 256)  # several at a time
    (found,) = results(files, "drafter")
    assert len(found.estimate.groups) == 60
    lines = (files / "rollouts.jsonl").read_text().splitlines()
    asked = [(request.prompt, request.max_tokens) for request in found.requests]
    recorded = [
        (row["prompt_token_ids"], len(row["completion_token_ids"]))
        for row in map(json.loads, lines)
    ]
    assert sorted(asked) == sorted(recorded)


def test_drafters_that_read_other_layers_are_fed_those(files: Path, tmp_path: Path) -> None:
    shape = PolicyShape.from_folder(files / "policy")
    torch.manual_seed(1)
    Eagle3Drafter.initialise(shape, layer_ids=(0, 2, 4)).export(tmp_path / "other", torch.float32)
    alone = results(files, str(tmp_path / "other"))[0]
    beside = results(files, "drafter", str(tmp_path / "other"))[1]
    assert beside.estimate.acceptance_length == alone.estimate.acceptance_length


def test_rollouts_that_are_too_short(files: Path, tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    path.write_text('{"prompt_token_ids": [1], "completion_token_ids": [2, 3]}\n')
    with pytest.raises(RolloutError, match="longer than 4"):
        evaluate(Inputs(files / "policy", [path]), [files / "drafter"], k=3, method="greedy")


def test_selecting_and_joining_estimates() -> None:
    def estimate(*groups: str) -> AcceptanceEstimate:
        rounds = torch.arange(1.0, len(groups) + 1, dtype=torch.float64)
        return AcceptanceEstimate(list(groups), rounds, rounds[:, None] * 0.5)

    both = AcceptanceEstimate.together([estimate("a", "b"), estimate("a")])
    assert both.groups == ["a", "b", "a"]
    parts = both.divided(["x", None, "y"])
    assert {name: part.rounds.tolist() for name, part in parts.items()} == {"x": [1.0], "y": [1.0]}
    assert list(both.divided(both.groups)) == ["a", "b"]


def test_the_command_says_it_in_json(files: Path, tmp_path: Path) -> None:
    malformed = tmp_path / "malformed.jsonl"
    malformed.write_text('{"prompt_token_ids": [[/x]]}\n{"prompt_token_ids": ["[/x]"]}\n')
    command = [
        sys.executable, "-m", "drafttrain", "eval", "--json", "--by", "domain",
        "--target", str(files / "policy"),
        "--rollouts", str(files / "rollouts.jsonl"), str(malformed), "--skip-malformed",
        "--drafter", str(files / "drafter"), str(files / "indifferent"),
    ]  # fmt: skip
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = json.loads(result.stdout)["drafters"]
    assert [Path(row["drafter"]).name for row in rows] == ["drafter", "indifferent"]
    assert rows[0]["by_domain"]["odd"]["rollouts"] == 30
    skipped = [line for line in result.stderr.splitlines() if line.startswith("skipped: 2 ")]
    assert len(skipped) == 1
    assert f"{malformed}:2: prompt_token_ids" in skipped[0]
