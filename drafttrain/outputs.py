"""Folders that commands write: never over something else, and a clear error when they cannot be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from drafttrain.errors import CheckpointError


def check_new_folder(out: Path) -> None:
    """Refuse a folder that exists and is not empty.

    Raises:
        CheckpointError: it is one, or not a folder.
    """
    with writing(out):
        taken = out.exists() and not (out.is_dir() and not any(out.iterdir()))
    if taken:
        raise CheckpointError(out, "folder", "exists already; expected a new folder")


@contextmanager
def new_folder(out: Path) -> Iterator[None]:
    """Make a folder and fill it; nothing is left of it when that fails.

    Raises:
        CheckpointError: it exists and is not empty, or cannot be written.
    """
    check_new_folder(out)
    with writing(out):
        try:
            out.mkdir(parents=True, exist_ok=True)
            yield
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise


def make_folder(out: Path) -> None:
    """Make a folder unless there is one.

    Raises:
        CheckpointError: it cannot be made or written.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError("Permission denied")


@contextmanager
def writing(path: Path, field: str = "folder") -> Iterator[None]:
    """What goes wrong with the disk while `path` is written, as an error for the user.

    Raises:
        CheckpointError: blames `path` and `field`.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise CheckpointError(path, field, f"cannot be written: {reason}") from error
