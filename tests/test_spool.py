"""The spool: what is written is what is read, and nothing damaged or half gets through."""

from __future__ import annotations

import json
import os
import random
import resource
import stat
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from killable import Workers
from rollout_files import HALF, HIDDEN, LAYOUT, NO_AUX, fill, make_head, make_rollout
from safetensors.torch import load_file
from torch import Tensor

from drafttrain.errors import RolloutError, SpoolError
from drafttrain.rollouts.files import save
from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout
from drafttrain.rollouts.spool import HEADS_KEPT, SpoolReader, SpoolWriter

WRITER = """
from rollout_files import LAYOUT, make_head, make_rollout
from drafttrain.rollouts.spool import SpoolWriter

def work(root, engine):
    writer = SpoolWriter(root, engine)
    rollouts = [make_rollout(seed, length=20_000) for seed in range(3)]
    while True:
        writer.write_head(make_head())
        for rollout in rollouts:
            writer.write([rollout], LAYOUT)
"""


def same(left: Rollout | PolicyHead, right: Rollout | PolicyHead) -> bool:
    """Every field equal, tensors in dtype, shape and value."""
    for field in fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if a.dtype != b.dtype or not torch.equal(a, b):
                return False
        elif a != b:
            return False
    return True


rollouts_of_one_segment = st.lists(
    st.tuples(
        st.integers(1, 9),
        st.integers(0, 9),
        st.sampled_from(["stop", "length", "abort", None]),
        st.integers(0, 2**40),
        st.none() | st.floats(allow_nan=False, allow_infinity=False),
        st.floats(0, 10),
        st.text(max_size=5),
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(
    drawn=rollouts_of_one_segment,
    policy_version=st.integers(0, 10**9),
    drafter_version=st.none() | st.integers(0, 10**6),
    layout=st.sampled_from([LAYOUT, NO_AUX, HALF]),
    tells_rejections=st.booleans(),
)
def test_a_segment_reads_back_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    drawn: list[tuple[Any, ...]],
    policy_version: int,
    drafter_version: int | None,
    layout: FeatureLayout,
    tells_rejections: bool,
) -> None:
    rollouts = [
        replace(
            make_rollout(
                seed,
                length=length,
                prompt_length=min(prompt, length),
                policy_version=policy_version,
                layout=layout,
            ),
            rollout_id=name,
            drafter_version=drafter_version,
            finish_reason=finish,
            rounds=count,
            drafted=count + 1,
            accepted=count,
            reward=reward,
            temperature=temperature,
            rejected=torch.arange(length) % 3 == 1 if tells_rejections else None,
        )
        for seed, (length, prompt, finish, count, reward, temperature, name) in enumerate(drawn)
    ]
    root = tmp_path_factory.mktemp("spool")
    path = SpoolWriter(root, "engine-0").write(rollouts, layout)
    reader = SpoolReader(root)
    assert reader.segment_paths() == [path]
    segment = reader.read(path)
    assert (segment.engine, segment.layout) == ("engine-0", layout)
    assert (segment.policy_version, segment.drafter_version) == (policy_version, drafter_version)
    assert len(segment.rollouts) == len(rollouts)
    assert all(same(a, b) for a, b in zip(segment.rollouts, rollouts, strict=True))
    assert same(segment.rollouts[-1], rollouts[-1])
    assert len(segment.rollouts[1:]) == len(rollouts) - 1


def test_the_file_is_as_documented(tmp_path: Path) -> None:
    (path,) = fill(tmp_path, [7], rollouts=3, length=5)
    assert path == tmp_path / "segments" / "00000007-engine-0-00000000.safetensors"
    tensors = load_file(path)
    found = {name: (tensor.dtype, list(tensor.shape)) for name, tensor in tensors.items()}
    assert found == {
        "tokens": (torch.int32, [15]),
        "offsets": (torch.int64, [4]),
        "prompt_lengths": (torch.int64, [3]),
        "captured": (torch.bool, [15]),
        "last_hidden": (torch.bfloat16, [15, HIDDEN]),
        "aux_hidden": (torch.bfloat16, [15, 3, HIDDEN]),
    }
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_rollouts_are_views_that_outlive_the_file(tmp_path: Path) -> None:
    (path,) = fill(tmp_path, [0])
    rollouts = list(SpoolReader(tmp_path).read(path).rollouts)
    path.unlink()
    assert all(same(a, make_rollout(seed)) for seed, a in enumerate(rollouts))
    first, last = rollouts[0].tokens, rollouts[-1].tokens
    assert last.data_ptr() - first.data_ptr() == 4 * 6 * 3  # end to end in one map


def test_segments_are_listed_oldest_first_and_never_replaced(tmp_path: Path) -> None:
    a, b = (SpoolWriter(tmp_path, name) for name in ("a", "b"))
    twin = SpoolWriter(tmp_path, "a")  # two engines that were given the same name
    written = [
        writer.write([make_rollout(policy_version=version)], LAYOUT).name
        for writer, version in ((b, 0), (a, 1), (a, 0), (twin, 1), (b, 1), (a, 10))
    ]
    assert len(set(written)) == 6
    listed = [path.stem for path in SpoolReader(tmp_path).segment_paths()]
    assert listed == [
        "00000000-b-00000000",
        "00000000-a-00000001",
        "00000001-a-00000000",
        "00000001-a-00000001",
        "00000001-b-00000001",
        "00000010-a-00000002",
    ]


def test_a_new_writer_counts_on(tmp_path: Path) -> None:
    fill(tmp_path, [0, 0])
    (path,) = fill(tmp_path, [0])
    assert path.name == "00000000-engine-0-00000002.safetensors"
    assert len(SpoolReader(tmp_path).segment_paths()) == 3


def test_full_counts_the_segments_on_disk(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, "engine-0", max_bytes=1)
    assert not writer.full
    path = writer.write([make_rollout()], LAYOUT)
    assert writer.full
    path.unlink()
    assert not writer.full


@pytest.mark.parametrize("name", ["", "a/b", "a b", "../a", "é"])
def test_engine_names_must_fit_into_a_file_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpoolError, match="engine name"):
        SpoolWriter(tmp_path, name)


