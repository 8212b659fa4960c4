"""A file of the spool: tensors in safetensors, with a checksum over everything that it says.

Its metadata has ``schema_version`` and ``checksum``, the CRC-32 of the other metadata and of every
tensor; the rest is its writer's.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.errors import RolloutError
from drafttrain.tensorfile import map_tensors

SCHEMA_VERSION = 1
_CHECKSUM = "checksum"

# A segment's header names each of its rollouts; far above what 65,536 tokens of them need.
_HEADER_LIMIT = 64 << 20


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file with a checksum.

    Raises:
        OSError, SafetensorError: it cannot be written.
    """
    about = {"schema_version": str(SCHEMA_VERSION), **metadata}
    save_file(tensors, path, metadata={_CHECKSUM: _checksum(tensors, about)} | about)


def map_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map a file: its tensors and its metadata; :func:`check_unchanged` is left to the caller.

    Raises:
        RolloutError: missing, not a whole safetensors file, or not of this schema.
    """
    tensors, metadata = map_tensors(path, RolloutError, max_header=_HEADER_LIMIT)
    found = metadata.get("schema_version", "")
    if found != str(SCHEMA_VERSION):
        newer = found.isdecimal() and len(found) < 10 and int(found) > SCHEMA_VERSION
        advice = "; written by a newer drafttrain" if newer else ""
        problem = f"{found!r:.40}, expected '{SCHEMA_VERSION}'{advice}"
        raise RolloutError(path, "schema_version", problem)
    return tensors, metadata


def check_unchanged(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str | Path
) -> None:
    """Hold a mapped file against its checksum; reads all of it.

    Raises:
        RolloutError: it is not what was written.
    """
    rest = {name: value for name, value in metadata.items() if name != _CHECKSUM}
    if metadata.get(_CHECKSUM) != _checksum(tensors, rest):
        raise RolloutError(where, _CHECKSUM, "is not that of the content; the file is damaged")


def check_tensor(
    tensors: dict[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    dtypes: Sequence[torch.dtype],
    where: str | Path,
) -> None:
    """Hold one tensor against its shape and dtype.

    Raises:
        RolloutError: it is missing or has another shape or dtype.
    """
    if name not in tensors:
        raise RolloutError(where, name, "missing")
    found = tensors[name]
    if tuple(found.shape) != shape:
        raise RolloutError(where, name, f"shape {list(found.shape)}, expected {list(shape)}")
    if found.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise RolloutError(where, name, f"{found.dtype}, expected {expected}")


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    about = [(name, str(t.dtype), list(t.shape)) for name, t in sorted(tensors.items())]
    found = zlib.crc32(json.dumps([sorted(metadata.items()), about]).encode())
    for _, tensor in sorted(tensors.items()):
        found = zlib.crc32(tensor.flatten().view(torch.uint8).numpy(), found)
    return f"{found:08x}"
