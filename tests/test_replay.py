"""Replay: stable hold-out, fresh versions first, eviction, and damage that is not fatal."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rollout_files import LAYOUT, NO_AUX, fill, make_head, make_rollout

from drafttrain.errors import RolloutError
from drafttrain.rollouts.replay import Replay
from drafttrain.rollouts.spool import HEADS_KEPT, SpoolReader, SpoolWriter


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def opened(root: Path, **options: object) -> Replay:
    replay = Replay(root, **options)  # type: ignore[arg-type]
    replay.refresh()
    return replay


def ids(replay: Replay) -> list[str]:
    return [rollout.rollout_id for rollout in replay.training]


def test_refresh_finds_what_is_new_and_only_that(tmp_path: Path) -> None:
    fill(tmp_path, [0])
    replay = Replay(tmp_path, holdout_fraction=0.0)
    assert replay.training == []
    assert replay.newest_policy_version is None
    assert replay.refresh() == 4
    assert replay.refresh() == 0
    more = fill(tmp_path, [1, 2], rollouts=3)
    assert {path.parent for path in more} == {replay.segments_folder}
    assert replay.refresh() == 6
    assert [rollout.policy_version for rollout in replay.training] == [0] * 4 + [1] * 3 + [2] * 3
    assert replay.newest_policy_version == 2
    assert replay.layout == LAYOUT


def test_whole_groups_are_held_out_the_same_after_a_restart(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, "engine-0")
    writer.write_head(make_head())
    for attempt in range(3):  # three rollouts of each prompt, in different segments
        rollouts = [make_rollout(seed, length=5 + attempt) for seed in range(200)]
        writer.write(rollouts, LAYOUT)
    replay = opened(tmp_path, holdout_fraction=0.25, seed=1)
    held_out = {rollout.group for rollout in replay.held_out}
    assert not held_out & {rollout.group for rollout in replay.training}
    assert len(replay.held_out) == 3 * len(held_out)
    assert len(replay.held_out) + len(replay.training) == 600
    assert 30 <= len(held_out) <= 70
    again = opened(tmp_path, holdout_fraction=0.25, seed=1)
    assert {rollout.group for rollout in again.held_out} == held_out
    other = opened(tmp_path, holdout_fraction=0.25, seed=2)
    assert {rollout.group for rollout in other.held_out} != held_out
    assert opened(tmp_path, holdout_fraction=1.0).training == []
    assert opened(tmp_path, holdout_fraction=0.0).held_out == []


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 40), min_size=1, max_size=12),
    budget=st.integers(1, 200),
    seed=st.integers(0, 2**31),
)
def test_a_sample_keeps_to_its_budget_and_its_generator(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], budget: int, seed: int
) -> None:
    root = tmp_path_factory.mktemp("spool")
    writer = SpoolWriter(root, "engine-0")
    writer.write_head(make_head())
    writer.write([make_rollout(i, length=n) for i, n in enumerate(lengths)], LAYOUT)
    replay = opened(root, holdout_fraction=0.0)
    drawn = replay.sample(generator(seed), budget)
    total = sum(rollout.length for rollout in drawn)
    assert drawn
    assert len({rollout.rollout_id for rollout in drawn}) == len(drawn)
    assert total <= budget or len(drawn) == 1
    assert total + max(lengths) > budget or len(drawn) == len(lengths)
    again = opened(root, holdout_fraction=0.0).sample(generator(seed), budget)
    assert [a.rollout_id for a in again] == [a.rollout_id for a in drawn]


def test_fresh_policy_versions_are_drawn_more_often(tmp_path: Path) -> None:
    fill(tmp_path, [0, 1, 2])
    replay = opened(tmp_path, holdout_fraction=0.0, freshness=0.5)
    source = generator()
    drawn = Counter(replay.sample(source, 1)[0].policy_version for _ in range(7000))
    # As many rollouts of each version: weights 1/4, 1/2 and 1 of 7/4.
    for version, expected in ((0, 1000), (1, 2000), (2, 4000)):
        assert abs(drawn[version] - expected) < 5 * expected**0.5
    even = opened(tmp_path, holdout_fraction=0.0, freshness=1.0)
    drawn = Counter(even.sample(source, 1)[0].policy_version for _ in range(3000))
    assert all(abs(count - 1000) < 160 for count in drawn.values())


def test_a_sample_is_of_one_policy_version(tmp_path: Path) -> None:
    fill(tmp_path, [0, 1, 10**7])  # however old: no weight underflows
    replay = opened(tmp_path, holdout_fraction=0.0, freshness=1.0)
    source = generator()
    samples = [replay.sample(source, 1000) for _ in range(60)]
    versions = [{rollout.policy_version for rollout in sample} for sample in samples]
    assert all(len(found) == 1 for found in versions)
    assert set.union(*versions) == {0, 1, 10**7}
    assert all(len(sample) > 1 for sample in samples)


def test_stale_rollouts_are_not_trained_on(tmp_path: Path) -> None:
    fill(tmp_path, [0, 3, 5])
    replay = opened(tmp_path, holdout_fraction=0.0, max_staleness=2)
    assert {rollout.policy_version for rollout in replay.training} == {3, 5}


def test_the_oldest_segments_are_forgotten_and_deleted_only_by_the_owner(tmp_path: Path) -> None:
    paths = fill(tmp_path, [0, 1, 2, 3])
    budget = 5 * paths[0].stat().st_size // 2
    reader = opened(tmp_path, holdout_fraction=0.0, max_bytes=budget)
    assert {rollout.policy_version for rollout in reader.training} == {2, 3}
    assert SpoolReader(tmp_path).segment_paths() == paths
    assert reader.refresh() == 0
    owner = opened(tmp_path, holdout_fraction=0.0, max_bytes=budget, evict=True)
    assert SpoolReader(tmp_path).segment_paths() == paths[2:]
    oldest = owner.training[0]
    fill(tmp_path, [4])
    assert owner.refresh() == 4
    assert SpoolReader(tmp_path).segment_paths()[0] == paths[3]
    assert int(oldest.tokens.sum()) > 0, "a rollout that was evicted stays readable"
    assert reader.refresh() == 4
    assert {rollout.policy_version for rollout in reader.training} == {3, 4}


def test_the_newest_segment_is_kept_whatever_its_size(tmp_path: Path) -> None:
    fill(tmp_path, [0, 1])
    replay = opened(tmp_path, holdout_fraction=0.0, max_bytes=1, evict=True)
    assert {rollout.policy_version for rollout in replay.training} == {1}


def test_a_damaged_segment_is_counted_and_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    paths = fill(tmp_path, [0, 1])
    paths[0].write_bytes(paths[0].read_bytes()[:-1])
    replay = Replay(tmp_path, holdout_fraction=0.0)
    with caplog.at_level(logging.WARNING):
        assert replay.refresh() == 4
        assert replay.refresh() == 0
    assert replay.damaged == 1
    assert caplog.text.count(str(paths[0])) == 1
    assert {rollout.policy_version for rollout in replay.training} == {1}


def test_rollouts_without_their_policy_s_head_wait_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, [0])
    writer = SpoolWriter(tmp_path, "engine-1")
    writer.write([make_rollout(50, policy_version=1)], LAYOUT)
    replay = Replay(tmp_path, holdout_fraction=0.0)
    with caplog.at_level(logging.WARNING):
        replay.refresh()
        replay.refresh()
    assert caplog.text.count("its rollouts cannot be used") == 1
    assert {rollout.policy_version for rollout in replay.training} == {0}
    with pytest.raises(RolloutError, match="missing"):
        replay.head(1)
    writer.write_head(make_head(1))
    replay.refresh()
    assert sorted(replay.heads_of(replay.training)) == [0, 1]
    assert torch.equal(replay.head(1).lm_head, make_head(1).lm_head)
    assert replay.head(1) is replay.head(1)


def test_rollouts_go_with_a_head_that_their_engine_has_let_go(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, [0, 1])
    replay = opened(tmp_path, holdout_fraction=0.0)
    assert {rollout.policy_version for rollout in replay.training} == {0, 1}
    next((tmp_path / "heads").glob("*0.safetensors")).unlink()
    with caplog.at_level(logging.WARNING):
        replay.refresh()
    assert {rollout.policy_version for rollout in replay.training} == {1}
    assert not caplog.records


def test_segments_that_no_head_will_come_for_are_let_go(tmp_path: Path) -> None:
    first, *_ = paths = fill(tmp_path, [*range(HEADS_KEPT)])
    replay = opened(tmp_path, holdout_fraction=0.0)
    assert all(str(path) in Path("/proc/self/maps").read_text() for path in paths)
    fill(tmp_path, [HEADS_KEPT])
    assert replay.refresh() == 4
    assert str(first) not in Path("/proc/self/maps").read_text()
    versions = {rollout.policy_version for rollout in replay.training}
    assert versions == {*range(1, HEADS_KEPT + 1)}
    assert first.exists()


def test_segments_of_another_layout_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill(tmp_path, [0])
    writer = SpoolWriter(tmp_path, "engine-1")
    writer.write_head(make_head(1))
    writer.write([make_rollout(50, policy_version=1, layout=NO_AUX)], NO_AUX)
    with caplog.at_level(logging.WARNING):
        replay = opened(tmp_path, holdout_fraction=0.0)
    assert replay.layout == NO_AUX
    assert ids(replay) == ["request-50"]
    assert "another layout" in caplog.text


def test_an_empty_spool_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(RolloutError, match="expected a spool folder"):
        Replay(tmp_path / "typo")
    assert list(tmp_path.iterdir()) == []
    replay = opened(tmp_path / "spool", evict=True)
    assert replay.segments_folder.is_dir()
    for use in (lambda: replay.sample(generator(), 1), lambda: replay.layout):
        with pytest.raises(RolloutError, match="none to"):
            use()


def test_order_within_a_segment_is_the_order_of_writing(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, "engine-0")
    writer.write_head(make_head())
    names = ["c", "a", "b"]
    writer.write([replace(make_rollout(i), rollout_id=n) for i, n in enumerate(names)], LAYOUT)
    assert ids(opened(tmp_path, holdout_fraction=0.0)) == names
