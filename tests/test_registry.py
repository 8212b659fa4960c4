"""The registry: whatever happens to writers, readers find whole versions and nothing else."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from drafter_files import CONFIG, NOTHING, TARGET, make_tensors, write_drafter
from hypothesis import given, settings
from hypothesis import strategies as st
from killable import Workers

from drafttrain.checkpoints.manifest import (
    Acceptance,
    Lineage,
    Manifest,
    TargetFingerprint,
    digest_of,
)
from drafttrain.checkpoints.registry import Registry, _copy
from drafttrain.checkpoints.verify import verify
from drafttrain.errors import CheckpointError, OvertakenError

PUBLISHER = """
from drafter_files import NOTHING
from drafttrain.checkpoints.manifest import TargetFingerprint
from drafttrain.checkpoints.registry import Registry

def work(root, folder, count, target):
    registry, target = Registry(root), TargetFingerprint.model_validate_json(target)
    for _ in range(count):
        registry.publish(
            folder, kind="eagle3", target=target, parent=None, lineage=NOTHING, acceptance=None
        )
"""


@pytest.fixture
def drafter(tmp_path: Path) -> Path:
    return write_drafter(tmp_path / "drafter")


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def publish(
    registry: Registry,
    folder: Path,
    parent: int | None = None,
    target: TargetFingerprint = TARGET,
) -> Manifest:
    return registry.publish(
        folder, kind="eagle3", target=target, parent=parent, lineage=NOTHING, acceptance=None
    )


def test_a_published_version_is_whole_and_servable(registry: Registry, drafter: Path) -> None:
    lineage = Lineage(policy_versions=[3, 4], rollouts=5, tokens=600, optimizer_steps=7)
    acceptance = Acceptance(
        acceptance_length=2.5,
        accepted_per_position=[0.9, 0.6],
        k=2,
        temperature=1.0,
        draft_sample_method="probabilistic",
        interval=(2.4, 2.6),
        held_out_rollouts=9,
    )
    manifest = registry.publish(
        drafter, kind="eagle3", target=TARGET, parent=None, lineage=lineage, acceptance=acceptance
    )
    assert (manifest.version, manifest.layer_ids) == (1, [1, 2, 4])
    assert registry.manifest(1) == manifest
    folder = registry.folder(1)
    assert folder == registry.root / "drafter" / "v000001"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "manifest.json",
        "model.safetensors",
    ]
    verified = verify(folder, TARGET)
    assert verified.manifest == manifest
    assert verified.manifest.tensors["fc.weight"].shape == [8, 24]


def test_weights_may_be_as_large_as_their_config_says(registry: Registry, tmp_path: Path) -> None:
    config = {**CONFIG, "intermediate_size": 100_000}  # 9.6 MB
    publish(registry, write_drafter(tmp_path / "large", config, make_tensors(config)))
    verify(registry.folder(1), TARGET)


def test_pointers_follow_publishing_and_people(registry: Registry, drafter: Path) -> None:
    assert registry.latest() is registry.stable() is None
    assert registry.versions() == []
    for version in (1, 2, 3):
        publish(registry, drafter, parent=version - 1 or None)
        assert registry.latest() == version
    assert registry.stable() is None
    registry.mark_stable(2)
    registry.set_latest(1)
    assert (registry.latest(), registry.stable()) == (1, 2)
    assert os.readlink(registry.root / "drafter" / "latest") == "v000001"
    with pytest.raises(CheckpointError, match="version 9: does not exist"):
        registry.mark_stable(9)
    assert publish(registry, drafter).version == 4


def test_a_version_that_is_to_follow_another_follows_no_third(
    registry: Registry, drafter: Path
) -> None:
    def publish_over(version: int) -> int:
        facts: dict[str, Any] = {"parent": version, "lineage": NOTHING, "acceptance": None}
        made = registry.publish(drafter, kind="eagle3", target=TARGET, over=version, **facts)
        return made.version

    publish(registry, drafter)
    assert publish_over(1) == 2
    with pytest.raises(OvertakenError, match="latest: version: 2, expected 1"):
        publish_over(1)
    registry.set_latest(1)
    with pytest.raises(OvertakenError, match="latest: version: 1, expected 2"):
        publish_over(2)
    assert registry.versions() == [1, 2]
    assert publish_over(1) == 3


def test_the_registry_can_be_moved_and_reopened(registry: Registry, drafter: Path) -> None:
    publish(registry, drafter)
    moved = registry.root.rename(registry.root.with_name("elsewhere"))
    reopened = Registry.open(moved)
    assert reopened.latest() == 1
    verify(moved / "drafter" / "latest", TARGET)
    link = registry.root.with_name("link")
    link.symlink_to(moved)
    assert Registry.open(link).manifest(1).version == 1


def test_a_series_that_was_removed_begins_again(registry: Registry, drafter: Path) -> None:
    for _ in range(2):
        publish(registry, drafter)
    shutil.rmtree(registry.root / "drafter")
    assert (registry.versions(), registry.latest()) == ([], None)
    facts: dict[str, Any] = {"parent": 2, "lineage": NOTHING, "acceptance": None}
    assert registry.publish(drafter, kind="eagle3", target=TARGET, over=2, **facts).version == 1


def test_prune_spares_the_newest_and_what_pointers_name(registry: Registry, drafter: Path) -> None:
    for _ in range(6):
        publish(registry, drafter)
    registry.mark_stable(2)
    registry.set_latest(3)
    assert registry.prune(keep=2) == [1, 4]
    assert registry.versions() == [2, 3, 5, 6]
    assert not list(registry.root.glob("drafter/.unfinished-*")), "the disk has its room again"
    assert publish(registry, drafter).version == 7
    with pytest.raises(ValueError, match="newest"):
        registry.prune(keep=0)


def test_an_unsound_drafter_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    publish(registry, write_drafter(tmp_path / "sound"))
    before = sorted(registry.root.rglob("*"))
    tensors = make_tensors(CONFIG)
    tensors["norm.weight"][0] = float("nan")
    unsound = write_drafter(tmp_path / "unsound", CONFIG, tensors)
    with pytest.raises(CheckpointError, match=r"norm\.weight: holds NaN") as caught:
        publish(registry, unsound)
    assert Path(caught.value.where).parent == unsound
    with pytest.raises(CheckpointError, match="kind: holds eagle3, asked to publish mtp"):
        registry.publish(
            tmp_path / "sound",
            kind="mtp",
            target=TARGET,
            parent=None,
            lineage=NOTHING,
            acceptance=None,
        )
    assert sorted(registry.root.rglob("*")) == before


def test_a_drafter_written_over_while_it_is_copied_changes_nothing(
    registry: Registry, drafter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(registry, drafter)
    before = sorted(registry.root.rglob("*"))
    unsound = make_tensors(CONFIG)
    unsound["norm.weight"][0] = float("nan")

    def copy_late(source: Path, goal: Path) -> str:
        write_drafter(source.parent, CONFIG, unsound)
        return _copy(source, goal)

    monkeypatch.setattr("drafttrain.checkpoints.registry._copy", copy_late)
    with pytest.raises(CheckpointError, match=r"norm\.weight: holds NaN"):
        publish(registry, drafter)
    assert sorted(registry.root.rglob("*")) == before


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_version_that_was_touched_is_refused(
    registry: Registry, drafter: Path, name: str
) -> None:
    publish(registry, drafter)
    path = registry.folder(1) / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="sha256") as caught:
        verify(registry.folder(1), TARGET)
    assert caught.value.where == str(path)


def test_a_manifest_that_lies_is_refused(registry: Registry, drafter: Path) -> None:
    publish(registry, drafter)
    path = registry.folder(1) / "manifest.json"
    original = json.loads(path.read_text())
    for field, lie in (
        ("kind", "mtp"),
        ("layer_ids", [1, 2, 3]),
        ("tensors", {}),
        ("files", {"../../registry.json": "0" * 64}),
        ("schema_version", 2),
        ("schema_version", None),
        ("surprise", 1),
    ):
        path.write_text(json.dumps(sealed({**original, field: lie})))
        with pytest.raises(CheckpointError) as caught:
            verify(registry.folder(1), TARGET)
        assert (caught.value.where, caught.value.field) == (str(path), field)
    path.write_text(json.dumps(sealed({**original, "version": 2})))
    with pytest.raises(CheckpointError, match="version"):
        registry.manifest(1)


def sealed(document: dict[str, Any]) -> dict[str, Any]:
    """A manifest whose digest is right."""
    rest = {key: value for key, value in document.items() if key != "digest"}
    return {**rest, "digest": digest_of(rest)}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_no_damaged_manifest_passes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Truncated anywhere, or with any one bit flipped."""
    root = tmp_path_factory.mktemp("registry")
    registry = Registry(root / "registry")
    publish(registry, write_drafter(root / "drafter"))
    path = registry.folder(1) / "manifest.json"
    content = bytearray(path.read_bytes())
    cut = data.draw(st.none() | st.integers(0, len(content) - 3), label="cut")
    if cut is None:
        index = data.draw(st.integers(0, len(content) - 2))
        content[index] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content[:cut])
    with pytest.raises(CheckpointError):
        registry.manifest(1)


