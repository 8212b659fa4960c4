"""The spool: the folder through which engines hand rollouts to the sidecar.

::

    SPOOL/segments/<policy version>-<engine>-<sequence>.safetensors     see segment.py
    SPOOL/heads/<policy version>.safetensors                            a PolicyHead
    SPOOL/unfinished/<writer>/                                          what is being written

Writers and readers share nothing else. A file is written under ``unfinished``, synced, and then
appears under its name in one step, so readers never see a half. A writer holds a lock on its folder
there for as long as it lives; the next writer clears away the folders of dead ones. One spool
belongs to one RL run: policy versions order its segments.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from drafttrain.errors import RolloutError, SpoolError
from drafttrain.rollouts.files import Parts, check_tensor, check_unchanged, map_file, save
from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout
from drafttrain.rollouts.segment import DTYPES, Segment, pack, read_segment

_SEGMENT = re.compile(r"(\d{8,18})-([A-Za-z0-9._-]+)-(\d{8,18})\.safetensors")
_HEAD = re.compile(r"(\d{8,18})\.safetensors")
_ENGINE = re.compile(r"[A-Za-z0-9._-]{1,100}")

# A rollout without its policy's head cannot be trained on, so this bounds their age: the newest
# policy version and the eight behind it that the sidecar trains on by default.
HEADS_KEPT = 9


class SpoolWriter:
    """Writes one engine's segments; safe to kill at any moment.

    Attributes:
        root: the spool's folder.
        engine: the engine's name; part of the file names.
        max_bytes: of segments on disk, beyond which the spool is full.
    """

    def __init__(self, root: str | Path, engine: str, max_bytes: int = 16 << 30) -> None:
        """Create the folders, and clear away what dead writers left.

        Raises:
            SpoolError: a bad engine name, or the folder cannot be written.
        """
        if not _ENGINE.fullmatch(engine):
            raise SpoolError(f"engine name {engine!r:.120}: expected letters, digits, . _ and -")
        self.root, self.engine, self.max_bytes = Path(root), engine, max_bytes
        self._segments, self._heads = self.root / "segments", self.root / "heads"
        with self._writing():
            for folder in (self._segments, self._heads, self.root / "unfinished"):
                folder.mkdir(parents=True, exist_ok=True)
            self._own, lock = _own_folder(self.root / "unfinished")
        weakref.finalize(self, os.close, lock)
        matches = (_SEGMENT.fullmatch(path.name) for path in _segment_paths(self.root))
        own = (int(match[3]) for match in matches if match and match[2] == engine)
        self._sequence = max(own, default=-1) + 1

    def write(self, rollouts: Sequence[Rollout], layout: FeatureLayout) -> Path:
        """Write one segment.

        Args:
            rollouts: at least one; all of one policy version and one drafter version.
            layout: of their features.

        Raises:
            SpoolError: the disk is full or the folder cannot be written; nothing is left behind.
            RolloutError: the rollouts contradict each other or the layout.
        """
        tensors, metadata = pack(rollouts, layout, self.engine, self._segments)
        with self._writing(), self._finished(tensors, metadata) as file:
            while True:
                path = self._segments / _segment_name(
                    rollouts[0].policy_version, self.engine, self._sequence
                )
                self._sequence += 1
                try:
                    # Unlike a rename this never replaces what an engine of the same name wrote.
                    os.link(file, path)
                except FileExistsError:
                    continue
                _sync(self._segments)
                return path

    def write_head(self, head: PolicyHead) -> Path:
        """Write a policy's head, replacing one of the same version; only the newest are kept.

        Raises:
            SpoolError: as :meth:`write`.
        """
        tensors = {"embed_tokens": head.embed_tokens, "lm_head": head.lm_head}
        if head.lm_head.data_ptr() == head.embed_tokens.data_ptr():  # tied: stored once
            del tensors["lm_head"]
        if head.final_norm is not None:
            tensors["final_norm"] = head.final_norm
        parts: dict[str, Parts] = {name: [t.contiguous()] for name, t in tensors.items()}
        metadata = {
            "policy_version": str(head.policy_version),
            "norm_eps": repr(float(head.norm_eps)),
        }
        path = _head_path(self.root, head.policy_version)
        with self._writing(), self._finished(parts, metadata) as file:
            file.replace(path)
            _sync(self._heads)
            for version in SpoolReader(self.root).heads()[:-HEADS_KEPT]:
                _head_path(self.root, version).unlink(missing_ok=True)
        return path

    @property
    def full(self) -> bool:
        """Whether the segments on disk exceed ``max_bytes``; lists the folder."""
        return _folder_bytes(self._segments) > self.max_bytes

    @contextmanager
    def _finished(self, tensors: dict[str, Parts], metadata: dict[str, str]) -> Iterator[Path]:
        """A whole, synced file that has no name in the spool yet; gone afterwards."""
        file = self._own / "file"
        try:
            save(file, tensors, metadata)
            _sync(file)
            yield file
        finally:
            for left in self._own.iterdir():
                left.unlink(missing_ok=True)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SpoolError(f"{self.root}: cannot be written: {error.strerror}") from error


class SpoolReader:
    """Reads a spool; needs no lock, and never writes.

    Attributes:
        root: the spool's folder; what does not exist yet reads as empty.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root)

    def segment_paths(self) -> list[Path]:
        """Finished segments, oldest first: by policy version, then as each engine wrote them."""
        return _segment_paths(self.root)

    def read(self, path: Path) -> Segment:
        """Map a segment and check everything.

        Raises:
            RolloutError: missing, not whole, of a newer schema, inconsistent or changed; names the
                field.
        """
        segment = read_segment(path)
        match = _SEGMENT.fullmatch(path.name)
        if match and int(match[1]) != segment.policy_version:
            problem = f"{segment.policy_version}, but the file's name says {int(match[1])}"
            raise RolloutError(path, "policy_version", problem)
        return segment

    def heads(self) -> list[int]:
        """Policy versions whose head is there, oldest first."""
        names = _names(self.root / "heads")
        return sorted(int(match[1]) for match in map(_HEAD.fullmatch, names) if match)

    def read_head(self, policy_version: int) -> PolicyHead:
        """Map a policy's head.

        Raises:
            RolloutError: missing, damaged, or of a newer schema.
        """
        path = _head_path(self.root, policy_version)
        stored, metadata = map_file(path)
        if metadata.get("policy_version") != str(policy_version):
            raise RolloutError(path, "policy_version", f"expected {policy_version}")
        try:
            norm_eps = float(metadata["norm_eps"])
        except (KeyError, ValueError) as error:
            raise RolloutError(path, "norm_eps", "expected a number") from error
        tensors = dict(stored)
        embed_tokens = tensors.get("embed_tokens")
        if embed_tokens is None or embed_tokens.ndim != 2 or not len(embed_tokens):
            raise RolloutError(path, "embed_tokens", "expected a tensor [V, H]")
        tensors.setdefault("lm_head", embed_tokens)
        shape, floats = tuple(embed_tokens.shape), list(DTYPES.values())
        for name in tensors:
            expected = shape[1:] if name == "final_norm" else shape
            check_tensor(tensors, name, expected, floats, path)
        check_unchanged(stored, metadata, path)
        return PolicyHead(
            policy_version, embed_tokens, tensors["lm_head"], tensors.get("final_norm"), norm_eps
        )


