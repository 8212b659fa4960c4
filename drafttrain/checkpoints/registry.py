"""A directory of immutable drafter versions, shared by the sidecar, engines and people.

::

    REGISTRY/registry.json                          {"schema_version": 1}
    REGISTRY/<name>/v000042/config.json             a folder that an engine can serve
                            model.safetensors
                            manifest.json
    REGISTRY/<name>/latest -> v000042               what engines are to serve
    REGISTRY/<name>/stable -> v000040               what they fall back to

Writers take a lock that dies with them; a version is made in a hidden folder and appears by one
rename, whole and verified. So readers need no lock, and any hidden folder that a writer finds once
it has the lock was left by a dead one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from drafttrain import __version__
from drafttrain.checkpoints.formats import aux_layer_ids, kind_of
from drafttrain.checkpoints.manifest import (
    FILE_NAME,
    SCHEMA_VERSION,
    Acceptance,
    Kind,
    Lineage,
    Manifest,
    TargetFingerprint,
    TensorSpec,
    check_schema,
    read_json,
)
from drafttrain.checkpoints.verify import FILES, Verified, dtype_name, verify
from drafttrain.errors import CheckpointError, OvertakenError

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
_VERSION = re.compile(r"v(\d{6,9})")
_UNFINISHED = ".unfinished-"
_BLOCK = 1 << 20


class Registry:
    """One named series of drafter versions. See the module.

    Attributes:
        root: the registry's folder.
        name: of the series.
    """

    def __init__(self, root: str | Path, name: str = "drafter") -> None:
        """Open a registry, or start one.

        Raises:
            CheckpointError: a bad name, a newer schema, or the folder cannot be written.
        """
        self.root, self.name = Path(root), _checked_name(root, name)
        self._home = self.root / name
        marker = self.root / "registry.json"
        try:
            self._home.mkdir(parents=True, exist_ok=True)
            if not marker.exists():
                _write_whole(marker, json.dumps({"schema_version": SCHEMA_VERSION}) + "\n")
        except OSError as error:
            raise CheckpointError(self.root, "folder", _unwritable(error)) from error
        self._check()

    @classmethod
    def open(cls, root: str | Path, name: str = "drafter") -> Registry:
        """Open a registry that exists already; writes nothing.

        Raises:
            CheckpointError: there is none, or it is of a newer schema.
        """
        registry = cls.__new__(cls)
        registry.root, registry.name = Path(root), _checked_name(root, name)
        registry._home = registry.root / name
        registry._check()
        return registry

    def publish(
        self,
        folder: str | Path,
        *,
        kind: Kind,
        target: TargetFingerprint,
        parent: int | None,
        lineage: Lineage,
        acceptance: Acceptance | None,
        over: int | None = None,
    ) -> Manifest:
        """Copy a drafter folder into the next version, verify it there, and make it the latest.

        Args:
            over: the version that must still be the latest; None asks for nothing.

        Raises:
            OvertakenError: another one is, published or rolled back to.
            CheckpointError: the folder is not a sound drafter of this kind for this target, or the
                registry cannot be written. The registry is then as before.
        """
        source = verify(folder, target)
        if kind != (found := kind_of(source.config)):
            raise CheckpointError(folder, "kind", f"holds {found}, asked to publish {kind}")
        with self._writing():
            self._check_latest(over)
            version = max(self._version_numbers(), default=0) + 1
            unfinished = self._home / f"{_UNFINISHED}{version:06d}"
            try:
                unfinished.mkdir()
                files = {name: _copy(Path(folder) / name, unfinished / name) for name in FILES}
                manifest = Manifest(
                    name=self.name,
                    version=version,
                    kind=kind,
                    parent=parent,
                    created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                    code=__version__,
                    target=target,
                    layer_ids=aux_layer_ids(source.config),
                    files=files,
                    tensors=_specs(source),
                    lineage=lineage,
                    acceptance=acceptance,
                )
                _write(unfinished / FILE_NAME, manifest.to_json().encode())
                verify(unfinished, target)
                _sync(unfinished)
                unfinished.rename(self._path(version))
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)  # gone, once it has its name
            _sync(self._home)
            self._point("latest", version)
        return manifest

    def versions(self) -> list[int]:
        """All published versions, oldest first."""
        return [number for number in self._version_numbers() if self._path(number).is_dir()]

    def folder(self, version: int) -> Path:
        """The folder of a version.

        Raises:
            CheckpointError: it does not exist, or leads out of the registry.
        """
        path = self._path(version)
        home = self.root.resolve() / self.name
        for part in (path, *(path / name for name in (*FILES, FILE_NAME))):
            if not _resolved(part).is_relative_to(home):
                raise CheckpointError(part, "link", "leads out of the registry")
        if not (path / FILE_NAME).is_file():
            raise CheckpointError(self._home, f"version {version}", "does not exist")
        return path

    def manifest(self, version: int) -> Manifest:
        """The manifest of a version.

        Raises:
            CheckpointError: the version does not exist or its manifest is damaged.
        """
        folder = self.folder(version)
        manifest = Manifest.read(folder)
        if (manifest.name, manifest.version) != (self.name, version):
            problem = f"{manifest.name} {manifest.version}, expected {self.name} {version}"
            raise CheckpointError(folder / FILE_NAME, "version", problem)
        return manifest

    def latest(self) -> int | None:
        """The version that engines are to serve; None while there is none."""
        return self._pointed("latest")

    def stable(self) -> int | None:
        """The version to fall back to; None while none was marked."""
        return self._pointed("stable")

    def set_latest(self, version: int) -> None:
        """Make engines serve another version (a rollback, say)."""
        with self._writing():
            self._point("latest", version)

    def mark_stable(self, version: int) -> None:
        """Make `version` the one to fall back to."""
        with self._writing():
            self._point("stable", version)

    def prune(self, keep: int) -> list[int]:
        """Remove all but the newest `keep` versions and those that a pointer names.

        Returns:
            the versions removed.
        """
        if keep < 1:
            raise ValueError("the newest version is always kept: it numbers the next one")
        with self._writing():
            spared = {*self.versions()[-keep:], self.latest(), self.stable()}
            removed = [version for version in self.versions() if version not in spared]
            for version in removed:
                # Hidden first, in one step: no reader may find half a version.
                hidden = self._home / f"{_UNFINISHED}{version:06d}"
                self._path(version).rename(hidden)
                shutil.rmtree(hidden)
        return removed

    def _check_latest(self, expected: int | None) -> None:
        latest = self.latest()
        if None not in (latest, expected) and latest != expected:
            raise OvertakenError(self._home / "latest", "version", f"{latest}, expected {expected}")

    def _check(self) -> None:
        marker = self.root / "registry.json"
        if not marker.is_file():
            raise CheckpointError(self.root, "registry.json", "missing; expected a registry")
        check_schema(read_json(marker), marker)

    def _path(self, version: int) -> Path:
        return self._home / f"v{version:06d}"

    def _version_numbers(self) -> list[int]:
        try:
            names = os.listdir(self._home)
        except FileNotFoundError:
            return []
        matches = (_VERSION.fullmatch(name) for name in names)
        return sorted(int(match[1]) for match in matches if match)

    def _pointed(self, pointer: str) -> int | None:
        path = self._home / pointer
        try:
            goal = os.readlink(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise CheckpointError(path, "pointer", "expected a symbolic link") from error
        match = _VERSION.fullmatch(goal)
        if match is None:
            raise CheckpointError(path, "pointer", f"{goal!r:.80}, expected a version folder")
        return int(match[1])

    def _point(self, pointer: str, version: int) -> None:
        goal = self.folder(version).name
        temporary = self._home / f"{_UNFINISHED}{pointer}"
        temporary.symlink_to(goal)
        temporary.replace(self._home / pointer)
        _sync(self._home)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Hold the writers' lock, with what dead writers left cleared away."""
        try:
            self._home.mkdir(exist_ok=True)
            with (self._home / ".lock").open("wb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                for left in self._home.glob(f"{_UNFINISHED}*"):
                    _remove(left)
                yield
        except OSError as error:
            raise CheckpointError(self._home, "folder", _unwritable(error)) from error


def _checked_name(root: str | Path, name: str) -> str:
    if not _NAME.fullmatch(name):
        raise CheckpointError(root, "name", f"{name!r:.80}, expected letters, digits, . _ and -")
    return name


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(path, "link", f"leads nowhere: {error}") from error


def _unwritable(error: OSError) -> str:
    return f"cannot be written: {error.strerror or error}"


def _specs(verified: Verified) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(dtype=dtype_name(tensor), shape=list(tensor.shape))
        for name, tensor in verified.tensors.items()
    }


def _copy(source: Path, goal: Path) -> str:
    """Copy durably; returns the SHA-256 of what was read."""
    digest = hashlib.sha256()
    with source.open("rb") as read, goal.open("xb") as write:
        while block := read.read(_BLOCK):
            digest.update(block)
            write.write(block)
        write.flush()
        os.fsync(write.fileno())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    _write(temporary, text.encode())
    temporary.replace(path)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