def test_what_is_no_file_is_refused_without_waiting(registry: Registry, drafter: Path) -> None:
    publish(registry, drafter)
    for name in ("model.safetensors", "config.json", "manifest.json"):
        path = registry.folder(1) / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)  # whoever opens it waits for a writer
        with pytest.raises(CheckpointError):
            verify(registry.folder(1), TARGET)
        path.unlink()
        path.write_bytes(content)
    with (registry.folder(1) / "model.safetensors").open("r+b") as file:
        file.truncate(1 << 40)  # sparse: hashing it would take an hour
    with pytest.raises(CheckpointError, match="expected at most"):
        verify(registry.folder(1), TARGET)


def test_a_drafter_for_another_policy_is_refused(registry: Registry, drafter: Path) -> None:
    publish(registry, drafter)
    for change in ({"hidden_size": 16}, {"vocab_size": 21}, {"num_hidden_layers": 40}):
        with pytest.raises(CheckpointError, match="but the policy has"):
            verify(registry.folder(1), TARGET.model_copy(update=change))


def test_a_newer_or_missing_registry_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"registry\.json: missing"):
        Registry.open(tmp_path)
    assert list(tmp_path.iterdir()) == []
    Registry(tmp_path)
    (tmp_path / "registry.json").write_text('{"schema_version": 2}')
    for opening in (Registry, Registry.open):
        with pytest.raises(CheckpointError, match="2 is newer than 1"):
            opening(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", ".hidden", "a b", "a\n"])
def test_names_that_could_leave_the_root_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="name"):
        Registry(tmp_path / "registry", name)
    assert list(tmp_path.iterdir()) == []


