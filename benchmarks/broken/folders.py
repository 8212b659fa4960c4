"""Version folders of a registry: torn by accidents, or leading elsewhere."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from benchmarks.broken.content import (
    OF_ANY_FILE,
    BytesDamage,
    claim_a_huge_header,
    many_tensors,
)
from drafttrain.checkpoints.manifest import digest_of

FolderDamage = Callable[[Path, random.Random], None]

CONFIG, WEIGHTS, MANIFEST = "config.json", "model.safetensors", "manifest.json"
LAYER = "midlayer."
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
    *(_torn(name, damage) for damage in OF_ANY_FILE for name in (CONFIG, WEIGHTS, MANIFEST)),
    *(_torn(WEIGHTS, damage) for damage in (claim_a_huge_header, many_tensors)),
    swap_two_tensors,
    another_versions_file,
    *[a_field_of_the_manifest] * 10,
]


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