@pytest.mark.parametrize(
    ("rollouts", "field"),
    [
        ([], "rollouts"),
        ([make_rollout(), make_rollout(policy_version=1)], "rollouts"),
        ([make_rollout(layout=NO_AUX)], "last_hidden"),
        ([replace(make_rollout(), aux_hidden=None)], "aux_hidden"),
        ([make_rollout(), replace(make_rollout(), aux_hidden=None)], "aux_hidden"),
        ([replace(make_rollout(), tokens=torch.arange(6))], "tokens"),
        ([replace(make_rollout(), captured=torch.ones(5, dtype=torch.bool))], "rollout request-0"),
        ([replace(make_rollout(), prompt_length=7)], "prompt_lengths"),
        ([replace(make_rollout(), temperature=float("nan"))], "temperature"),
        ([replace(make_rollout(), finish_reason="tired")], "finish_reason"),
        ([replace(make_rollout(), accepted=-1)], "accepted"),
        ([replace(make_rollout(), reward=float("nan"))], "reward"),
        ([make_rollout(), make_rollout(layout=HALF)], "last_hidden"),
    ],
)
def test_what_a_reader_would_refuse_is_not_written(
    tmp_path: Path, rollouts: list[Rollout], field: str
) -> None:
    writer = SpoolWriter(tmp_path, "engine-0")
    with pytest.raises(RolloutError) as caught:
        writer.write(rollouts, LAYOUT)
    assert caught.value.field == field
    assert files_in(tmp_path) == []


@pytest.mark.parametrize("name", ["captured", "last_hidden", "aux_hidden", "generated", "rejected"])
def test_no_rollout_takes_rows_of_another(tmp_path: Path, name: str) -> None:
    """Together they are as many as the tokens."""
    flags = torch.ones(6, dtype=torch.bool)
    whole = replace(make_rollout(), generated=flags, rejected=flags)
    rows = getattr(whole, name)
    rollouts = [replace(whole, **{name: rows[:5]}), replace(whole, **{name: rows[[*range(6), 5]]})]
    with pytest.raises(RolloutError, match="do not have its 6 rows"):
        SpoolWriter(tmp_path, "engine-0").write(rollouts, LAYOUT)