def test_links_that_leave_the_root_are_refused(
    registry: Registry, drafter: Path, tmp_path: Path
) -> None:
    publish(registry, drafter)
    home = registry.root / "drafter"
    outside = tmp_path / "outside"
    shutil.copytree(registry.folder(1), outside)
    (home / "v000007").symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out"):
        registry.folder(7)
    for name in ("model.safetensors", "manifest.json"):
        path = home / "v000001" / name
        path.unlink()
        path.symlink_to(outside / name)
        with pytest.raises(CheckpointError, match="leads out"):
            registry.folder(1)
        path.unlink()
        path.symlink_to(path)
        with pytest.raises(CheckpointError):
            registry.folder(1)
        path.unlink()
        shutil.copy(outside / name, path)
    (home / "stable").symlink_to("../../outside")
    with pytest.raises(CheckpointError, match="expected a version folder"):
        registry.stable()
    assert publish(registry, drafter).version == 8


def test_a_pointer_that_was_copied_as_a_folder_is_refused(
    registry: Registry, drafter: Path
) -> None:
    publish(registry, drafter)
    latest = registry.root / "drafter" / "latest"
    latest.unlink()
    shutil.copytree(registry.folder(1), latest)
    with pytest.raises(CheckpointError, match="latest: pointer: expected a symbolic link"):
        registry.latest()