def sized(paths: Sequence[Path]) -> Iterator[tuple[Path, int]]:
    """Each path with its size in bytes; those deleted meanwhile are left out."""
    for path in paths:
        try:
            yield path, path.stat().st_size
        except FileNotFoundError:
            continue


def _segment_name(policy_version: int, engine: str, sequence: int) -> str:
    return f"{policy_version:08d}-{engine}-{sequence:08d}.safetensors"


def _head_path(root: Path, policy_version: int) -> Path:
    return root / "heads" / f"{policy_version:08d}.safetensors"


def _segment_paths(root: Path) -> list[Path]:
    folder = root / "segments"
    matches = [match for match in map(_SEGMENT.fullmatch, _names(folder)) if match]
    matches.sort(key=lambda match: (int(match[1]), int(match[3]), match[2]))
    return [folder / match[0] for match in matches]


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    except FileNotFoundError:
        return []


def _folder_bytes(folder: Path) -> int:
    total = 0
    with os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # deleted meanwhile
                total += entry.stat().st_size
    return total


def _own_folder(unfinished: Path) -> tuple[Path, int]:
    """A new folder for one writer, locked while the returned descriptor is open."""
    everyone = os.open(unfinished, os.O_RDONLY)
    try:
        # No folder may be taken for a dead writer's between its making and its locking.
        fcntl.flock(everyone, fcntl.LOCK_EX)
        for folder in unfinished.iterdir():
            _remove_if_dead(folder)
        own = Path(tempfile.mkdtemp(dir=unfinished))
        lock = os.open(own, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        return own, lock
    finally:
        os.close(everyone)


def _remove_if_dead(folder: Path) -> None:
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    except BlockingIOError:
        pass
    finally:
        os.close(lock)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