def rewrite(path: Path, tensors: dict[str, Tensor], **header: Any) -> None:
    """The segment as another would write it, with some tensors and header entries replaced."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    del metadata["checksum"]
    document = json.loads(metadata["segment"]) | header
    metadata |= {"segment": json.dumps(document)}
    if "schema_version" in header:
        metadata["schema_version"] = header["schema_version"]
    changed = {**{n: t.clone() for n, t in load_file(path).items()}, **tensors}
    save(path, {n: [t] for n, t in changed.items() if t.numel()}, metadata)


LAYOUT_IN_JSON = {
    "layer_ids": [1, 2, 4],
    "hidden_size": HIDDEN,
    "last_hidden_normed": True,
    "dtype": "bfloat16",
}
GONE = torch.zeros(0)


@pytest.mark.parametrize(
    ("tensors", "header", "field"),
    [
        ({"tokens": GONE}, {}, "tokens"),
        ({"tokens": torch.zeros(24)}, {}, "tokens"),
        ({"tokens": torch.tensor(3, dtype=torch.int32)}, {}, "tokens"),
        ({"tokens": torch.full((24,), -1, dtype=torch.int32)}, {}, "tokens"),
        ({"tokens": torch.zeros(23, dtype=torch.int32)}, {}, "captured"),
        ({"offsets": torch.tensor([0, 6, 12, 24])}, {}, "offsets"),
        ({"offsets": torch.tensor([0, 6, 12, 18, 25])}, {}, "offsets"),
        ({"offsets": torch.tensor([1, 6, 12, 18, 24])}, {}, "offsets"),
        ({"offsets": torch.tensor([0, 12, 6, 18, 24])}, {}, "offsets"),
        ({"offsets": torch.tensor([0, 6, 6, 18, 24])}, {}, "offsets"),
        ({"offsets": torch.tensor([0, 2**62, -(2**62), 18, 24])}, {}, "offsets"),
        ({"prompt_lengths": torch.tensor([2, 2, 2, 7])}, {}, "prompt_lengths"),
        ({"prompt_lengths": torch.tensor([2, 2, 2, -1])}, {}, "prompt_lengths"),
        ({"captured": torch.ones(24)}, {}, "captured"),
        ({"captured": torch.full((24,), 2, dtype=torch.uint8).view(torch.bool)}, {}, "captured"),
        ({"last_hidden": torch.zeros(24, HIDDEN)}, {}, "last_hidden"),
        ({"aux_hidden": GONE}, {}, "aux_hidden"),
        ({"aux_hidden": torch.zeros(24, 2, HIDDEN, dtype=torch.bfloat16)}, {}, "aux_hidden"),
        ({"rejected": torch.zeros(24)}, {}, "rejected"),
        ({"rejected": torch.full((24,), 2, dtype=torch.uint8).view(torch.bool)}, {}, "rejected"),
        ({"surprise": torch.ones(1)}, {}, "surprise"),
        ({}, {"layout": {**LAYOUT_IN_JSON, "layer_ids": []}}, "aux_hidden"),
        ({}, {"layout": {**LAYOUT_IN_JSON, "dtype": "int8"}}, "dtype"),
        ({}, {"layout": {**LAYOUT_IN_JSON, "hidden_size": 5}}, "last_hidden"),
        ({}, {"policy_version": 1}, "policy_version"),
        ({}, {"policy_version": "0"}, "policy_version"),
        ({}, {"surprise": 1}, "surprise"),
        ({}, {"rollouts": []}, "rollouts"),
        ({}, {"rollouts": [{}]}, "rollouts.0.rollout_id"),
        ({}, {"schema_version": "2"}, "schema_version"),
        ({}, {"schema_version": "one"}, "schema_version"),
    ],
)
def test_a_segment_that_contradicts_itself_is_refused_by_field(
    tmp_path: Path, tensors: dict[str, Tensor], header: dict[str, Any], field: str
) -> None:
    (path,) = fill(tmp_path, [0])
    rewrite(path, tensors, **header)
    with pytest.raises(RolloutError) as caught:
        SpoolReader(tmp_path).read(path)
    assert (caught.value.where, caught.value.field) == (str(path), field), str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_damaged_file_passes_or_crashes(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Truncated anywhere, or with any one bit flipped."""
    root = tmp_path_factory.mktemp("spool")
    (path,) = fill(root, [0])
    content = bytearray(path.read_bytes())
    cut = data.draw(st.none() | st.integers(0, len(content) - 1), label="cut")
    if cut is None:
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content[:cut])
    with pytest.raises(RolloutError):
        SpoolReader(root).read(path)


@pytest.mark.parametrize("length", [1 << 62, 101_000_000, 99_000_000, 3, 0])
def test_a_hostile_header_length_takes_no_memory(tmp_path: Path, length: int) -> None:
    path = tmp_path / "00000000-a-00000000.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}" + b" " * 64)
    with pytest.raises(RolloutError, match="not a whole safetensors file"):
        SpoolReader(tmp_path).read(path)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_reads_back_as_it_was_written(tmp_path: Path, tied: bool) -> None:
    head = make_head(5)
    if tied:
        head = replace(head, lm_head=head.embed_tokens, final_norm=None)
    path = SpoolWriter(tmp_path, "engine-0").write_head(head)
    assert path == tmp_path / "heads" / "00000005.safetensors"
    reader = SpoolReader(tmp_path)
    assert reader.heads() == [5]
    assert same(reader.read_head(5), head)
    with pytest.raises(RolloutError, match="missing"):
        reader.read_head(4)