def test_what_dead_writers_left_is_in_nobodys_way(
    registry: Registry, drafter: Path, tmp_path: Path
) -> None:
    publish(registry, drafter)
    home = registry.root / "drafter"
    (home / ".unfinished-latest").symlink_to("v000001")
    shutil.copytree(drafter, home / ".unfinished-000002")
    assert publish(registry, drafter).version == 2
    assert not list(home.glob(".unfinished-*"))
    (tmp_path / f".registry.json.{os.getpid()}").touch()  # in containers every writer may be 1
    Registry(tmp_path)


def test_a_registry_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be written"):
        Registry(tmp_path / "file" / "registry")


def test_two_publishers_at_once_get_different_versions(registry: Registry, drafter: Path) -> None:
    arguments = (str(registry.root), str(drafter), 20, TARGET.model_dump_json())
    with Workers(PUBLISHER) as workers:
        publishers = [workers.start(*arguments) for _ in range(2)]
        served = 0
        while served < 30:  # a reader never finds the pointer gone, going back, or at a half
            latest = registry.latest() or 0
            assert latest >= served
            if latest > served:
                verify(registry.folder(latest), TARGET)
                served = latest
        assert [workers.wait(publisher) for publisher in publishers] == [0, 0]
    assert registry.versions() == list(range(1, 41))
    assert registry.latest() == 40


def test_killing_publishers_at_any_moment_leaves_only_whole_versions(
    registry: Registry, tmp_path: Path
) -> None:
    config = {**CONFIG, "vocab_size": 5_000}
    target = TARGET.model_copy(update={"vocab_size": 5_000})
    drafter = write_drafter(tmp_path / "drafter", config, make_tensors(config))
    arguments = (str(registry.root), str(drafter), 10_000, target.model_dump_json())
    moments = random.Random(0)
    seen: set[int] = set()
    caught_at_work = 0
    with Workers(PUBLISHER) as workers:
        for _ in range(12):
            publishers = [workers.start(*arguments) for _ in range(2)]
            while len(registry.versions()) == len(seen):
                time.sleep(0.001)
            time.sleep(moments.uniform(0.0, 0.02))
            for publisher in publishers:
                workers.kill(publisher)
            caught_at_work += any(registry.root.glob("drafter/.unfinished-*"))
            for version in set(registry.versions()) - seen:
                manifest = verify(registry.folder(version), target).manifest
                assert manifest is not None
                assert manifest.version == version
                seen.add(version)
            assert registry.latest() in seen
    assert caught_at_work > 0
    assert publish(registry, drafter, target=target).version == len(seen) + 1
    assert not list(registry.root.glob("drafter/.unfinished-*"))


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_leaves_the_registry_as_it_was(
    registry: Registry, drafter: Path
) -> None:
    publish(registry, drafter)
    before = sorted(registry.root.rglob("*"))
    with files_no_larger_than(1000), pytest.raises(CheckpointError, match="cannot be written"):
        publish(registry, drafter)
    assert sorted(registry.root.rglob("*")) == before
    assert publish(registry, drafter).version == 2


def test_a_removed_version_stays_readable_for_who_has_it(registry: Registry, drafter: Path) -> None:
    publish(registry, drafter)
    tensors = verify(registry.folder(1)).tensors
    publish(registry, drafter)
    registry.prune(keep=1)
    assert torch.equal(tensors["fc.weight"], make_tensors(CONFIG)["fc.weight"])
