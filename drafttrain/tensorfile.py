"""Safetensors files from outside: mapped, and refused before they can take memory or block."""

from __future__ import annotations

import stat
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from drafttrain.errors import InputError


def map_tensors(
    path: Path, refused: type[InputError], *, max_header: int
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map a safetensors file: its tensors (CPU, not copied) and its metadata.

    safetensors itself refuses a header that is longer than the file, or whose offsets do not cover
    the rest of the file exactly; it reads headers of up to 100 MB.

    Args:
        path: of the file.
        refused: the error to raise.
        max_header: bytes of header beyond which it is not read.

    Raises:
        refused: missing, not a file (a pipe would block), or not a whole safetensors file.
    """
    check_regular(path, refused)
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > max_header:
            raise ValueError(f"its header has {length} bytes, at most {max_header} are read")
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise refused(path, "file", f"is not a whole safetensors file: {error}") from error


def check_regular(path: Path, refused: type[InputError]) -> int:
    """The size in bytes of a file that is one, or a link to one.

    Raises:
        refused: missing, unreachable, or something else.
    """
    try:
        found = path.stat()
    except FileNotFoundError as error:
        raise refused(path, "file", "missing") from error
    except OSError as error:
        raise refused(path, "file", f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise refused(path, "file", "expected a regular file")
    return found.st_size