def test_only_the_newest_heads_are_kept(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, "engine-0")
    for version in range(HEADS_KEPT + 3):
        writer.write_head(make_head(version))
    assert SpoolReader(tmp_path).heads() == list(range(3, HEADS_KEPT + 3))


@pytest.mark.parametrize(
    ("tensors", "metadata", "field"),
    [
        ({"embed_tokens": torch.zeros(10)}, {}, "embed_tokens"),
        ({"lm_head": torch.zeros(9, HIDDEN)}, {}, "lm_head"),
        ({"final_norm": torch.zeros(3)}, {}, "final_norm"),
        ({"final_norm": torch.zeros(HIDDEN, dtype=torch.int32)}, {}, "final_norm"),
        ({"other": torch.zeros(1)}, {}, "other"),
        ({}, {"norm_eps": "small"}, "norm_eps"),
        ({}, {"policy_version": "4"}, "policy_version"),
        ({}, {"schema_version": "2"}, "schema_version"),
        ({}, {"checksum": "00000000"}, "checksum"),
    ],
)
def test_a_damaged_head_is_refused_by_field(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], field: str
) -> None:
    path = SpoolWriter(tmp_path, "engine-0").write_head(make_head(5))
    sound = {name: tensor.clone() for name, tensor in load_file(path).items()}
    changed = {name: [tensor] for name, tensor in {**sound, **tensors}.items()}
    save(path, changed, {"policy_version": "5", "norm_eps": "1e-06", **metadata})
    with pytest.raises(RolloutError) as caught:
        SpoolReader(tmp_path).read_head(5)
    assert (caught.value.where, caught.value.field) == (str(path), field)


def test_a_spool_that_does_not_exist_yet_reads_as_empty(tmp_path: Path) -> None:
    reader = SpoolReader(tmp_path / "later")
    assert reader.segment_paths() == reader.heads() == []
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("cannot mount a file system here")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_is_a_spool_error_and_leaves_nothing(tiny_disk: Path) -> None:
    writer = SpoolWriter(tiny_disk, "engine-0")
    kept = writer.write([make_rollout(length=2000)], LAYOUT)
    for write in (
        lambda: writer.write([make_rollout(length=10_000)], LAYOUT),
        lambda: writer.write_head(replace(make_head(), embed_tokens=torch.zeros(10**5, HIDDEN))),
    ):
        with pytest.raises(SpoolError, match="No space left on device"):
            write()
        assert files_in(tiny_disk) == [kept]
    assert writer.write([make_rollout()], LAYOUT).exists()


def test_a_file_limit_is_a_spool_error_and_leaves_nothing(tmp_path: Path) -> None:
    writer = SpoolWriter(tmp_path, "engine-0")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(SpoolError, match="cannot be written"):
            writer.write([make_rollout(length=10_000)], LAYOUT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_in(tmp_path) == []
    assert writer.write([make_rollout()], LAYOUT).exists()


def test_a_spool_that_is_a_file_or_vanishes_is_a_spool_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpoolError, match="cannot be written"):
        SpoolWriter(tmp_path / "file", "engine-0")
    writer = SpoolWriter(tmp_path / "spool", "engine-0")
    (tmp_path / "spool").rename(tmp_path / "elsewhere")
    with pytest.raises(SpoolError, match="cannot be written"):
        writer.write([make_rollout()], LAYOUT)


def test_killing_writers_at_any_moment_leaves_only_whole_files(tmp_path: Path) -> None:
    moments = random.Random(0)
    reader = SpoolReader(tmp_path)
    survivor = SpoolWriter(tmp_path, "survivor")
    unfinished = tmp_path / "unfinished"
    sound: set[Path] = set()

    def read_new() -> None:
        for path in set(reader.segment_paths()) - sound:
            assert reader.read(path).rollouts[0].length == 20_000
            sound.add(path)
        for version in reader.heads():
            assert same(reader.read_head(version), make_head(version))

    with Workers(WRITER) as workers:
        for _ in range(12):
            writers = [workers.start(str(tmp_path), f"engine-{number}") for number in range(2)]
            while not sound:
                read_new()
            stop = time.monotonic() + moments.uniform(0.0, 0.02)
            while time.monotonic() < stop:
                read_new()
            for writer in writers:
                workers.kill(writer)
            read_new()
            for path in sound:  # keeps the folder small
                path.unlink()
            sound.clear()
    assert len(list(unfinished.iterdir())) > 1
    SpoolWriter(tmp_path, "next")
    assert len(list(unfinished.iterdir())) == 2, "its own, and that of the one still alive"
    assert survivor.write([make_rollout()], LAYOUT).exists()


def files_in(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())
